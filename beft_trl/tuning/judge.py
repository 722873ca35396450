"""Whether the winner of a search is ahead of the default by more than chance."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..evaluation import RowLoss, mean_loss


CHANCE = 0.05  # of putting a winner in the default's place that is no better, in one search
DRAWS = 1_000_000  # of Student's t, whose quantile NumPy does not have


class Verdict(NamedTuple):
    """The default next to the winner.

    Attributes:
        difference: by how much the winner's loss is lower, in nats per token.
        error: standard error of that difference, in nats per token.
        factor: how many standard errors chance is allowed, of rows or of folds: those that allow it more.
        ahead: whether the difference is larger than `factor` standard errors.
    """

    difference: float
    error: float
    factor: float
    ahead: bool


def all_rows(folds: Sequence[Sequence[RowLoss]]) -> list[RowLoss]:
    """The rows of all folds."""
    return [row for fold in folds for row in fold]


def compare(default: Sequence[Sequence[RowLoss]], winner: Sequence[Sequence[RowLoss]], candidates: int = 1) -> Verdict:
    """Compares the losses of two trials on the same rows, the second being the best of several.

    The test is that of paired differences, at a level that is divided by the number of candidates (Bonferroni), so
    that chance puts one of them in the default's place in at most one search of twenty. Rows of a fold are judged by
    the same model and can be wrong together. So with folds the difference of the folds' means has to pass, too, by
    Student's t of as few numbers as there are folds.

    Args:
        default (`Sequence`): rows of each fold, as the default judges them. Two rows or more.
        winner (`Sequence`): the same rows, as the winner does.
        candidates (`int`, *optional*, defaults to 1): of which the winner has the lowest loss, without the default.
    """
    difference = mean_loss(all_rows(default)) - mean_loss(all_rows(winner))
    pairs = list(zip(all_rows(default), all_rows(winner), strict=True))
    tokens = np.array([row.tokens for row, _ in pairs])
    # A mean over tokens is a ratio of two sums over rows: what a row adds to it beyond its tokens' share.
    added = np.array([one.nll - other.nll for one, other in pairs]) - difference * tokens
    allowed = [(float(np.std(added, ddof=1) * len(pairs) ** 0.5 / tokens.sum()), len(pairs))]
    if len(default) > 1:
        of_folds = [mean_loss(one) - mean_loss(other) for one, other in zip(default, winner, strict=True)]
        allowed.append((float(np.std(of_folds, ddof=1) / len(of_folds) ** 0.5), len(of_folds)))
    chance = CHANCE / candidates
    error, factor = max(((each, _student(count - 1, chance)) for each, count in allowed), key=math.prod)
    return Verdict(difference, error, factor, difference > factor * error)


@lru_cache
def _student(degrees: int, chance: float) -> float:
    """What Student's t is above with this chance."""
    return float(np.quantile(np.random.default_rng(0).standard_t(degrees, DRAWS), 1 - chance))
