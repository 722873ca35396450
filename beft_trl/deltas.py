"""The values of what is trained: read, put back and checked, on any engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .compat.engines import has_fp32_copy, is_split, whole_shape
from .layout import BiasSite
from .tuner import SAVED_WHOLE, Deltas, delta, parameters_saved_whole, projection, rows_of_modules
from .weight_files import PREFIX, SUFFIX


def gather_deltas(model: PeftModel, sites: Sequence[BiasSite]) -> dict[BiasSite, Tensor]:
    """The deltas as fp32 tensors on the CPU, shape (len(site.rows),). A collective under ZeRO."""
    vectors = _gather_vectors(model, sites)
    return {site: vectors[site.module].flatten()[site.rows] for site in sites}


def exact_start(model: PeftModel, sites: Sequence[BiasSite]) -> Callable[[], None]:
    """Reads the deltas as they are before DeepSpeed has them, and returns what puts its fp32 copies to these values.

    An engine that computes in 16 bits rounds the deltas before it copies them. An adapter that is trained further
    would begin rounded. Both calls are collectives.
    """
    vectors = _gather_vectors(model, sites)

    def put() -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for site in sites:
            parameter = delta(model, site)
            if has_fp32_copy(parameter):
                safe_set_full_fp32_param(parameter, vectors[site.module].to(parameter.device))

    return put


def adapter_state_dict(model: PeftModel, sites: Sequence[BiasSite]) -> dict[str, Tensor]:
    """What `PeftModel.save_pretrained` takes as `state_dict`: the deltas and what is saved whole, in fp32, under their
    full names.

    A collective under ZeRO, so every process calls it. The model's own `state_dict()` would hold the frozen base too,
    and 16-bit copies of the deltas under DeepSpeed.

    Raises:
        RuntimeError: if a fused layer's delta is not zero outside the rows of `sites`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    vectors = _gather_vectors(model, sites)
    for path, rows in rows_of_modules(sites).items():
        if vectors[path].index_fill(1, rows, 0).any():
            raise RuntimeError(
                f"The delta of {path} has moved outside the rows of the {sites[0].term} bias, whose gradients are cut "
                f"off there. The optimizer moves parameters that have no gradient: use another optim."
            )
    return {names[id(delta(model, site))]: vectors[site.module] for site in sites} | gather_saved_whole(model)


def adapter_shapes(model: PeftModel, sites: Sequence[BiasSite]) -> dict[str, tuple[int, ...]]:
    """The shapes of what a run of `sites` trains, by their names in the adapter's file."""
    parameters = {f"{PREFIX}{site.module}{SUFFIX}": delta(model, site) for site in sites}
    parameters |= {name.replace(SAVED_WHOLE, "."): values for name, values in parameters_saved_whole(model).items()}
    return {name: whole_shape(values) for name, values in parameters.items()}


