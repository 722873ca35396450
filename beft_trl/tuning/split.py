"""Development rows, taken from the training rows so that every class is in both parts."""

import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple


HELD_OUT_PARTS = 4  # a quarter of the rows, if there are no folds


class Fold(NamedTuple):
    """Numbers of the rows to learn from and of those to judge by, in rising order."""

    train: list[int]
    development: list[int]


def split_rows(classes: Sequence[Hashable], folds: int | None, seed: int) -> list[Fold]:
    """Splits rows into those to learn from and those to judge by.

    Args:
        classes (`Sequence`): what each row is an example of. Values that come once are spread as they come.
        folds (`int`, *optional*): so many splits, in which each row is judged by once. Default: one, with a quarter
            of the rows to judge by.
        seed (`int`): of the order within a class.

    Raises:
        ValueError: for fewer than two folds, or rows that are too few for them.
    """
    parts = HELD_OUT_PARTS if folds is None else folds
    if parts < 2:
        raise ValueError(f"folds={folds!r} leaves nothing to judge by: give at least 2, or leave it out.")
    if len(classes) < 2 * parts:
        raise ValueError(
            f"{len(classes)} rows are too few for {parts} parts of two or more: give more rows"
            + (", or fewer folds." if folds else ", or take the default settings with beft train.")
        )
    order = list(range(len(classes)))
    random.Random(seed).shuffle(order)
    first_of: dict[Hashable, int] = {}
    for number in order:
        first_of.setdefault(classes[number], len(first_of))
    order.sort(key=lambda number: first_of[classes[number]])  # stable: shuffled within a class
    part_of = {number: place % parts for place, number in enumerate(order)}
    numbers = range(len(classes))
    splits = [
        Fold([each for each in numbers if part_of[each] != part], [each for each in numbers if part_of[each] == part])
        for part in range(parts)
    ]
    return splits if folds is not None else splits[:1]
