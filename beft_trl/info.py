"""What an adapter's folder holds, for `beft info`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from . import report
from .importance import SCORES_FILE, BiasScores, recorded_learning_rates
from .weight_files import read_adapter


def adapter_report(folder: Path) -> Iterator[Any]:
    """Base, term, layers, norm of each delta, scores and versions, as tables and paragraphs for a terminal.

    Args:
        folder: of an adapter that this package or plain PEFT wrote, or a checkpoint.

    Raises:
        ValueError: where it holds no BEFT adapter, or a damaged one.
    """
    content = read_adapter(folder)
    deltas = content.deltas
    scores = BiasScores.from_json(folder / SCORES_FILE) if (folder / SCORES_FILE).is_file() else None
    table = Table("layer", "module", "size", "norm", "largest", title=f"Deltas of {escape(str(folder))}")
    for path in sorted(deltas, key=_by_layer):
        delta = deltas[path]
        # Of a fused matrix, the terms that are not trained are zero.
        table.add_row(
            str(_by_layer(path)[0]), path, f"{int(delta.count_nonzero()):,}", f"{delta.norm():.3e}",
            f"{delta.abs().max():.3e}",
        )  # fmt: skip
    yield table
    term = f"the {scores.selected} bias" if scores else f"an attention bias (no {SCORES_FILE} says which)"
    trained = sum(int(delta.count_nonzero()) for delta in deltas.values())
    base = escape(str(content.base_model or "not named"))
    yield f"Base: {base}. Trains {term} in {len(deltas)} modules: {trained:,} numbers."
    if content.saved_whole:
        size = sum(values.numel() for values in content.saved_whole.values())
        yield f"Trained whole beside it, {size:,} numbers: {escape(', '.join(sorted(content.saved_whole)))}."
    still = [path for path, delta in deltas.items() if not delta.any()]
    if still:
        yield f"[bold yellow]{len(still)} deltas are zero, as if never trained:[/] {escape(', '.join(still[:3]))}"
    if scores and scores.method is not None:
        yield report.scores_table(scores, trained, None, recorded_learning_rates(folder / SCORES_FILE))
    versions = dict(scores.versions) if scores else {}
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    versions.setdefault("peft", str(config.get("peft_version", "not recorded")))
    yield escape("Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".")


def _by_layer(path: str) -> tuple[int, str]:
    index = re.search(r"\.(\d+)\.", path)
    return (int(index[1]) if index else 0), path
