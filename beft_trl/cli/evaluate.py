"""Base, adapters and merged models side by side on held-out rows, for `beft eval`."""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import PeftType
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..engines import slow_16_bits
from ..evaluation import OTHER, Evaluation, choices_of, completions_of, evaluate
from ..tuner import ADAPTER_NAME, load_adapter
from ..weight_files import load_tokenizer, read_adapter, read_json
from .bases import is_path
from .data_files import read_file
from .recipe import DTYPES, as_prompts


class Target(NamedTuple):
    """What is measured: a model, or an adapter on it."""

    name: str
    kind: str  # "base", "adapter" or "model"
    base: str
    adapter: str | None = None


def evaluate_targets(
    names: Sequence[str],
    test_file: str,
    base: str | None = None,
    choices: Sequence[str] | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[tuple[Target, Evaluation]]:
    """Measures adapters, the bases that they are of, and models on the rows of a file. A base is loaded once.

    Args:
        names: folders of adapters, and folders or hub names of models.
        test_file: JSON, JSONL, CSV or Parquet, with prompt and completion or Alpaca's columns.
        base: the base model of the adapters. Default: the one that each of them names.
        choices: the completions to rank, see [`evaluation.evaluate`].
        dtype: of the weights. Default: that of the files, or float32 on a processor without 16-bit instructions.
        batch_size: rows of a forward pass.
        max_new_tokens: of a written answer. Default: see [`evaluation.write`].
        tell: is given what goes on, where it takes seconds.

    Raises:
        OSError, ValueError: for targets and rows that cannot be measured, before any weight is loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(each for each in DTYPES if each)}.")
    targets = _targets(names, base)
    found = read_file(test_file)
    # Asked first: a torch that is built for CUDA names it on a machine without a driver, too.
    on_gpu = torch.accelerator.is_available()
    device = (torch.accelerator.current_accelerator() if on_gpu else None) or torch.device("cpu")
    if dtype is None:
        dtype = "float32" if slow_16_bits(device) else "auto"
    prepared = []
    for target in targets:  # all of them before any weight is loaded
        tokenizer = load_tokenizer(target.base, target.adapter)
        rows = _rows(found, tokenizer, test_file)
        choices_of(completions_of(rows), choices)
        prepared.append((target, tokenizer, rows))
    measured: list[tuple[Target, Evaluation]] = []
    model: Any = None
    loaded = None
    for number, (target, tokenizer, rows) in enumerate(prepared, 1):
        tell(f"Measuring {number} of {len(prepared)} on {len(rows)} rows: {target.kind} {target.name}")
        if loaded != target.base:
            model = None
            gc.collect()  # the model before: two may not fit
            model = AutoModelForCausalLM.from_pretrained(target.base, dtype=dtype)
            model.to(device)
            loaded = target.base
        subject = model if target.adapter is None else load_adapter(model, target.adapter)
        figures = evaluate(subject.eval(), tokenizer, rows, choices, batch_size, max_new_tokens, bars=True)
        measured.append((target, figures))
        if target.adapter is not None:
            config: Any = subject.peft_config[ADAPTER_NAME]
            if config.peft_type == PeftType.BEFT and not config.modules_to_save:
                model = subject.unload()
                vars(model).pop("peft_config", None)  # PEFT leaves it, and warns of it at the next adapter
            else:
                loaded = None  # PEFT leaves modules that were trained whole, and biases of a LoRA, in the base
        del subject
    return measured


def _targets(names: Sequence[str], base: str | None) -> list[Target]:
    """What is measured, each base before its adapters, in the order of the names."""
    targets: list[Target] = []
    for name in names:
        if not os.path.isfile(os.path.join(name, ADAPTER_CONFIG_NAME)):
            _refuse_no_model(name)
            targets.append(Target(name, "model", name))
            continue
        config = read_json(Path(name) / ADAPTER_CONFIG_NAME, "Take another checkpoint.")
        if config.get("peft_type") == "BEFT":
            read_adapter(Path(name))  # says what is damaged
        of = base or config.get("base_model_name_or_path")
        if not isinstance(of, str) or not of:
            raise ValueError(f"The adapter in {name} names no base model: give it as --base.")
        _refuse_no_model(of, f"The base of the adapter in {name} is {of}: ", "Give it as --base. ")
        targets.append(Target(name, "adapter", of, name))
    bases = {target.base for target in targets if target.adapter is not None}
    ordered: list[Target] = []
    for target in targets:
        if target.base in bases and not any(each.base == target.base for each in ordered):
            ordered.append(Target(target.base, "base", target.base))
        if target.adapter is not None or target.base not in bases:
            # Next to the others of its base, which is loaded once.
            place = max((at for at, each in enumerate(ordered, 1) if each.base == target.base), default=len(ordered))
            ordered.insert(place, target)
    return ordered


def _refuse_no_model(name: str, before: str = "", remedy: str = "") -> None:
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            raise FileNotFoundError(
                f"{before}{name} has no {CONFIG_NAME} and no {ADAPTER_CONFIG_NAME}: it is neither a model nor an "
                f"adapter. {remedy}".strip()
            )
    elif is_path(name):
        raise FileNotFoundError(f"{before}{name!r} is no folder. {remedy}".strip())


def _rows(found: Dataset, tokenizer: Any, file: str) -> list[dict[str, Any]]:
    rows = as_prompts(found, tokenizer.chat_template is not None, file)
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(
            f"{file} has the columns {', '.join(rows.column_names)}. Answers are compared with completions: give rows "
            "with prompt and completion, or with Alpaca's instruction and output."
        )
    for number, row in enumerate(rows, 1):
        kinds = {type(row[name]) for name in ("prompt", "completion")}
        if not row["completion"] or kinds not in ({str}, {list}):
            raise ValueError(
                f"Row {number} of {file}: prompt and completion must both be text, or both turns of a conversation, "
                "and the completion must not be empty. Complete the row, or take it out."
            )
    if isinstance(rows[0]["prompt"], list) and tokenizer.chat_template is None:
        raise ValueError(
            f"{file} has turns of a conversation, and the tokenizer of this model has no chat template to make text "
            "of them. Give prompt and completion as text."
        )
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def to_json(measured: Sequence[tuple[Target, Evaluation]], test_file: str) -> str:
    """Every figure, answer and confusion matrix, for machines."""
    models = [{**target._asdict(), **asdict(figures)} for target, figures in measured]
    return json.dumps({"test_file": test_file, "models": models}, indent=2) + "\n"


def report(measured: Sequence[tuple[Target, Evaluation]]) -> Iterator[Table | Text]:
    """The figures side by side, and for classes where the answers of each model went."""
    first = measured[0][1]
    table = Table("", "", "loss", "exact", "ranked", title=Text(f"{first.rows} rows, {first.tokens} tokens"))
    for target, figures in measured:
        ranked = "" if figures.ranked is None else f"{figures.ranked:.3f}"
        table.add_row(target.kind, Text(target.name), f"{figures.loss:.4f}", f"{figures.exact:.3f}", ranked)
    yield table
    yield Text(
        "loss: of a token of the completions. exact: answers written that equal the completion."
        + (" ranked: completions that are likelier than the other choices." if first.choices else "")
    )
    for target, figures in measured:
        if figures.choices:
            yield _matrix(target, figures)


def _matrix(target: Target, figures: Evaluation) -> Table:
    # What was written and is no choice has a column only if there is any.
    other = any(row[OTHER] for row in figures.written.values())
    columns = [*figures.choices, *([OTHER] if other else [])]
    table = Table(title=Text(f"Written by {target.name}, by the right answer"))
    for name in ("", *columns):
        table.add_column(Text(name), justify="right" if name else "left")
    for right, row in figures.written.items():
        counts = (Text(str(row[name] or "."), "bold" if name == right else "") for name in columns)
        table.add_row(Text(right), *counts)
    return table


def print_evaluation(
    measured: Sequence[tuple[Target, Evaluation]], test_file: str, json_file: Path | None = None
) -> None:
    """Prints the tables, and writes the JSON file if one is asked for."""
    console = Console(highlight=False)
    for part in report(measured):
        console.print(part)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(to_json(measured, test_file), encoding="utf-8")
        console.print(f"Wrote {json_file}.", markup=False)
