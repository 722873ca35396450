"""Where the biases of an adapter go in a plain checkpoint: own biases, ones that a switch creates, the output's."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..layout import BiasSite, build_skeleton, features, output_projection
from ..weight_files import MergeError
from .checkpoint_files import CheckpointFiles


# Config fields that give the projections of an architecture their biases.
SWITCHES = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "bias", "use_bias")
# Parts of an attention layer that do not touch its values: those of queries and keys, positions, dropout.
_NOT_OF_VALUES = re.compile(r"(q|k|kv|query|key)_|.*(rotary|rope|dropout)")


@dataclass
class Placement:
    """Biases by module path, in fp32, to `add` to existing ones and to `create`, and the config that has them."""

    rule: str
    config: PreTrainedConfig
    add: dict[str, Tensor]
    create: dict[str, Tensor]


def place(
    deltas: dict[str, Tensor],
    config: PreTrainedConfig,
    skeleton: nn.Module,
    sites: list[BiasSite],
    checkpoint: CheckpointFiles,
    to_output: bool,
) -> Placement:
    """The first rule that has a place for every delta.

    Args:
        deltas: fp32, shape (n,), by module path.
        config, skeleton, sites, checkpoint: of the base model.
        to_output: put a value bias into the output projection whether or not it has another place.

    Raises:
        MergeError: if there is none.
    """
    biases = _biases(skeleton)
    if not to_output and deltas.keys() <= biases:
        return Placement("The deltas are added to the model's own biases.", config, deltas, {})
    variants = list(with_biases(config, skeleton))
    if not to_output:
        for rule, variant, created in variants:
            if deltas.keys() <= biases | created:
                add = {path: delta for path, delta in deltas.items() if path in biases}
                return Placement(rule, variant, add, _filled(created, deltas, skeleton))
    folded = fold(deltas, skeleton, sites, checkpoint)
    if folded is not None:
        rule = "The value bias is added to the bias of the output projection, as W_o b_v."
        if folded.keys() <= biases:
            return Placement(rule, config, folded, {})
        for switched, variant, created in variants:
            if folded.keys() <= biases | created:
                return Placement(f"{rule} {switched}", variant, {}, _filled(created, folded, skeleton))
    name = type(skeleton).__name__
    if to_output:
        raise MergeError(
            f"The bias of this adapter cannot become an output-projection bias in {name}: that takes a value bias and "
            "an output projection with a bias, after plain softmax attention. Merge without output_projection."
        )
    raise MergeError(
        f"{name} has no bias where this adapter needs one ({next(iter(deltas))} first), no configuration switch that "
        "creates it, and no output-projection bias that could stand for a value bias. Keep the adapter: PEFT and "
        "servers that load PEFT adapters apply it as it is."
    )


def _filled(created: set[str], values: dict[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """All biases that a switch creates: the values if there are any, else zeros."""
    return {
        path: values[path] if path in values else torch.zeros(features(skeleton.get_submodule(path))[1])
        for path in created
    }


def _biases(model: nn.Module) -> set[str]:
    return {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}


def with_biases(config: PreTrainedConfig, skeleton: nn.Module) -> Iterator[tuple[str, PreTrainedConfig, set[str]]]:
    """Configurations that build the same model with more biases: a sentence on it, itself, and the new biases."""
    names = set(skeleton.state_dict())
    candidates = []
    for switch in SWITCHES:
        if getattr(config.get_text_config(), switch, None) is False:
            variant = copy.deepcopy(config)
            setattr(variant.get_text_config(), switch, True)
            candidates.append((f"The biases are created by {switch}=True in the config.", variant))
    if config.model_type == "mistral" and config.sliding_window is None:
        fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "sliding_window")}
        variant = LlamaConfig(**{**fields, "attention_bias": True, "architectures": ["LlamaForCausalLM"]})
        candidates.append(("The model, a Mistral without sliding window, is written as a Llama with biases.", variant))
    for rule, variant in candidates:
        created = set(build_skeleton(variant).state_dict()) - names
        if created and all(name.endswith(".bias") for name in created):
            yield rule, variant, {name.removesuffix(".bias") for name in created}


def has_switched_biases(config: PreTrainedConfig) -> bool:
    """Whether a switch that is off by default gives a base biases, as it gives them to a merged Llama."""
    config = config.get_text_config()
    default = type(config)()
    return any(getattr(config, each, None) is True and getattr(default, each, None) is False for each in SWITCHES)


def fold(
    deltas: dict[str, Tensor], skeleton: nn.Module, sites: list[BiasSite], checkpoint: CheckpointFiles
) -> dict[str, Tensor] | None:
    """`W_o b_v` by the path of the output projection, or `None` if it would not be exact.

    Source: https://arxiv.org/abs/2302.08626, section 3; with grouped queries each value head stands for its group.
    """
    rows = {site.module: site.rows for site in sites if site.term == "value"}
    every_row: dict[str, set[int]] = {}
    for site in sites:
        every_row.setdefault(site.module, set()).update(site.rows.tolist())
    folded = {}
    for path, delta in deltas.items():
        parent = path.rpartition(".")[0]
        attention: Any = skeleton.get_submodule(parent)
        found = output_projection(attention)
        if path not in rows or found is None or not _is_plain(attention, parent, found[0], every_row):
            return None
        value = delta[rows[path]]
        if delta.count_nonzero() != value.count_nonzero():
            return None  # the adapter trains another term, too
        name = f"{parent}.{found[0]}"
        size = features(found[1])[0]
        head = getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None)
        if size != len(value):
            if not head or size % len(value) or len(value) % head:
                return None
            value = value.view(-1, 1, head).expand(-1, size // len(value), -1).flatten()
        weight = checkpoint.tensor(name, "weight").float()
        # Of a square matrix the shape does not tell that a Conv1D is stored transposed.
        folded[name] = value @ weight if isinstance(found[1], Conv1D) else weight @ value
    return folded


def _is_plain(attention: nn.Module, path: str, output: str, every_row: dict[str, set[int]]) -> bool:
    """Whether the output projection sees the values times probabilities that sum to one, and nothing else.

    Not so with sinks, with a gate or a norm before the output projection, or with a norm of the values. A gate can
    also be in rows of the query projection that are no query's.
    """
    if next(attention.parameters(recurse=False), None) is not None:
        return False
    for name, child in attention.named_children():
        rows = every_row.get(f"{path}.{name}")
        if rows is not None and len(rows) != features(child)[1]:
            return False
        if rows is None and name != output and not _NOT_OF_VALUES.match(name):
            return False
    return True
