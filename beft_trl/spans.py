"""The span of layers that a run trains, and the end of its backward pass below them."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layout import LAYER_NUMBER, BiasSite, BiasSites


SPEC = re.compile(r"all|upper|\d+(-\d+)?(,\d+(-\d+)?)*")


def spec_of(bias_layers: Any) -> str:
    """`bias_layers` as text without spaces: a list or a number of YAML's becomes `"3,5"` or `"3"`.

    Raises:
        ValueError: for what names no layers.
    """
    parts = bias_layers if isinstance(bias_layers, (list, tuple)) else [bias_layers]
    spec = "".join(",".join(map(str, parts)).split())
    if isinstance(bias_layers, bool) or not SPEC.fullmatch(spec) or any(last < first for first, last in _ends(spec)):
        raise ValueError(
            f"bias_layers={bias_layers!r} names no layers. Give 'all', 'upper' for the upper half, a range such as "
            "'15-29', or a list such as [3, 5, 7]."
        )
    return spec


def _ends(spec: str) -> list[tuple[int, int]]:
    """First and last layer of each range in a specification; none for a word."""
    if spec.isalpha():
        return []
    parts = [part.split("-") for part in spec.split(",")]
    return [(int(part[0]), int(part[-1])) for part in parts]


def sites_in(sites: BiasSites, bias_layers: str) -> BiasSites:
    """The sites in the layers that `bias_layers` names.

    Args:
        sites (`BiasSites`): of the whole model.
        bias_layers (`str`): `"all"`, `"upper"`, or numbers and ranges of layers, see [`spec_of`]. The upper half is
            that of the layers that have sites.

    Raises:
        ValueError: for a layer that the model does not have, or that has no projections.
    """
    layers = sorted({site.layer for site in sites})
    if bias_layers == "all":
        wanted = set(layers)
    elif bias_layers == "upper":
        wanted = set(layers[len(layers) // 2 :])
    else:
        wanted = {layer for first, last in _ends(bias_layers) for layer in range(first, last + 1)}
        if not wanted <= set(layers):
            raise ValueError(
                f"bias_layers={bias_layers!r} names layers that have no query, key and value projections: this model "
                f"has them in layers {ranges(layers)}."
            )
    chosen = BiasSites(site for site in sites if site.layer in wanted)
    chosen.left_out = sites.left_out
    return chosen


def ranges(layers: Any) -> str:
    """Numbers of layers as text, such as `"3,15-29"`."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs(layers))


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers, in rising order."""
    known = set(numbers)
    firsts = sorted(number for number in known if number - 1 not in known)
    lasts = sorted(number for number in known if number + 1 not in known)
    return list(zip(firsts, lasts, strict=True))


class FrozenLayers(NamedTuple):
    """The layers below the lowest that is trained.

    Attributes:
        layers (`list[nn.Module]`): in their order, one at least.
        first_trained (`nn.Module`): the layer after them.
        around (`list[nn.Module]`): the modules that the list of layers is in, the base model first.
    """

    layers: list[Any]
    first_trained: Any
    around: list[nn.Module]


def frozen_below(model: PeftModel, sites: Sequence[BiasSite]) -> FrozenLayers | None:
    """The frozen layers below the lowest of `sites`, or `None` if there are none, or something below is trained whole.

    Args:
        model (`PeftModel`): with its deltas.
        sites (`Sequence[BiasSite]`): all that can be trained.
    """
    base = model.get_base_model()
    indices = [index for site in sites if (index := LAYER_NUMBER.search(site.module))]
    if not indices or len(indices) < len(sites):
        return None
    path = sites[0].module[: indices[0].start()]
    layers, lowest = base.get_submodule(path), min(int(index[1]) for index in indices)
    if not isinstance(layers, nn.ModuleList) or lowest == 0:
        return None
    # In the order of the model: embeddings, layers, head. What is trained whole may be among the first.
    first = next(layers[lowest].parameters())
    if any(each.requires_grad for each in itertools.takewhile(lambda each: each is not first, model.parameters())):
        return None
    parts = path.split(".")
    around = [base, *(base.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))]
    return FrozenLayers(list(layers[:lowest]), layers[lowest], around)


def end_backward_below(model: PeftModel, sites: list[BiasSite]) -> list[RemovableHandle]:
    """Keeps the frozen layers below the lowest of `sites` out of the backward pass, with gradient checkpointing too.

    Without it they are out by themselves. With it Transformers, PEFT and TRL let the output of the embeddings require
    a gradient, which then goes through every layer. Here the output of the last frozen layer does in its place, and
    the frozen layers are computed once. Nothing is done if something below is trained whole, as `modules_to_save`.

    Args:
        model (`PeftModel`): with its deltas.
        sites (`list[BiasSite]`): all that can be trained.

    Returns:
        `list[RemovableHandle]`: what ends it.
    """
    found = frozen_below(model, sites)
    if found is None or not hasattr(found.layers[0], "gradient_checkpointing"):
        return []
    layers, first_trained = found.layers, found.first_trained

    def checkpoint_none_below(*call: Any) -> None:
        for layer in layers:
            layer.gradient_checkpointing = False  # a run switches it on for all of them when it begins

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _map(args, Tensor.detach), {name: _map(value, Tensor.detach) for name, value in kwargs.items()}

    def end(module: nn.Module, args: tuple, output: Any) -> Any:
        if first_trained.gradient_checkpointing and torch.is_grad_enabled():
            return _map(output, lambda values: values.detach().requires_grad_())
        return output

    return [
        model.register_forward_pre_hook(checkpoint_none_below),
        layers[0].register_forward_pre_hook(start, with_kwargs=True),
        layers[-1].register_forward_hook(end),
    ]


def _map(given: Any, change: Any) -> Any:
    """What a layer takes or gives, with its floating-point tensors changed."""
    if isinstance(given, Tensor):
        return change(given) if given.is_floating_point() else given
    return type(given)(_map(part, change) for part in given) if type(given) in (tuple, list) else given