@contextmanager
def deltas_as_state_dict(model: PeftModel) -> Iterator[None]:
    """Leaves nothing but what is trained in the model's `state_dict()`.

    DeepSpeed excludes frozen parameters from its checkpoints by their first name: the second name of tied embeddings
    stays in, and so do the statistics of quantised layers.
    """

    def keep_only_deltas(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name in [name for name in state_dict if ".beft_bias." not in name and SAVED_WHOLE not in name]:
            del state_dict[name]

    handle = model.register_state_dict_post_hook(keep_only_deltas)
    try:
        yield
    finally:
        handle.remove()


def native_biases(model: PeftModel, sites: Sequence[BiasSite]) -> dict[BiasSite, Any]:
    """The projections' own biases, `None` if there is none; shapes and gathering as in `gather_deltas`."""
    biases: dict[BiasSite, Any] = {site: projection(model, site.module).bias for site in sites}
    with _gathered(list({id(bias): bias for bias in biases.values() if bias is not None}.values())):
        return {
            site: None if bias is None else bias.detach().flatten().float().cpu()[site.rows]
            for site, bias in biases.items()
        }


def whole_biases(model: PeftModel, sites: Sequence[BiasSite]) -> dict[str, Tensor]:
    """What the projections of `sites` add in all, their own bias and the delta, by the path of the projection.

    Shape (out_features,), summed in fp32, on the CPU and in the dtype of the bias. A collective under ZeRO.
    """
    deltas = _gather_vectors(model, sites)
    biases = {path: projection(model, path).bias for path in deltas}
    with _gathered(list(biases.values())):
        return {
            path: (bias.detach().float().cpu() + deltas[path].flatten()).to(bias.dtype)
            for path, bias in biases.items()
        }


def gather_saved_whole(model: PeftModel) -> dict[str, Tensor]:
    """Full fp32 copies on the CPU of [`parameters_saved_whole`], by name. A collective under ZeRO."""
    parameters = parameters_saved_whole(model)
    return dict(zip(parameters, _fp32_values(list(parameters.values())), strict=True))


def restore_saved_whole(model: PeftModel, values: dict[str, Tensor]) -> None:
    """Puts the values of [`gather_saved_whole`] back, in place. A collective under ZeRO-3."""
    parameters = parameters_saved_whole(model)
    with torch.no_grad(), _gathered(list(parameters.values()), modifier_rank=0):
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def set_deltas(model: PeftModel, values: Mapping[BiasSite, Tensor | None]) -> None:
    """Puts the deltas to the values of [`gather_deltas`], or to zero for `None`. A collective under ZeRO-3."""
    parameters = {site.module: delta(model, site) for site in values}
    with torch.no_grad(), _gathered(list(parameters.values()), modifier_rank=0):
        for parameter in parameters.values():
            parameter.zero_()
        for site, rows in values.items():
            if rows is not None:
                target = parameters[site.module]
                target[0, site.rows.to(target.device)] = rows.to(target)


@contextmanager
def all_at_zero(deltas: Deltas) -> Iterator[None]:
    """Inside, every candidate has a delta, of zero; after it, those that had one before have their values again."""
    kept, values = deltas.sites, gather_deltas(deltas.model, deltas.sites)
    deltas.keep(deltas.candidates)
    set_deltas(deltas.model, dict.fromkeys(deltas.candidates))
    try:
        yield
    finally:
        deltas.keep(kept)
        set_deltas(deltas.model, values)


def check_moved(deltas: dict[BiasSite, Tensor], saved_whole: dict[str, Tensor] | None = None) -> None:
    """Raises RuntimeError if a delta, or a change of what is saved whole, is zero after training or not finite."""
    _check_moved("bias deltas", [(f"{site.term} of layer {site.layer}", values) for site, values in deltas.items()])
    _check_moved("parameters of modules trained whole", list((saved_whole or {}).items()))


def _check_moved(what: str, changes: list[tuple[str, Tensor]]) -> None:
    still = [where for where, change in changes if not change.any()]
    if still:
        raise RuntimeError(
            f"{len(still)} of {len(changes)} {what} did not move in training ({_first(still)}): the run trained "
            "nothing there. Check that learning_rate is above zero, that the run has at least one step, and that "
            "these layers take part in the forward pass."
        )
    broken = [where for where, change in changes if not change.isfinite().all()]
    if broken:
        raise RuntimeError(
            f"{len(broken)} of {len(changes)} {what} are not finite after training ({_first(broken)}). Lower "
            "learning_rate and resume from the last checkpoint."
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if names[4:] else "")


def _gather_vectors(model: PeftModel, sites: Sequence[BiasSite]) -> dict[str, Tensor]:
    parameters = {site.module: delta(model, site) for site in sites}
    return dict(zip(parameters, _fp32_values(list(parameters.values())), strict=True))


def _fp32_values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Full copies on the CPU, of the optimizer's fp32 master copies where DeepSpeed keeps the parameter in 16 bits."""
    held = [has_fp32_copy(parameter) for parameter in parameters]
    if held and all(held):
        from deepspeed.utils import safe_get_full_fp32_param

        return [safe_get_full_fp32_param(parameter).detach().float().cpu().clone() for parameter in parameters]
    with _gathered(parameters):
        return [parameter.detach().float().cpu().clone() for parameter in parameters]


def _gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None = None):
    if not any(is_split(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
