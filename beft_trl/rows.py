"""The rows that a run is given: in a format of TRL's, with text in every cell that is learnt, and no turn lost."""

import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import jinja2
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational


logger = get_logger(__name__)

# ShareGPT's names of roles, and others that are common, by the name that chat templates know.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_response": "tool", "observation": "tool",
}  # fmt: skip
TURNS = ("messages", "conversations", "prompt", "completion")
LOOKED_AT = 64  # rows whose rendered text is searched for their turns


def check_columns(dataset: Any, args: Any, formatting_func: Callable | None = None) -> None:
    """Refuses a dataset without rows, or with columns that TRL would not understand.

    Args:
        dataset: the training rows.
        args (`SFTConfig`): with the names of columns.
        formatting_func (`Callable`, *optional*): makes text of a row, whatever its columns.

    Raises:
        ValueError: with the columns that were found, and those that are needed.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return  # TRL says which types it takes
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            "train_dataset is empty: there is nothing to score or train on. Check the file and the split."
        )
    skips = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if formatting_func is not None or skips or "image" in row or "images" in row:
        return
    explained = (
        "input_ids" in row
        or args.dataset_text_field in row
        or {"prompt", "completion"} <= set(row)
        or "conversations" in row
        or isinstance(row.get("messages"), list)
    )
    if not explained:
        raise ValueError(
            f"The columns of train_dataset explain no format: found {', '.join(row)}. Needed: "
            f"'{args.dataset_text_field}' (plain text), 'messages' (conversations), 'prompt' and 'completion', "
            "'input_ids' (tokenized), or a formatting_func."
        )


def check_cells(dataset: Any, name: str, text_field: str = "text") -> None:
    """Refuses rows with a cell that is learnt and is missing, blank or no text, of whatever format of TRL's.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows. Of a stream only the first is looked at.
        name (`str`): of the rows, for messages.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text.

    Raises:
        ValueError: with the row, the column and what is in it.
    """
    if isinstance(dataset, IterableDataset):
        rows: Any = islice(dataset, 1)
        columns = list(next(iter(dataset), {}))
    elif isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        rows, columns = dataset, dataset.column_names
    else:
        return
    if "input_ids" in columns or "image" in columns or "images" in columns:
        return
    learnt = [column for column in (text_field, *TURNS) if column in columns]
    plain = [column for column in learnt if isinstance(rows, Dataset) and _is_text(rows.features[column])]
    for column in plain:
        offset = 0
        for batch in rows.select_columns([column]).with_format("arrow").iter(10_000):
            cells = batch[column]
            blank = pc.equal(pc.utf8_trim_whitespace(cells), "")
            # An empty prompt is a prompt; an empty completion would be learnt as an end.
            wrong = pc.is_null(cells) if column == "prompt" else pc.or_kleene(pc.is_null(cells), blank)
            found = pc.index(wrong, True).as_py()
            if found >= 0:
                _refuse_cell(name, offset + found, column, cells[found].as_py())
            offset += len(batch)
    others = [column for column in learnt if column not in plain]
    if others:
        picked = rows.select_columns(others) if isinstance(rows, Dataset) else rows
        for number, row in enumerate(picked):
            for column in others:
                _check_cell(row.get(column), name, number, column)


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _refuse_cell(name: str, row: int, column: str, value: Any) -> None:
    found = "missing" if value is None else "empty" if value == "" or value == [] else f"{value!r:.60}"
    raise ValueError(
        f"Row {row + 1} of {name}: {column!r} is {found}, and must be text or turns of a conversation, such as "
        '[{"role": "user", "content": "..."}]. Complete the row, or take it out.'
    )


def _check_cell(value: Any, name: str, row: int, column: str) -> None:
    if isinstance(value, str):
        if not value.strip() and column != "prompt":
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
        called = isinstance(turn, dict) and turn.get("tool_calls")
        if not isinstance(role, str) or not (isinstance(content, (str, list)) or called):
            raise ValueError(
                f"Row {row + 1} of {name}: turn {number} of {column!r} is {turn!r:.80}, and must have a role and "
                'content, such as {"role": "user", "content": "..."}. Complete the row, or take it out.'
            )


def prepare_rows(dataset: Any, text_field: str = "text") -> Any:
    """Rows in which TRL loses nothing: roles by the names that templates know, and one format only.

    TRL (1.16) keeps ShareGPT's roles "human" and "gpt", which templates pass over, and adds the end of the sequence
    to a text column that it then does not learn.

    Args:
        dataset: the rows; anything but a `Dataset` or `IterableDataset` is returned as it is.
        text_field (`str`, *optional*, defaults to `"text"`): the column of plain text.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    row = next(iter(dataset), None) or {}
    if "input_ids" in row:
        return dataset
    if {"prompt", "completion", text_field} <= set(row):
        logger.warning(f"The column {text_field!r} is left out, since the rows have prompt and completion.")
        dataset = dataset.remove_columns(text_field)
    renamed = [name for name in TURNS if isinstance(row.get(name), list)]
    if renamed and any(_other_roles(row[name]) for name in renamed):
        dataset = dataset.map(_rename_roles, fn_kwargs={"columns": renamed})
    return dataset


def _other_roles(turns: list) -> bool:
    return any(isinstance(turn, dict) and ("from" in turn or turn.get("role") in ROLES) for turn in turns)


def _rename_roles(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    for column in columns:
        for turn in row[column]:
            key = "from" if "from" in turn else "role"
            turn[key] = ROLES.get(turn[key], turn[key])
    return row


def check_template(dataset: Any, name: str, tokenizer: Any, template: str | None = None) -> None:
    """Refuses conversations that the chat template cannot render, or whose turns of some role it passes over.

    Args:
        dataset (`Dataset` or `IterableDataset`): the rows.
        name (`str`): of the rows, for messages.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        template (`str`, *optional*): in its place.

    Raises:
        ValueError: with the row, or the role.
    """
    seen: dict[str, bool] = {}
    for number, row in enumerate(islice(dataset, LOOKED_AT)):
        if not is_conversational(row) and "conversations" not in row:
            return
        turns = [turn for column in TURNS if isinstance(row.get(column), list) for turn in row[column]]
        turns = [
            {("role" if key == "from" else "content" if key == "value" else key): turn[key] for key in turn}
            for turn in turns
        ]
        try:
            text = tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                chat_template=template,
                tools=_tools(row),
                **(row.get("chat_template_kwargs") or {}),
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"Row {number + 1} of {name}: the chat template cannot render it ({error}). Look at its roles and "
                "their order, or set chat_template_path to a template that knows them."
            ) from error
        for turn in turns:
            if isinstance(turn.get("content"), str) and turn["content"].strip():
                seen[turn["role"]] = seen.get(turn["role"], False) or turn["content"].strip() in text
    lost = [role for role, found in seen.items() if not found]
    if lost:
        raise ValueError(
            f"The chat template passes over the turns of the role {lost[0]!r} in {name}: none of them is in the text "
            "that would be learnt. Use the roles that the template knows, such as user and assistant, or set "
            "chat_template_path to a template that knows these."
        )


def _tools(row: dict[str, Any]) -> Any:
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools
