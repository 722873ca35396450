"""The rows that a run is given: in a format of TRL's, with text in every cell that is learnt, and no turn lost."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import jinja2
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational

from .labels import holds_tokens


logger = get_logger(__name__)

# ShareGPT's names of roles, and others that are common, by the name that chat templates know.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_response": "tool", "observation": "tool",
}  # fmt: skip
CONVERSATIONS = ("messages", "conversations")
TURNS = (*CONVERSATIONS, "prompt", "completion")
TOGETHER = ("prompt", "completion", "chosen", "rejected")  # all text or all turns
NAMES = {"from": "role", "value": "content"}  # of ShareGPT
WITHOUT_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # what a turn may have in its place
TEXT = ("string", "large_string")
TOKENIZED = ("input_ids", "labels", "completion_mask", "assistant_masks")
RENDERED = ("tools", "chat_template_kwargs")  # columns that a template sees next to the turns
LOOKED_AT = 64  # conversations in which a trace of a role is looked for
# Columns that others read as a part of the prompt, and TRL does not.
UNREAD = ("system", "system_prompt", "history", "question", "instruction", "query", "input", "context")
OTHER = "another text"
# What templates raise, and what happens in them.
UNRENDERED = (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError, AttributeError, ZeroDivisionError)


def check_columns(
    dataset: Any, args: Any, formatting_func: Callable | None = None, name: str = "train_dataset"
) -> None:
    """Refuses a dataset without rows, or with columns that TRL would not understand.

    Args:
        dataset: the rows.
        args (`SFTConfig`): with the names of columns.
        formatting_func (`Callable`, *optional*): makes text of a row, whatever its columns.
        name (`str`, *optional*, defaults to `"train_dataset"`): of the rows, for messages.

    Raises:
        ValueError: with the columns that were found, and those that are needed.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # TRL says which types it takes
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"{name} is empty: there is nothing to {'score or train on' if name == 'train_dataset' else 'evaluate'}. "
            "Check the file and the split."
        )
    skips = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if formatting_func is not None or skips or "image" in row or "images" in row:
        return
    explained = "input_ids" in row or {"prompt", "completion"} <= set(row)
    if "prompt" not in row:  # TRL would look for its completion
        turns = any(isinstance(row.get(name), list) for name in ("messages", "conversations"))
        explained = explained or turns or args.dataset_text_field in row
    if not explained:
        raise ValueError(
            f"The columns of {name} explain no format: found {', '.join(row)}. Needed: "
            f"'{args.dataset_text_field}' (plain text), 'messages' or 'conversations' (lists of turns), 'prompt' and "
            "'completion', 'input_ids' (tokenized), or a formatting_func."
        )


def check_cells(
    dataset: Any, name: str, columns: Sequence[str] = ("text", *TURNS), blank_is_text: bool = False
) -> Any:
    """Refuses rows with a cell that is learnt and is missing, blank or no text, of whatever format of TRL's.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows.
        name (`str`): of the rows, for messages.
        columns (`Sequence[str]`, *optional*): with text or turns, of which rows have some.
        blank_is_text (`bool`, *optional*, defaults to `False`): whether an answer may be empty.

    Returns:
        The rows; those of a stream are looked at as they come, after the first.

    Raises:
        ValueError: with the row, the column and what is in it.
    """
    stream = isinstance(dataset, IterableDataset)
    if not stream and (not isinstance(dataset, Dataset) or dataset.format["type"] == "custom"):
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    if "image" in first or "images" in first:
        return dataset
    if "input_ids" in first:
        _check_tokenized(dataset, list(first), name)
        return dataset
    learnt = [column for column in columns if column in first]
    if stream:
        options: dict[str, Any] = {"name": name, "columns": learnt, "blank_is_text": blank_is_text}
        _check_row(first, 0, **options)
        return dataset.map(_check_row, with_indices=True, fn_kwargs=options, features=dataset.features)
    plain = [column for column in learnt if getattr(dataset.features[column], "dtype", None) in TEXT]
    for column in plain:
        offset = 0
        for batch in dataset.select_columns([column]).with_format("arrow").iter(10_000):
            cells = batch[column]
            blank = pc.equal(pc.utf8_trim_whitespace(cells), "")
            # An empty prompt is a prompt; an empty completion would be learnt as an end.
            allowed = blank_is_text or column == "prompt"
            wrong = pc.is_null(cells) if allowed else pc.or_kleene(pc.is_null(cells), blank)
            found = pc.index(wrong, True).as_py()
            if found >= 0:
                _refuse_cell(name, offset + found, column, cells[found].as_py())
            offset += len(batch)
    others = [column for column in learnt if column not in plain]
    for number, row in enumerate(dataset.select_columns(others) if others else ()):
        _check_row(row, number, name, others, blank_is_text)
    _check_pair(first, 0, name, columns)
    return dataset


