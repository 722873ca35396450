"""Rows from a local file, and what is wrong with one that cannot be read: its line, and the reason."""

import csv
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Columns that a run learns from, in which kinds are not to be mixed; datasets (5) reads others as they are.
LEARNT = ("text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "input_ids")
# In CSV an empty cell is an empty text, and so is no other: "NA" and "null" are words.
READING: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False, "na_values": []}}


def read_file(file: str | Path) -> Dataset:
    """The rows of a local file.

    Args:
        file (`str` or `Path`): JSON, JSONL, CSV or Parquet; `~` is the home folder.

    Raises:
        OSError, ValueError: for a file that is missing, empty, of no known kind, or that cannot be parsed, with its
            line and the reason.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{file} is a folder: name a file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"{file} does not exist. Paths in a recipe are relative to the current folder.")
    if not path.stat().st_size:
        raise ValueError(f"{file} is empty: it has no rows to train on or to evaluate.")
    kind = FILE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{file} is of no known kind: use a file ending in {', '.join(FILE_FORMATS)}.")
    if kind in ("csv", "json"):
        _refuse_unreadable(path, kind, LEARNT)  # its error names the line, which that of datasets does not
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(path)), split="train", **READING.get(kind, {}))
    except Exception as error:  # datasets raises whatever its readers do
        if kind == "json":
            _refuse_unreadable(path, kind)
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ValueError(f"{file} cannot be read as {kind}: {reason}") from error
    if not len(rows) or not rows.column_names:
        raise ValueError(f"{file} has no rows to train on or to evaluate.")
    return rows


def _refuse_unreadable(path: Path, kind: str, columns: tuple[str, ...] | None = None) -> None:
    """Names the line at which a file is none of its kind, or at which one of `columns` changes its own."""
    try:
        # newline: a line break within quotes is part of a cell
        with path.open(encoding="utf-8-sig", newline="" if kind == "csv" else None) as stream:
            for line, reason in _csv_faults(stream) if kind == "csv" else _json_faults(stream, columns):
                raise ValueError(f"{path}, line {line}: {reason}")
    except UnicodeDecodeError:
        _refuse_bytes(path, path.read_bytes())


def _refuse_bytes(path: Path, content: bytes) -> None:
    if content.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} is compressed by gzip: unpack it.")
    try:
        content.decode()  # whole: an error of the stream counts from the start of its buffer
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: it is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def _csv_faults(stream: Any) -> Iterator[tuple[int, str]]:
    reader = csv.reader(stream, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            yield 1, f"the header names a column twice: {', '.join(header)}."
        for cells in reader:
            if cells and len(cells) != len(header):
                yield reader.line_num, f"{len(cells)} cells, and the header has {len(header)}."
    except csv.Error as error:
        yield reader.line_num, f"{error}."


def _json_faults(stream: Any, columns: tuple[str, ...] | None) -> Iterator[tuple[int, str]]:
    """One JSON value for the whole file, or one for each line."""
    first = stream.read(1)
    while first.isspace():
        first = stream.read(1)
    stream.seek(0)
    if first == "[":
        try:
            rows = json.load(stream)
        except (json.JSONDecodeError, RecursionError) as error:
            yield getattr(error, "lineno", 1), f"{getattr(error, 'msg', 'nested too deep')}."
            return
        if not rows:
            yield 1, "it has no rows."
        yield from _row_faults(((f"row {number}", 1, row) for number, row in enumerate(rows, 1)), columns)
        return
    lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    parsed: list[tuple[str, int, Any]] = []
    for number, line in lines:
        try:
            parsed.append(("the line", number, json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            if number == 1 or not parsed:
                whole = _whole(stream)
                if whole is not None:
                    parsed = [("the file", 1, whole)]
                    break
            yield number, f"{getattr(error, 'msg', 'nested too deep')} (column {getattr(error, 'colno', 1)})."
            return
    yield from _row_faults(iter(parsed), columns)


def _whole(stream: Any) -> Any:
    stream.seek(0)
    try:
        return json.load(stream)
    except (json.JSONDecodeError, RecursionError):
        return None


def _row_faults(rows: Iterator[tuple[str, int, Any]], columns: tuple[str, ...] | None) -> Iterator[tuple[int, str]]:
    """Rows that are no objects, and cells of these columns, or of any, of another kind than those above them."""
    kinds: dict[str, tuple[str, str, int]] = {}
    for where, line, row in rows:
        if not isinstance(row, dict):
            yield line, f"{where} is {_kind(row)}, and must be an object with the columns as names."
            return
        for name, value in row.items():
            if columns is not None and name not in columns:
                continue
            kind = _kind(value)
            before, place, at = kinds.setdefault(name, (kind, where, line))
            if before == "null":
                kinds[name] = (kind, where, line)
            elif kind not in ("null", before):
                yield line, f"{name!r} of {where} is {kind}, and {before} in {place if at == line else f'line {at}'}."
                return


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object"
