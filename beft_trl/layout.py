"""Where the query, key and value bias of every attention layer lives, and which of them cannot matter."""

import inspect
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .compat.models import LOADING, LOADING_ONLY, without_weights


TERMS = ("query", "key", "value")

# A projection's name around the part that says which term it is: `q_proj`, `query`, `q_lin`, `query_proj`, `wq`.
_QUERY_NAME = re.compile(r"^(?P<head>(?:\w*_)?w?)(?P<query>query|q)(?P<tail>(?:_\w+)?)$")
_TERM_LETTERS = {"q": ("q", "k", "v"), "query": ("query", "key", "value")}
LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # in the path of a module
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "Wo")

# Attention classes of Transformers whose query, key and value share one matrix, with the order of its rows, each read
# from the class in src/transformers/models/. Structure does not tell the orders apart: their shapes are the same.
#   blocked:  all queries, all keys, all values.
#   grouped:  for each key-value head its queries, its key and its value. One query each is interleaving by head, a
#             single group is multi-query attention.
#   codegen:  four blocks of queries, values, keys, one for each shard of the hardware it was trained on.
_FUSED_ORDER = {
    "BloomAttention": "grouped",  # bloom, `_reshape`
    "CodeGenAttention": "codegen",  # codegen, `forward`
    "DbrxAttention": "blocked",  # dbrx, `forward`
    "FalconAttention": "grouped",  # falcon, `_split_heads`, all three of its branches
    "FalconFlashAttention2": "grouped",
    "GPT2Attention": "blocked",  # gpt2, `forward`, a Conv1D
    "GPTBigCodeAttention": "grouped",  # gpt_bigcode, `forward`, both branches of `multi_query`
    "GPTNeoXAttention": "grouped",  # gpt_neox, `forward`
    "GPTNeoXJapaneseAttention": "grouped",  # gpt_neox_japanese, `forward`
    "MptAttention": "blocked",  # mpt, `forward`
    "PersimmonAttention": "grouped",  # persimmon, `_split_heads`
    "Phi3Attention": "blocked",  # phi3, `forward`
    "Phi4MultimodalAttention": "blocked",  # phi4_multimodal, `forward`
}
_FUSED_NAME = re.compile(r"qkv|query_key_value|^c_attn$", re.IGNORECASE)
# Attention classes whose query projection also gives an output gate, after the query of each head (qwen3_next,
# `forward`; the others inherit it).
_GATED_QUERY = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention")

_CANCELS = "so the key bias adds the same amount to every score of a row and cancels"
NO_POSITIONS = f"its softmax attention has no rotary positions, {_CANCELS}"
LATENT_KEY = f"its latent attention gives positions only to another part of the keys, {_CANCELS}"


class UnsupportedLayoutError(ValueError):
    """The model's attention projections are missing or of a layout that this package does not train."""


@dataclass(frozen=True)
class BiasSite:
    """One bias term of one attention layer. Two of one layer, term and module are equal.

    Attributes:
        layer: index of the decoder or encoder layer, from 0.
        term: `"query"`, `"key"` or `"value"`.
        module: dotted path, in the base model, of the projection that the bias is added to.
        rows: 1-D LongTensor, the output features of `module` that belong to the term, in rising order.
        has_bias: whether the projection has a bias of its own.
        dead: why a bias here has no effect on the model's output as far as its structure tells, or `None` if it has
            one. A scoring pass gives sites that are corrected by their gradients.
    """

    layer: int
    term: str
    module: str
    rows: Tensor = field(compare=False, repr=False)
    has_bias: bool = field(compare=False)
    dead: str | None = field(compare=False)


class BiasSites(list[BiasSite]):
    """The sites of a model, which print as a table.

    Attributes:
        left_out: number of layers that have no query, key and value projections of their own: convolution, Mamba,
            linear attention, keys and values borrowed from another layer.
    """

    left_out: int = 0

    def __str__(self) -> str:
        table = Table("layer", "term", "module", "rows", "size", "bias", "")
        for site in self:
            bias = "its own" if site.has_bias else "added"
            state = f"dead: {site.dead}" if site.dead else "alive"
            table.add_row(str(site.layer), site.term, site.module, _slice(site), str(len(site.rows)), bias, state)
        if self.left_out:
            table.caption = f"{self.left_out} layers without query, key and value projections are left out."
        text = io.StringIO()
        Console(file=text, width=160).print(table)
        return text.getvalue()


