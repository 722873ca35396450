"""What `beft check` prints: the bias sites, the cell, the labels, the steps, the memory and the problems."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..config import ENOUGH_STEPS
from ..data.labels import LabelAudit
from ..engines import ENGINES, PRECISIONS, condition
from ..layout import BiasSite
from ..spans import ranges
from .check import Check
from .memory import MemoryEstimate


def check_report(check: Check) -> Iterator[Any]:
    """What `beft check` prints: for each part that was found out, a table or a paragraph; the problems last."""
    if check.sites:
        yield sites_table(check.sites, f"Bias sites of {escape(check.model or 'the model')}")
    if check.candidates and check.parameters:
        what = "all live terms are scored" if check.bias_term == "auto" else f"bias_term: {check.bias_term}"
        share = check.candidates / check.parameters
        yield f"{check.candidates:,} biases of {check.parameters:,} parameters ({share:.4%}): {what}."
    if check.engine and check.precision:
        needed = condition(check.engine, check.precision)
        yield (
            f"{PRECISIONS[check.precision]} base weights, {ENGINES[check.engine]}, {check.processes} "
            f"process{'es' * (check.processes > 1)}" + (f", with {needed}." if needed else ".")
        )
    if check.labels:
        yield from _labels_report(check.labels)
    if check.steps:
        scoring = ""
        if check.score_steps:
            share = 2 * check.score_steps / (check.steps + 2 * check.score_steps)
            scoring = f", and before them 2 x {check.score_steps} of scoring, {share:.1%} of all"
        given = "" if check.length_given else f", which is enough for a bias ({ENOUGH_STEPS}, or one for each row)"
        yield f"{check.steps:,} optimizer steps{given}{scoring}."
        if check.relative_learning_rate is None:
            yield f"Learning rate: {check.learning_rate:g}, in all layers."
        else:
            yield (
                f"Learning rate: in each layer {check.relative_learning_rate:g} of the RMS of what its projection "
                "gives, which is measured before the run."
            )
    if check.frozen_computed is not None:
        yield f"The frozen layers are computed in every step: {escape(check.frozen_computed)}."
    elif check.frozen_states is not None:
        yield (
            "The frozen layers are computed once for each row: what they give takes "
            f"{check.frozen_states / 2**20:,.0f} MiB of the processor's memory."
        )
    if check.memory:
        yield memory_table(check.memory, check.device_memory)
    if check.dry_run:
        yield "Dry run: one scoring step and one training step were done."
    yield from map(escape, check.notes)
    for problem in check.problems:
        yield f"[bold red]Problem:[/] {escape(problem)}"
    yield "[bold red]The run cannot start.[/]" if check.problems else "[bold green]The run can start.[/]"


def sites_table(sites: Sequence[BiasSite], title: str) -> Table:
    """The sites by term: one row for those that differ only in the layer."""
    table = Table("term", "layers", "size", "parameters", "bias", "", title=title)
    by_kind: dict[tuple, list[BiasSite]] = {}
    for site in sites:
        by_kind.setdefault((site.term, len(site.rows), site.has_bias, site.dead), []).append(site)
    for (term, size, has_bias, dead), group in by_kind.items():
        layers = ranges(site.layer for site in group)
        bias = "its own" if has_bias else "added"
        table.add_row(
            term, layers, f"{size:,}", f"{size * len(group):,}", bias, f"dead: {dead}" if dead else "",
            style="dim" if dead else "",
        )  # fmt: skip
    return table


def memory_table(memory: MemoryEstimate, available: int | None) -> Table:
    """The parts of an estimate, their sum, and what the device has."""
    table = Table("memory of one device", "GiB", title="Estimated peak")
    table.columns[1].justify = "right"
    parts = {
        "interpreter and libraries": memory.runtime,
        "frozen weights": memory.weights,
        "weights gathered by ZeRO-3": memory.gathered,
        "biases and their gradients": memory.deltas,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "loss": memory.logits,
    }
    for name, size in parts.items():
        if size:
            table.add_row(name, f"{size / 2**30:.2f}")
    table.add_section()
    table.add_row("sum", f"{memory.total / 2**30:.2f}", style="bold")
    if available is not None:
        table.add_row("the device has", f"{available / 2**30:.2f}")
    return table


def _labels_report(labels: LabelAudit) -> Iterator[str]:
    yield (
        f"{labels.rows:,} rows: {labels.truncated:,} truncated, {labels.unsupervised:,} left out for want of a token "
        f"to learn from; the longest has {labels.longest:,} tokens. A step sees {labels.tokens_per_step:,.0f} tokens, "
        f"of which {labels.supervised_share:.1%} are learnt."
    )
    for number, row in enumerate(labels.shown, 1):
        text = "".join(f"[bold green]«{escape(part)}»[/]" if counted else escape(part) for part, counted in row)
        yield f"Row {number}, what is learnt in «»: {text}"
