"""Development rows, taken from the training rows so that every class is in both parts."""

import random
from collections.abc import Hashable, Sequence
from typing import NamedTuple


HELD_OUT_PARTS = 4  # a quarter of the rows, if there are no folds


class Fold(NamedTuple):
    """Numbers of the rows to learn from and of those to judge by, in rising order."""

    train: list[int]
    development: list[int]


def split_rows(
    classes: Sequence[Hashable], folds: int | None, seed: int, rows: Sequence[Hashable] | None = None
) -> list[Fold]:
    """Splits rows into those to learn from and those to judge by.

    Args:
        classes (`Sequence`): what each row is an example of. Values that come once are spread as they come.
        folds (`int`, *optional*): so many splits, in which each row is judged by once. Default: one, with a quarter
            of the rows to judge by.
        seed (`int`): of the order within a class.
        rows (`Sequence`, *optional*): what tells the rows apart. Equal ones are in the same part: nothing is judged by
            what was learnt. Default: no two are equal.

    Raises:
        ValueError: for fewer than two folds, or rows that are too few for them.
    """
    parts = HELD_OUT_PARTS if folds is None else folds
    if parts < 2:
        raise ValueError(f"folds={folds!r} leaves nothing to judge by: give at least 2, or leave it out.")
    first: dict[Hashable, int] = {}  # of equal rows
    for number, row in enumerate(range(len(classes)) if rows is None else rows):
        first.setdefault(row, number)
    order = list(first.values())
    if len(order) < 2 * parts:
        equal = f" that differ, of {len(classes)}," if len(order) < len(classes) else ""
        raise ValueError(
            f"{len(order)} rows{equal} are too few for {parts} parts of two or more: give more rows"
            + (", or fewer folds." if folds else ", or take the default settings with beft train.")
        )
    random.Random(seed).shuffle(order)
    first_of: dict[Hashable, int] = {}
    for number in order:
        first_of.setdefault(classes[number], len(first_of))
    order.sort(key=lambda number: first_of[classes[number]])  # stable: shuffled within a class
    part_of = {number: place % parts for place, number in enumerate(order)}
    if rows is not None:
        part_of = {number: part_of[first[row]] for number, row in enumerate(rows)}
    numbers = range(len(classes))
    splits = [
        Fold([each for each in numbers if part_of[each] != part], [each for each in numbers if part_of[each] == part])
        for part in range(parts)
    ]
    return splits if folds is not None else splits[:1]
