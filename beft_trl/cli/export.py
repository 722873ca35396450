"""`beft export`: the rows that it measures on, and what it prints."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table
from trl.data_utils import maybe_apply_chat_template

from ..data.rows import prepare_rows
from ..export.lora import LARGEST_ERROR, ExportReport
from ..weight_files import load_tokenizer, read_adapter
from .data_files import read_file


def read_texts(file: Path, adapter: Path, base: str | None) -> list[tuple[str, str]]:
    """The rows of a file as prompts and answers, in the words that the model is given.

    They have prompt and completion, messages, or text. The chat template is that of the adapter, or else of its base.

    Raises:
        ValueError: for rows of another format.
    """
    tokenizer = load_tokenizer(base or read_adapter(adapter).base_model or adapter, adapter)
    rows = prepare_rows(read_file(file))
    return [_as_text(row, tokenizer, file) for row in rows]


def _as_text(row: dict[str, Any], tokenizer: Any, file: Path) -> tuple[str, str]:
    conversational = isinstance(row.get("prompt") or row.get("messages"), list)
    plain = maybe_apply_chat_template(row, tokenizer)
    if isinstance(plain.get("prompt"), str) and isinstance(plain.get("completion"), str):
        return plain["prompt"], plain["completion"] + ("" if conversational else tokenizer.eos_token or "")
    if not isinstance(plain.get("text"), str):
        raise ValueError(
            f"{file} has the columns {', '.join(row)}: give rows with prompt and completion, with messages, or text."
        )
    return plain["text"][: len(plain["text"]) // 2], plain["text"][len(plain["text"]) // 2 :]


def export_report(report: ExportReport) -> Iterator[Any]:
    """What `beft export` prints."""
    table = Table("", "adapter", "LoRA of rank 1", title=f"{report.answers} prompts")
    table.add_row("loss", f"{report.original_loss:.4f}", f"{report.loss:.4f}")
    table.add_row("greedy answers that are equal", "", f"{report.equal_answers} of {report.answers}")
    table.add_row("largest difference of a logit, of the largest", "", f"{report.difference:.1e}")
    path = max(report.errors, key=report.errors.__getitem__)
    table.add_row(f"largest error of a.x = 1, of {LARGEST_ERROR:.0%}", "", f"{report.errors[path]:.2%} ({path})")
    yield table
    yield f"Wrote {report.output}, an ordinary LoRA of PEFT. Its vectors are kept for this base in {report.vectors}."
    if report.gguf is not None:
        yield f"  llama-server -m BASE.gguf --lora {report.gguf}"
    yield f"  vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules NAME={report.output}"
