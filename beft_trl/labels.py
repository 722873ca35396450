"""Which tokens of a dataset a run learns from: refuses data that teach nothing, and shows what is supervised."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl.data_utils import is_conversational


logger = get_logger(__name__)

IGNORED = -100  # the label of a token that the loss passes over
REMEDY = "Check prompt and completion, completion_only_loss and assistant_only_loss, or raise max_length."
SHOWN_ROWS = 2


def check_columns(dataset: Any, args: Any, formatting_func: Callable | None = None) -> None:
    """Raises ValueError for a dataset without rows, or with columns that TRL would not understand."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # TRL says which types it takes
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            "train_dataset is empty: there is nothing to score or train on. Check the file and the split."
        )
    dataset_kwargs: Any = args.dataset_kwargs or {}
    skips = dataset_kwargs.get("skip_prepare_dataset", False)
    if formatting_func is not None or skips or "image" in row or "images" in row:
        return
    explained = (
        "input_ids" in row
        or args.dataset_text_field in row
        or {"prompt", "completion"} <= set(row)
        or "conversations" in row
        or ("messages" in row and is_conversational(row))
    )
    if not explained:
        raise ValueError(
            f"The columns of train_dataset explain no format: found {', '.join(row)}. Needed: "
            f"'{args.dataset_text_field}' (plain text), 'messages' (conversations), 'prompt' and 'completion', "
            "'input_ids' (tokenized), or a formatting_func."
        )


def drop_masked(prepared: Dataset, given: Dataset, name: str, max_length: int | None, packing: bool) -> Dataset:
    """The rows that have a token to learn from.

    Args:
        prepared: what TRL made of the rows: tokenized, truncated or packed, with labels.
        given: the rows before.
        name: of the dataset, for messages.
        max_length: what TRL truncated to.
        packing: whether `prepared` is packed, so that its rows are not those of `given`.

    Raises:
        ValueError: where there are none.
    """
    rows = prepared if packing else given
    # TRL itself drops such rows only where it truncates.
    prepared = prepared.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    dropped = len(rows) - len(prepared)
    if not len(prepared):
        raise ValueError(
            f"None of the {len(rows)} rows of the {name} dataset has a token to learn from within "
            f"max_length={max_length}: all their labels are masked. {REMEDY}"
        )
    if dropped:
        logger.warning(
            f"Dropped {dropped} of {len(rows)} rows of the {name} dataset, whose labels are all masked "
            f"within max_length={max_length}. {REMEDY}"
        )
    return prepared


@dataclass
class LabelAudit:
    """What a run learns from.

    Attributes:
        rows: number of rows given.
        unsupervised: rows without a token to learn from within `max_length`, which are left out.
        truncated: rows longer than `max_length`.
        longest: tokens of the longest sequence of a batch.
        tokens_per_step: mean number of real tokens of an optimizer step, over all processes.
        supervised_share: share of the real tokens that the loss counts.
        shown: the first rows, each as pieces of text with whether the loss counts them.
    """

    rows: int
    unsupervised: int
    truncated: int
    longest: int
    tokens_per_step: float
    supervised_share: float
    shown: list[list[tuple[str, bool]]] = field(default_factory=list)


def audit_labels(
    given: Dataset,
    prepared: Dataset,
    whole: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    processes: int,
) -> LabelAudit:
    """Counts what is supervised, truncated and left out, and shows the first rows.

    Args:
        given: the rows of the user.
        prepared: what the trainer trains on.
        whole: the given rows tokenized with labels, neither truncated nor packed, see [`untruncated`].
        tokenizer: to show rows as text.
        args: with batch sizes and `max_length`.
        processes: number of processes of the run.
    """
    limit: int = getattr(args, "max_length", None) or max(map(len, whole["input_ids"]))
    start = slice(-limit, None) if getattr(args, "truncation_mode", "") == "keep_end" else slice(limit)
    lengths = [len(tokens) for tokens in prepared["input_ids"]]
    supervised = sum(label != IGNORED for labels in prepared["labels"] for label in labels)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return LabelAudit(
        rows=len(given),
        unsupervised=sum(all(label == IGNORED for label in labels[start]) for labels in whole["labels"]),
        truncated=sum(len(tokens) > limit for tokens in whole["input_ids"]),
        longest=max(lengths),
        tokens_per_step=min(sequences, len(prepared)) * sum(lengths) / len(lengths),
        supervised_share=supervised / sum(lengths),
        shown=[
            _pieces(row["input_ids"], row["labels"], tokenizer)
            for row in prepared.select(range(min(SHOWN_ROWS, len(prepared))))
        ],
    )


def untruncated(args: Any) -> Any:
    """`args` for a preparation that leaves every row whole."""
    whole = copy.copy(args)
    whole.max_length, whole.packing = None, False
    return whole


def _pieces(tokens: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(tokens, labels, strict=True):
        if not pieces or pieces[-1][1] != (label != IGNORED):
            pieces.append(([], label != IGNORED))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(part)), counted) for part, counted in pieces]
