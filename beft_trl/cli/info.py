"""What an adapter's folder holds, for `beft info`."""

import os
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text
from transformers.utils import ADAPTER_CONFIG_NAME

from .. import report
from ..importance import SCORES_FILE, BiasScores, recorded_learning_rates
from ..layout import TERMS, layer_index
from ..weight_files import MergeError, first_line, read_adapter, read_json


REMEDY = "Take another checkpoint, or remove this file: the adapter can be told without it."


def adapter_report(folder: Path) -> Iterator[Table | Text]:
    """Base, term, layers, norm of each delta, scores and versions, as tables and paragraphs for a terminal.

    Args:
        folder (`Path`): of an adapter that this package or plain PEFT wrote, or a checkpoint.

    Raises:
        ValueError: if it holds no BEFT adapter, or a damaged one.
    """
    content = read_adapter(folder)
    deltas = content.deltas
    trained = sum(int(delta.count_nonzero()) for delta in deltas.values())
    scores, scores_table = _read_scores(folder / SCORES_FILE, trained)
    # Text, not str: names and paths may look like markup.
    table = Table("layer", "module", "size", "norm", "largest", title=Text(f"Deltas of {folder}"))
    for layer, path in sorted((layer_index(path, default=0), path) for path in deltas):
        delta = deltas[path]
        # Of a fused matrix, the terms that are not trained are zero.
        table.add_row(
            str(layer), Text(path), f"{int(delta.count_nonzero()):,}", f"{delta.norm():.3e}",
            f"{delta.abs().max():.3e}",
        )  # fmt: skip
    yield table
    term = f"the {scores.selected} bias" if scores else f"an attention bias (no {SCORES_FILE} says which)"
    base = content.base_model or "not named"
    yield Text(f"Base: {base}. Trains {term} in {len(deltas)} modules: {trained:,} numbers.")
    if content.saved_whole:
        size = sum(values.numel() for values in content.saved_whole.values())
        yield Text(f"Trained whole with it, {size:,} numbers: {', '.join(sorted(content.saved_whole))}.")
    still = [path for path, delta in deltas.items() if not delta.any()]
    if still:
        warning = f"{len(still)} deltas are zero, as if never trained:"
        yield Text.assemble((warning, "bold yellow"), f" {', '.join(still[:3])}")
    if scores_table is not None:
        yield scores_table
    versions = dict(scores.versions) if scores else {}
    config = read_json(folder / ADAPTER_CONFIG_NAME, REMEDY)
    versions.setdefault("peft", str(config.get("peft_version", "not recorded")))
    yield Text("Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".")


def _read_scores(file: Path, trained: int) -> tuple[BiasScores | None, Table | None]:
    """The scores next to an adapter and their table, if there are any."""
    if not os.path.lexists(file):
        return None, None
    read_json(file, REMEDY)
    scores = BiasScores.from_json(file)
    named = [scores.selected, *scores.terms]
    wrong = next((repr(term) for term in named if term not in TERMS and term != "all"), None)
    if wrong or not isinstance(scores.versions, dict):
        raise MergeError(f"{file} is damaged: it names {wrong or repr(scores.versions)}. {REMEDY}")
    if scores.method is None:
        return scores, None
    try:
        return scores, report.scores_table(scores, trained, None, recorded_learning_rates(file))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MergeError(f"{file} is damaged: its scores make no table ({first_line(error)}). {REMEDY}") from error
