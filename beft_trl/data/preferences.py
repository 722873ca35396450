"""The rows of preference, reward and reinforcement learning: their columns, labels, and pairs that differ."""

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from .rows import TOGETHER, check_cells


logger = get_logger(__name__)


def check_preferences(rows: Any, name: str, formats: Sequence[Sequence[str]]) -> Any:
    """Refuses a dataset without rows, without the columns of any of `formats`, or with a cell that is no text.

    Args:
        rows: a `Dataset` or `IterableDataset`; of others TRL says which it takes.
        name (`str`): of the rows, for messages.
        formats (`Sequence[Sequence[str]]`): the columns of each format that the trainer takes.

    Returns:
        The rows; those of a stream are looked at as they come.

    Raises:
        ValueError: with the columns, or the row and the cell.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{name} is empty: there is nothing to learn from or evaluate. Check the file and the split.")
    found = next((columns for columns in formats if set(columns) <= set(first)), None)
    if found is None:
        needed = ", or ".join(" and ".join(map(repr, columns)) for columns in formats)
        raise ValueError(
            f"The columns of {name} are no format of this trainer: found {', '.join(first)}. Needed: {needed}."
        )
    # An empty answer can be the worse one, or be punished.
    texts = [column for column in TOGETHER if column == "prompt" or column in found]
    return check_cells(rows, name, texts, blank_is_text=True)


def check_marks(rows: Any, name: str) -> None:
    """Refuses a `label` that does not say whether an answer is desired, and warns if all of them say the same.

    Raises:
        ValueError: with the row and its label.
    """
    if not isinstance(rows, Dataset) or "label" not in rows.column_names:
        return
    seen = set()
    for number, label in enumerate(rows["label"], 1):
        if not isinstance(label, (bool, int, float)) or label not in (0, 1):
            raise ValueError(
                f"Row {number} of {name}: 'label' is {label!r:.60}, and must be true (a desired answer) or false. "
                "Complete the row, or take it out."
            )
        seen.add(bool(label))
    if len(seen) == 1:
        missing = "undesired" if seen == {True} else "desired"
        logger.warning(
            f"All {len(rows)} rows of {name} have label={seen.pop()}: there is no {missing} answer to tell them from. "
            "Add some."
        )


def check_pairs(rows: Any, name: str) -> None:
    """Refuses rows whose chosen and rejected answers are the same, and warns of some.

    Raises:
        ValueError: if no pair differs.
    """
    if not isinstance(rows, Dataset) or not {"chosen", "rejected"} <= set(rows.column_names):
        return
    equal = sum(
        chosen == rejected
        for batch in rows.select_columns(["chosen", "rejected"]).iter(1000)
        for chosen, rejected in zip(batch["chosen"], batch["rejected"], strict=True)
    )
    if equal == len(rows):
        raise ValueError(
            f"'chosen' and 'rejected' are the same in every row of {name}, so that none is preferred: mend the rows."
        )
    if equal:
        logger.warning(
            f"{equal} of {len(rows)} rows of {name} have the same answer as chosen and rejected, and teach nothing."
        )
