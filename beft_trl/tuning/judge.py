"""Whether the winner of a search is ahead of the default by more than chance."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..evaluation import RowLoss, mean_loss


RESAMPLES = 2000


class Verdict(NamedTuple):
    """The default next to the winner.

    Attributes:
        difference: by how much the winner's loss is lower.
        spread: standard deviation of that difference, over the folds, or over development rows that are drawn again
            and again from those that there are.
        ahead: whether the difference is larger than the spread.
    """

    difference: float
    spread: float
    ahead: bool


def all_rows(folds: Sequence[Sequence[RowLoss]]) -> list[RowLoss]:
    """The rows of all folds."""
    return [row for fold in folds for row in fold]


def compare(default: Sequence[Sequence[RowLoss]], winner: Sequence[Sequence[RowLoss]], seed: int = 0) -> Verdict:
    """Compares the losses of two trials on the same rows.

    Args:
        default (`Sequence`): rows of each fold, as the default judges them.
        winner (`Sequence`): the same rows, as the winner does.
        seed (`int`, *optional*, defaults to 0): of the drawing.
    """
    difference = mean_loss(all_rows(default)) - mean_loss(all_rows(winner))
    if len(default) > 1:
        of_folds = [mean_loss(one) - mean_loss(other) for one, other in zip(default, winner, strict=True)]
        spread = float(np.std(of_folds, ddof=1))
    else:
        gains = np.array([one.nll - other.nll for one, other in zip(default[0], winner[0], strict=True)])
        tokens = np.array([row.tokens for row in default[0]])
        drawn = np.random.default_rng(seed).integers(0, len(gains), (RESAMPLES, len(gains)))
        spread = float(np.std(gains[drawn].sum(1) / tokens[drawn].sum(1)))
    return Verdict(difference, spread, difference > spread)
