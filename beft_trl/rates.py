"""The learning rate of each layer's bias, as a share of what its projection gives."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .layout import BiasSite


def relative_learning_rates(
    share: float, mean_outputs: Mapping[BiasSite, Tensor], sites: Sequence[BiasSite]
) -> dict[str, float]:
    """The learning rate of each module: `share` times the root mean square of its mean output.

    Args:
        share (`float`): `relative_learning_rate`.
        mean_outputs (`dict[BiasSite, Tensor]`): mean outputs of the projections, shape `(len(site.rows),)`.
        sites (`Sequence[BiasSite]`): what is trained. The terms of a fused projection share its rate.
    """
    outputs: dict[str, list[Tensor]] = {}
    for site in sites:
        outputs.setdefault(site.module, []).append(mean_outputs[site])
    return {path: share * torch.cat(parts).double().square().mean().sqrt().item() for path, parts in outputs.items()}


def give_learning_rates(optimizer: Optimizer, rates: Mapping[nn.Parameter, float]) -> None:
    """Puts each parameter of `rates` into a group with that learning rate, and leaves no group empty."""
    groups = []
    for group in optimizer.param_groups:
        others = [parameter for parameter in group["params"] if parameter not in rates]
        groups += [{**group, "params": others}] if others else []
        groups += [
            {**group, "params": [parameter], "lr": rates[parameter]}
            for parameter in group["params"]
            if parameter in rates
        ]
    optimizer.param_groups[:] = groups
