"""The learning rate of each layer's bias, as a share of what its projection gives."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from torch import nn
from torch.optim import Optimizer

from .layout import BiasSite


def relative_learning_rates(
    share: float, sizes: Mapping[BiasSite, float], sites: Sequence[BiasSite]
) -> dict[str, float]:
    """The learning rate of each module: `share` times the root mean square of its outputs.

    Args:
        share (`float`): `relative_learning_rate`.
        sizes (`dict[BiasSite, float]`): root mean squares of the outputs, over tokens and the rows of each site.
        sites (`Sequence[BiasSite]`): what is trained. The terms of a fused projection share its rate.
    """
    squares: dict[str, list[tuple[float, int]]] = {}
    for site in sites:
        squares.setdefault(site.module, []).append((sizes[site] ** 2 * len(site.rows), len(site.rows)))
    sums = {path: [sum(column) for column in zip(*parts, strict=True)] for path, parts in squares.items()}
    return {path: share * math.sqrt(square / count) for path, (square, count) in sums.items()}


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


def logged_learning_rates(scheduled: float, first: float, rates: Mapping[str, float]) -> dict[str, float]:
    """What is logged of the layers' `rates`, the middle one and the ends. The schedule scales all alike: it made
    `scheduled` of the rate of the optimizer's first group, which was `first`.
    """
    scale = scheduled / first
    scaled = [rate * scale for rate in rates.values()]
    return {"learning_rate": median(scaled), "learning_rate_min": min(scaled), "learning_rate_max": max(scaled)}
