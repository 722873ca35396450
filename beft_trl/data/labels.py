"""Which tokens a run learns from: refuses those that teach nothing or do not exist, and shows the others."""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..compat.engines import whole_shape


logger = get_logger(__name__)

IGNORED = -100  # the label of a token that the loss passes over
REMEDY = "Check prompt and completion, completion_only_loss and assistant_only_loss, or raise max_length."
MASKED = f"all their labels are masked. {REMEDY}"
SHOWN_ROWS = 2
PARTS = ("prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")  # of preferences
# Names of position tables, or their classes, in Transformers.
POSITION_TABLE = re.compile(r"wpe\b|position\w*embedding|embed_positions", re.IGNORECASE)


def check_tokens(
    dataset: Any, name: str, vocabulary: int, positions: int | None, max_length: int | None = None
) -> None:
    """Refuses rows with tokens or labels that the model does not have, and rows beyond its positions.

    Args:
        dataset: what a trainer trains on. Anything but a `Dataset` with tokens is passed over.
        name (`str`): of the rows, for messages.
        vocabulary (`int`): rows of the model's embedding.
        positions (`int`, *optional*): rows of its position table, `None` for positions without one.
        max_length (`int`, *optional*): to which a collator cuts a prompt with its answer.

    Raises:
        ValueError: with the row and the number, if the labels of all rows are masked, or if no row is left.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    columns = [column for column in ("input_ids", "labels", *PARTS) if column in dataset.column_names]
    if columns and not len(dataset):
        raise ValueError(f"No row of the {name} dataset is left within max_length={max_length}. Raise max_length.")
    columns = [column for column in columns if holds_tokens(dataset, column)]
    if not set(columns) - {"labels"}:
        return
    learnt, offset = "labels" not in columns, 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(10_000):
        for column in columns:
            lists = batch[column]
            lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
            numbers = pc.list_flatten(lists)
            wrong = pc.or_(pc.greater_equal(numbers, vocabulary), pc.less(numbers, 0))
            if column == "labels":
                counted = pc.not_equal(numbers, IGNORED)
                wrong = pc.and_(wrong, counted)
                learnt = learnt or bool(pc.any(counted).as_py())
            found = pc.index(wrong, True).as_py()
            if found >= 0:
                row = offset + pc.list_parent_indices(lists)[found].as_py()
                raise ValueError(
                    f"Row {row + 1} of the {name} dataset has {numbers[found].as_py()} in {column}, and the model's "
                    f"embedding has the tokens 0 to {vocabulary - 1}. Use the tokenizer of this model."
                )
        longest = _longest(batch, columns, max_length)
        if positions is not None and longest > positions:
            raise ValueError(
                f"A row of the {name} dataset has {longest} tokens, and the model has {positions} positions. Set "
                f"max_length to at most {positions}."
            )
        offset += len(batch)
    if not learnt:
        raise ValueError(f"None of the {len(dataset)} rows of the {name} dataset has a token to learn from: {MASKED}")


def check_tokens_of(trainer: Any) -> None:
    """Refuses rows of a trainer, to train on and held out, with [`check_tokens`]."""
    vocabulary = whole_shape(trainer.model.get_input_embeddings().weight)[0]
    positions = position_limit(trainer.model.get_base_model())
    for name, rows in datasets_of(trainer):
        check_tokens(rows, name, vocabulary, positions, getattr(trainer.args, "max_length", None))


def datasets_of(trainer: Any) -> list[tuple[str, Any]]:
    """The datasets of a trainer that there are, to train on and held out, with their names."""
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    return [(name, rows) for name, rows in (("train", trainer.train_dataset), *held_out.items()) if rows is not None]


def _longest(batch: Any, columns: list[str], max_length: int | None) -> int:
    """Tokens of the longest sequence that the model is given: a row, or a prompt with one of its answers."""
    lengths = {column: pc.fill_null(pc.list_value_length(batch[column]), 0) for column in columns}
    prompt = lengths.pop("prompt_ids", 0)
    longest: int = max(pc.max(pc.add(prompt, answer)).as_py() or 0 for answer in lengths.values())
    return longest if max_length is None or "input_ids" in columns else min(longest, max_length)


def position_limit(model: Any) -> int | None:
    """The longest sequence of a model with a table of positions (OPT, GPT-2, BERT); `None` for one without."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(f"{name}.{type(module).__name__}"):
            # RoBERTa's first position comes after that of its padding token.
            first = module.padding_idx + 1 if module.padding_idx is not None else 0
            return limit - first if limit is not None else None
    return None


def holds_tokens(dataset: Dataset, column: str) -> bool:
    """Whether a column is there, and is a list of whole numbers in each row."""
    feature = dataset.features.get(column)
    return "int" in str(getattr(getattr(feature, "feature", None), "dtype", ""))


def drop_masked(
    prepared: Dataset,
    given: Dataset,
    name: str,
    max_length: int | None,
    packing: bool,
    num_proc: int | None = None,
) -> Dataset:
    """The rows that have a token to learn from.

    Args:
        prepared (`Dataset`): what TRL made of the rows: tokenized, truncated or packed, with labels.
        given (`Dataset`): the rows before.
        name (`str`): of the dataset, for messages.
        max_length (`int`, *optional*): what TRL truncated to.
        packing (`bool`): whether `prepared` is packed, so that its rows are not those of `given`.
        num_proc (`int`, *optional*): processes of the filter, `dataset_num_proc`.

    Raises:
        ValueError: if there are none.
    """
    rows = prepared if packing else given
    # TRL itself drops such rows only if it truncates.
    with PartialState().main_process_first():
        prepared = prepared.filter(_learnt, num_proc=num_proc)
    dropped = len(rows) - len(prepared)
    if not len(prepared):
        raise ValueError(
            f"None of the {len(rows)} rows of the {name} dataset has a token to learn from within "
            f"max_length={max_length}: {MASKED}"
        )
    if dropped:
        logger.warning(
            f"Dropped {dropped} of {len(rows)} rows of the {name} dataset, whose labels are all masked "
            f"within max_length={max_length}. {REMEDY}"
        )
    return prepared


def _learnt(row: dict[str, Any]) -> bool:
    # A token is learnt from those before it, so that the first one of a row never is.
    return any(label != IGNORED for label in row["labels"][1:])


def refuse_too_few_rows(trainer: Any) -> None:
    """Raises ValueError for prepared rows of a trainer that `dataloader_drop_last` would leave out, all of them."""
    args, rows = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < batch:
        raise ValueError(
            f"dataloader_drop_last=True leaves out all of the {len(rows)} rows of the train dataset: a batch is "
            f"{batch}. Lower per_device_train_batch_size, or leave dataloader_drop_last out."
        )


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
        unsupervised=sum(all(label == IGNORED for label in labels[start][1:]) for labels in whole["labels"]),
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