def _check_row(row: dict[str, Any], number: int, name: str, columns: list[str], blank_is_text: bool) -> dict[str, Any]:
    for column in columns:
        _check_cell(row.get(column), name, number, column, blank_is_text)
    _check_pair(row, number, name, columns)
    return row


def _check_pair(row: dict[str, Any], number: int, name: str, columns: Sequence[str]) -> None:
    together = [column for column in TOGETHER if column in row and column in columns]
    kinds = {column: "turns" if isinstance(row[column], list) else "text" for column in together}
    if len(set(kinds.values())) > 1:
        found = [f"{column!r} is {kind}" for column, kind in kinds.items()]
        raise ValueError(
            f"Row {number + 1} of {name}: {', '.join(found[:-1])} and {found[-1]}. Give all as text, or all as turns "
            "of a conversation."
        )


def check_masks(dataset: Any, args: Any, name: str) -> None:
    """Refuses tokenized rows with masks that TRL (1.16) would pass over.

    Args:
        dataset: the rows; those of a stream are not looked at, but for the first.
        args (`SFTConfig`): with `completion_only_loss`.
        name (`str`): of the rows, for messages.

    Raises:
        ValueError: for a `completion_mask` without `completion_only_loss`, and for padding that would be taken for
            tokens: at the end and without labels it does no harm.
    """
    first: dict[str, Any] = next(iter(dataset), {}) if isinstance(dataset, (Dataset, IterableDataset)) else {}
    if "input_ids" not in first:
        return
    if "completion_mask" in first and "labels" not in first and args.completion_only_loss is None:
        raise ValueError(
            f"{name} has 'completion_mask', which is passed over in tokenized rows unless it is asked for: set "
            "completion_only_loss=True, or False to learn the prompts too."
        )
    if "attention_mask" not in first:
        return
    rows = dataset if isinstance(dataset, Dataset) else [first]
    number = next((number for number, row in enumerate(rows, 1) if _padding_counts(row)), None)
    if number is not None:
        raise ValueError(
            f"Row {number} of {name} has padding by its 'attention_mask', which is not read: the padding would be "
            "taken for tokens. Leave it out of the rows, batches are padded later."
        )


def _padding_counts(row: dict[str, Any]) -> bool:
    """Whether tokens that the row's mask takes for padding would be learnt, or seen by a token after them."""
    mask = list(row["attention_mask"])
    length = mask.index(0) if 0 in mask else len(mask)
    labels = row.get("labels", row["input_ids"])
    return any(mask[length:]) or any(label != -100 for label in labels[length:])


def _check_tokenized(rows: Any, columns: list[str], name: str) -> None:
    """Refuses token ids, labels and masks that are not one whole number for each token."""
    columns = [column for column in TOKENIZED if column in columns]
    if not isinstance(rows, Dataset):
        rows = Dataset.from_list([{column: row[column] for column in columns} for row in islice(rows, 1)])
    for column in columns:
        if not holds_tokens(rows, column):
            row = next((cells for cells in rows[column] if cells), None)
            raise ValueError(f"{column!r} of {name} is {row!r:.60}, and must be a list of whole numbers in each row.")
    offset = 0
    for batch in rows.select_columns(columns).with_format("arrow").iter(10_000):
        tokens, *others = (pc.list_value_length(batch[column]) for column in columns)
        for column, lengths in zip(columns[1:], others, strict=True):
            found = pc.index(pc.fill_null(pc.equal(tokens, lengths), False), False).as_py()
            if found >= 0:
                raise ValueError(
                    f"Row {offset + found + 1} of {name} has {tokens[found]} tokens in 'input_ids' and "
                    f"{lengths[found].as_py() or 'no'} numbers in {column!r}. Each token needs one."
                )
        offset += len(batch)


