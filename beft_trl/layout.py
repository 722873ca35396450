"""Where the query, key and value bias of every attention layer lives, and which of them cannot matter."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


TERMS = ("query", "key", "value")

# A projection's name around the part that says which term it is: `q_proj`, `query`, `q_lin`, `query_proj`, `wq`.
_QUERY_NAME = re.compile(r"^(?P<head>(?:\w*_)?w?)(?P<query>query|q)(?P<tail>(?:_\w+)?)$")
_TERM_LETTERS = {"q": ("q", "k", "v"), "query": ("query", "key", "value")}
# One matrix that holds query, key and value together: `qkv_proj`, `Wqkv`, `query_key_value`, `c_attn`.
_FUSED_NAME = re.compile(r"qkv|query_key_value|^c_attn$", re.IGNORECASE)

NO_POSITIONS = (
    "its softmax attention has no rotary positions, so the key bias adds the same amount to every score of a row and "
    "cancels"
)


class UnsupportedLayoutError(ValueError):
    """The model's attention projections are missing or of a layout that this package does not train."""


@dataclass(frozen=True, eq=False)
class BiasSite:
    """One bias term of one attention layer.

    Attributes:
        layer: index of the decoder or encoder layer, from 0.
        term: `"query"`, `"key"` or `"value"`.
        module: dotted path, in the base model, of the projection that the bias is added to.
        rows: 1-D LongTensor, the output features of `module` that belong to the term.
        has_bias: whether the projection has a bias of its own.
        dead: why a bias here has no effect on the model's output, or `None` where it has one.
    """

    layer: int
    term: str
    module: str
    rows: torch.Tensor
    has_bias: bool
    dead: str | None


def find_bias_sites(model: nn.Module) -> list[BiasSite]:
    """Finds the query, key and value bias of every attention layer, from the modules' structure.

    An attention layer is a module with three linear children whose names differ in the term alone (`q_proj`, `k_proj`,
    `v_proj`; `query`, `key`, `value`; ...). Sizes come from the layers, so grouped-query attention needs no rule.

    Args:
        model: a Transformers model, bare or wrapped by PEFT, on any device, the meta device included.

    Returns:
        The sites in the order of the layers, query, key and value of each.

    Raises:
        UnsupportedLayoutError: where query, key and value share one fused matrix, or no projections are found.

    The key bias is dead in softmax attention without rotary positions, query-key norm, sinks or disentangled positions
    (https://arxiv.org/abs/2302.08626, section 3).
    """
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    sites: list[BiasSite] = []
    attention_layers: set[int] = set()
    fused: list[str] = []
    rotary = any("rotary" in type(module).__name__.lower() for module in base_model.modules())
    for path, attention in base_model.named_modules():
        fused += [f"{path}.{name}" for name, _ in _linear_children(attention) if _FUSED_NAME.search(name)]
        for names in _projection_names(attention):
            layer = _layer_index(path, default=len(attention_layers))
            attention_layers.add(layer)
            for term, name in zip(TERMS, names, strict=True):
                projection = _linear(getattr(attention, name))
                sites.append(
                    BiasSite(
                        layer=layer,
                        term=term,
                        module=f"{path}.{name}" if path else name,
                        rows=torch.arange(projection.out_features),
                        has_bias=projection.bias is not None,
                        dead=None if term != "key" or _key_bias_matters(attention, rotary) else NO_POSITIONS,
                    )
                )
    name = type(base_model).__name__
    if fused:
        raise UnsupportedLayoutError(
            f"{name} keeps query, key and value in one fused matrix ({fused[0]}, {len(fused)} in all). Fused "
            "projections are not supported: use a model whose query, key and value are separate linear layers."
        )
    if not sites:
        raise UnsupportedLayoutError(
            f"{name} has no attention layer with separate linear projections for query, key and value (names like "
            "q_proj, k_proj, v_proj or query, key, value). BEFT trains the bias of one of these: use a Transformers "
            "attention model that has them."
        )
    return sites


def sites_of_term(sites: Sequence[BiasSite], bias_term: str) -> list[BiasSite]:
    """The sites to train for `bias_term`: those of one term, or every live one for `"auto"` and `"all"`.

    Raises:
        ValueError: where the term is dead in every layer, so that training it would change nothing.
    """
    chosen = [site for site in sites if bias_term in ("auto", "all", site.term)]
    live = [site for site in chosen if site.dead is None]
    if not live:
        alternatives = [term for term in TERMS if any(site.term == term and site.dead is None for site in sites)]
        raise ValueError(
            f"bias_term={bias_term!r} has no effect on this model: {chosen[0].dead}. "
            f"Use {', '.join(map(repr, alternatives))} or 'auto'."
        )
    return live


def _linear(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _linear_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(_linear(child), (nn.Linear, Conv1D)):
            yield name, child


def _projection_names(attention: nn.Module) -> Iterator[tuple[str, ...]]:
    linear = {name for name, child in _linear_children(attention) if isinstance(_linear(child), nn.Linear)}
    for name in sorted(linear):
        match = _QUERY_NAME.match(name)
        if match is None:
            continue
        names = tuple(match["head"] + letter + match["tail"] for letter in _TERM_LETTERS[match["query"]])
        if linear.issuperset(names):
            yield names


def _layer_index(path: str, default: int) -> int:
    index = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(index[1]) if index else default


def _key_bias_matters(attention: nn.Module, model_has_rotary: bool) -> bool:
    rotary = model_has_rotary or any("rotary" in name for name in vars(attention))
    # `use_rope` is false in the layers without positions of SmolLM3 and Llama 4.
    if rotary and getattr(attention, "use_rope", True):
        return True
    key_norm = any(re.match(r"k\w*norm|key\w*norm|qk\w*norm", name) for name, _ in attention.named_children())
    # `relative_attention` is DeBERTa's disentangled attention, where the key also meets relative positions.
    return key_norm or hasattr(attention, "sinks") or bool(getattr(attention, "relative_attention", False))