def find_bias_sites(model: nn.Module) -> BiasSites:
    """Finds the query, key and value bias of every attention layer, from the modules' structure.

    An attention layer is a module with three linear children whose names differ only in the term (`q_proj`, `k_proj`,
    `v_proj`; `query`, `key`, `value`; ...), one with a fused child whose order of rows is known, or multi-head latent
    attention, whose value is the value part of `kv_b_proj`. Sizes come from the layers, so grouped-query attention
    needs no rule. Of a model of several modalities, only the text part is searched.

    Args:
        model: a Transformers model, bare or wrapped by PEFT, on any device, the meta device included.

    Returns:
        The sites in the order of the layers, query, key and value of each.

    Raises:
        UnsupportedLayoutError: for fused projections of an unknown order, for encoder-decoder models, or if no
            projections are found.

    The key bias is dead in softmax attention without rotary positions, query-key norm, sinks or disentangled positions
    (https://arxiv.org/abs/2302.08626, section 3).
    """
    # PEFT's wrappers are known by their methods: importing PEFT takes seconds, and a merge does without it.
    wrapper: Any = model
    base_model: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    name, config = type(base_model).__name__, getattr(base_model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedLayoutError(
            f"{name} has cross-attention, whose keys and values come from another sequence than its queries. BEFT is "
            "done here only for decoders and encoders: use a causal language model."
        )
    prefix, text_model = _text_part(base_model)
    sites = BiasSites()
    unknown: list[str] = []
    for path, attention in text_model.named_modules(prefix=prefix):
        projections = _projections(attention)
        if projections is None:
            unknown += [f"{path}.{child}" for child, _ in _linear_children(attention) if _FUSED_NAME.search(child)]
            continue
        layer = layer_index(path, default=len(sites) // len(TERMS))
        for term, (child, rows) in zip(TERMS, projections, strict=True):
            sites.append(
                BiasSite(
                    layer=layer,
                    term=term,
                    module=f"{path}.{child}" if path else child,
                    rows=rows,
                    has_bias=_linear(getattr(attention, child)).bias is not None,
                    dead=dead_key_reason(attention, text_model) if term == "key" else None,
                )
            )
    if not sites and unknown:
        raise UnsupportedLayoutError(
            f"{name} keeps query, key and value in one fused matrix ({unknown[0]}, {len(unknown)} in all) whose order "
            "of rows is not known here. A wrong slice would train something else without a sign of it: use a model "
            "with separate projections, or one of the fused layouts in beft_trl/layout.py."
        )
    if not sites:
        raise UnsupportedLayoutError(
            f"{name} has no attention layer with linear projections for query, key and value (names like q_proj, "
            "k_proj, v_proj or query, key, value). BEFT trains the bias of one of these: use a Transformers attention "
            "model that has them."
        )
    layers = getattr(getattr(text_model, "config", None), "num_hidden_layers", None)
    if isinstance(layers, int):
        sites.left_out = max(0, layers - len({site.layer for site in sites}))
    return sites


def sites_of_term(sites: Sequence[BiasSite], bias_term: str) -> list[BiasSite]:
    """The sites to train for `bias_term`: those of one term, or every live one for `"auto"` and `"all"`.

    Raises:
        ValueError: if the term is dead in every layer, so that training it would change nothing.
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


def skeleton_of(name: str, args: Any, auto_class: Any = None) -> nn.Module:
    """The model that training arguments load by that name, without weights, in the dtype that they ask for.

    Args:
        name (`str`): name or path of the model.
        args (`TrainingArguments`): with `model_init_kwargs`, if it has them.
        auto_class (*optional*): the auto class that loads it. Default: the model's own architecture.
    """
    init = getattr(args, "model_init_kwargs", None) or {}
    trust = init.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    # What is left of these Transformers takes for fields of the configuration, as it does when it loads the weights.
    options = {key: value for key, value in init.items() if key not in (*LOADING_ONLY, "trust_remote_code")}
    config, unknown = AutoConfig.from_pretrained(name, trust_remote_code=trust, return_unused_kwargs=True, **options)
    skeleton = build_skeleton(config, trust, auto_class)
    takers: Any = (transformers.PreTrainedModel.from_pretrained, type(skeleton).__init__)
    taken = {*LOADING, *(name for taker in takers for name in inspect.signature(taker).parameters)}
    unknown = [key for key in unknown if key not in taken]
    if unknown:
        raise ValueError(
            f"model_init_kwargs has {', '.join(unknown)}, which from_pretrained and {type(config).__name__} do not "
            "know. Leave it out, or look at its spelling."
        )
    dtype = init.get("dtype")
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return skeleton.to(dtype) if isinstance(dtype, torch.dtype) else skeleton


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False, auto_class: Any = None) -> nn.Module:
    """The model of `config` without weights, on the meta device; of its own architecture if Transformers has it."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with without_weights():
        if auto_class is not None or architecture is None:
            loader = auto_class or AutoModelForCausalLM
            return loader.from_config(config, trust_remote_code=trust_remote_code)
        return architecture(config)


def output_projection(attention: nn.Module) -> tuple[str, Any] | None:
    """Name and layer of the linear child that maps the heads' outputs back, or `None`."""
    linear = dict(_linear_children(attention))
    return next(((name, linear[name]) for name in _OUTPUT_NAMES if name in linear), None)


def features(projection: Any) -> tuple[int, int]:
    """Input and output features of a linear layer or a GPT-2 `Conv1D`, quantised or split ones included."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


def _text_part(base_model: Any) -> tuple[str, nn.Module]:
    text_model = base_model.get_decoder() if hasattr(base_model, "get_decoder") else base_model
    for path, module in base_model.named_modules():
        if module is text_model:
            return path, module
    return "", base_model


def _projections(attention: nn.Module) -> list[tuple[str, Tensor]] | None:
    """Child and rows of query, key and value, or `None` if the module is no attention layer that is known."""
    return _latent(attention) or _separate(attention) or _fused(attention)


def _separate(attention: Any) -> list[tuple[str, Tensor]] | None:
    linear = dict(_linear_children(attention))
    for name in sorted(linear):
        match = _QUERY_NAME.match(name)
        if match is None:
            continue
        names = [match["head"] + letter + match["tail"] for letter in _TERM_LETTERS[match["query"]]]
        if linear.keys() >= set(names):
            rows = [torch.arange(features(linear[name])[1], device="cpu") for name in names]
            if type(attention).__name__ in _GATED_QUERY:
                rows[0] = rows[0].view(-1, 2, attention.head_dim)[:, 0].flatten()
            elif len(rows[0]) == 2 * (_output_size(attention) or 0):
                raise UnsupportedLayoutError(
                    f"{names[0]} of {type(attention).__name__} gives twice the features that the attention's output "
                    "has, so that half of them are no query. Which half is not known here: use another model."
                )
            return list(zip(names, rows, strict=True))
    return None


def _latent(attention: Any) -> list[tuple[str, Tensor]] | None:
    """Multi-head latent attention (deepseek_v3, `expand_kv`): for each head the key without positions, the value."""
    linear = dict(_linear_children(attention))
    query = "q_b_proj" if "q_b_proj" in linear else "q_proj"
    if not {"kv_b_proj", query} <= linear.keys() or not hasattr(attention, "qk_nope_head_dim"):
        return None
    sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
    by_head = torch.arange(features(linear["kv_b_proj"])[1], device="cpu").view(-1, sum(sizes))
    key, value = (rows.flatten() for rows in by_head.split(sizes, dim=1))
    return [
        (query, torch.arange(features(linear[query])[1], device="cpu")),
        ("kv_b_proj", key),
        ("kv_b_proj", value),
    ]


def _fused(attention: Any) -> list[tuple[str, Tensor]] | None:
    order = _FUSED_ORDER.get(type(attention).__name__)
    fused = [(name, child) for name, child in _linear_children(attention) if _FUSED_NAME.search(name)]
    query = _output_size(attention)
    if order is None or query is None or len(fused) != 1:
        return None
    name, projection = fused[0]
    size = features(projection)[1]
    keys = (size - query) // 2
    index = torch.arange(size, device="cpu")
    if order == "blocked":
        rows = index.split([query, keys, keys])
    elif order == "grouped":
        head = getattr(attention, "head_dim", None) or attention.head_size
        groups = index.view(keys // head, -1, head)
        rows = groups[:, :-2], groups[:, -2], groups[:, -1]
    else:
        shards = index.view(4, 3, -1)
        rows = shards[:, 0], shards[:, 2], shards[:, 1]
    return [(name, term.flatten()) for term in rows]


def _output_size(attention: nn.Module) -> int | None:
    found = output_projection(attention)
    return features(found[1])[0] if found else None


def _linear(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _linear_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(_linear(child), (nn.Linear, Conv1D)):
            yield name, _linear(child)


def layer_index(path: str, default: int) -> int:
    """The number of the layer that the module at `path` is in; `default` for a path without one."""
    index = LAYER_NUMBER.search(path)
    return int(index[1]) if index else default


def dead_key_reason(attention: Any, text_model: nn.Module) -> str | None:
    """Why the key bias of this layer has no effect, as far as the structure tells, or `None`."""
    if hasattr(attention, "qk_nope_head_dim"):
        return LATENT_KEY
    config = getattr(text_model, "config", None)
    rotary = any("rotary" in type(module).__name__.lower() for module in text_model.modules())
    # Falcon builds its rotary embedding even if it uses ALiBi.
    rotary = (rotary and not getattr(config, "alibi", False)) or any("rotary" in name for name in vars(attention))
    # `use_rope` is false in the layers without positions of SmolLM3 and Llama 4.
    if rotary and getattr(attention, "use_rope", True):
        return None
    key_norm = any(re.match(r"k\w*norm|key\w*norm|qk\w*norm", name) for name, _ in attention.named_children())
    # Of DeBERTa's disentangled attention, position-to-content is where the key meets relative positions.
    disentangled = getattr(attention, "relative_attention", False) and "p2c" in getattr(attention, "pos_att_type", ())
    return None if key_norm or hasattr(attention, "sinks") or disentangled else NO_POSITIONS


def _slice(site: BiasSite) -> str:
    """The rows as text: `0:64`, or `0:8 of every 24` if they come in equal runs."""
    breaks = (site.rows.diff() != 1).nonzero().flatten() + 1
    runs = site.rows.tensor_split(breaks)
    first = f"{runs[0][0]}:{runs[0][-1] + 1}"
    return first if len(runs) == 1 else f"{first} of every {runs[1][0] - runs[0][0]}"