def _refuse_cell(name: str, row: int, column: str, value: Any) -> None:
    found = "missing" if value is None else "empty" if value == "" or value == [] else f"{value!r:.60}"
    raise ValueError(
        f"Row {row + 1} of {name}: {column!r} is {found}, and must be text or turns of a conversation, such as "
        '[{"role": "user", "content": "..."}]. Complete the row, or take it out.'
    )


def _check_cell(value: Any, name: str, row: int, column: str, blank_is_text: bool) -> None:
    if isinstance(value, str):
        if not value.strip() and column != "prompt" and not blank_is_text:
            _refuse_cell(name, row, column, "")
        return
    if not isinstance(value, list) or not value:
        _refuse_cell(name, row, column, value)
    for number, turn in enumerate(value, 1):
        role, content = (
            (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
            if isinstance(turn, dict)
            else (None, None)
        )
        more = isinstance(turn, dict) and any(turn.get(key) for key in WITHOUT_CONTENT)
        if not isinstance(role, str) or not (isinstance(content, (str, list)) or more):
            raise ValueError(
                f"Row {row + 1} of {name}: turn {number} of {column!r} is {turn!r:.80}, and must have a role and "
                'content, such as {"role": "user", "content": "..."}. Complete the row, or take it out.'
            )
        blank = not (content.strip() if isinstance(content, str) else content)
        if blank and not more and not blank_is_text and ROLES.get(role, role) == "assistant":
            raise ValueError(
                f"Row {row + 1} of {name}: turn {number} of {column!r}, of the role {role!r}, is empty, and would be "
                "learnt as an end. Complete the row, or take it out."
            )


def warn_of_unread(dataset: Any, name: str, read: Collection[str] = ()) -> None:
    """Warns of columns that look like a part of the prompt and are not read.

    Args:
        dataset: the rows, of which the first ones are looked at, of a stream only the first one.
        name (`str`): of the rows, for the message.
        read (`Collection[str]`, *optional*): columns that are.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    rows = list(islice(dataset, LOOKED_AT if isinstance(dataset, Dataset) else 1))
    unread = [column for column in UNREAD if column not in read and any(row.get(column) for row in rows)]
    if unread:
        logger.warning(
            f"{name} has {', '.join(map(repr, unread))}, which the run does not read: the model never sees what is in "
            "it. Make it a part of the prompt or of the turns, or take the column out."
        )


def prepare_rows(dataset: Any, text_field: str = "text", num_proc: int | None = None) -> Any:
    """Rows in which TRL loses nothing: roles by the names that templates know, and one format only.

    TRL (1.16) keeps ShareGPT's roles "human" and "gpt", which templates pass over, and adds the end of the sequence
    to a text column that it then does not learn.

    Args:
        dataset: the rows; anything but a `Dataset` or `IterableDataset` is returned as it is.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text.
        num_proc (`int`, *optional*): processes, `dataset_num_proc`.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    row = next(iter(dataset), None) or {}
    if "input_ids" in row:
        return dataset
    turns = [name for name in (*CONVERSATIONS, *TOGETHER) if isinstance(row.get(name), list)]
    other = "prompt and completion" if {"prompt", "completion"} <= set(row) else "turns" if turns else None
    if text_field in row and other:
        logger.warning_once(f"The column {text_field!r} is left out, since the rows have {other}.")
        dataset = dataset.remove_columns(text_field)
    # Of each row, since a mixture has rows of many hands; those of a stream are not known yet.
    picked: Any = dataset.select_columns(turns) if turns and isinstance(dataset, Dataset) else [row]
    spoken = (turn for each in picked for name in turns for turn in each[name] or ())
    old = (turn.get("role") in ROLES or "from" in turn for turn in spoken)
    if "conversations" in turns or any(old):
        options: dict[str, Any] = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
        with PartialState().main_process_first():
            dataset = dataset.map(
                _as_messages,
                fn_kwargs={"columns": turns},
                remove_columns=["conversations"] if "conversations" in turns else None,
                **options,
            )
    return dataset


def _as_messages(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """Turns by the names of Transformers, under `messages` if they were under `conversations`."""
    changed = {}
    for column in columns:
        turns = [{NAMES.get(key, key): value for key, value in turn.items()} for turn in row[column]]
        for turn in turns:
            turn["role"] = ROLES.get(turn["role"], turn["role"])
        changed["messages" if column == "conversations" else column] = turns
    return changed


def check_roles(dataset: Any, name: str, tokenizer: Any, template: str | None = None) -> None:
    """Refuses conversations with a role whose turns the chat template passes over, each of them.

    A turn is passed over if the text stays the same whatever its content is.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows, with messages, or with prompt and completion. Of a stream
            only the first ones are looked at.
        name (`str`): of the rows, for messages.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        template (`str`, *optional*): in its place.

    Raises:
        ValueError: with the role.
    """
    seen: dict[str, int] = {}  # a role's conversations without a trace of it, 0 from the first one with a trace
    row: dict[str, Any] = next(iter(dataset), {})
    columns = [column for column in TURNS if isinstance(row.get(column), list)]
    if not columns or not is_conversational(row):
        return
    if isinstance(dataset, Dataset):
        picked: Any = dataset.select_columns([*columns, *(name for name in RENDERED if name in row)])
    else:
        picked = islice(dataset, LOOKED_AT)
    for row in picked:
        turns = [turn for column in columns for turn in row[column]]
        for role in {turn["role"] for turn in turns if turn.get("content")}:
            if 0 < seen.get(role, 1) <= LOOKED_AT:
                others = [{**turn, "content": OTHER} if turn["role"] == role else turn for turn in turns]
                try:
                    lost = render(turns, row, tokenizer, template) == render(others, row, tokenizer, template)
                except UNRENDERED:  # told of by `explain_unrendered`, or for want of the real content
                    lost = False
                seen[role] = seen.get(role, 0) + 1 if lost else 0
    passed_over = [role for role, count in seen.items() if count]
    if passed_over:
        owner = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ValueError(
            f"The chat template passes over the turns of the role {passed_over[0]!r} in {name}: none is in the text "
            f"that would be learnt. The template of {owner} must know the "
            "role: use others, such as user and assistant, or set chat_template_path."
        )


def explain_unrendered(dataset: Any, name: str, tokenizer: Any, template: str | None = None) -> None:
    """Says which row a chat template cannot render, if there is one.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows.
        name (`str`): of the rows, for messages.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        template (`str`, *optional*): in its place.

    Raises:
        ValueError: with the row and what the template says.
    """
    for number, row in enumerate(dataset, 1):
        if not is_conversational(row):
            return
        for columns in ({"messages"}, {"prompt"}, {"prompt", "completion"}):
            turns = [turn for column in TURNS if column in columns & set(row) for turn in row[column]]
            try:
                if turns:
                    render(turns, row, tokenizer, template, add_generation_prompt=columns == {"prompt"})
            except UNRENDERED as error:
                raise ValueError(
                    f"Row {number} of {name}: the chat template cannot render it ({error}). Look at its roles and "
                    "their order, or set chat_template_path to a template that takes them."
                ) from error


def render(turns: list, row: dict[str, Any], tokenizer: Any, template: str | None, **options: Any) -> str:
    """The text of a conversation, as TRL renders it."""
    options |= {"chat_template": template, **template_options(row)}
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given of a row next to its turns, as TRL gives it."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}
