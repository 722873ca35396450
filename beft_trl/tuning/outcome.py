"""What a search found, as a person and as a machine reads it."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..evaluation import share_right
from .judge import Verdict, all_rows, compare
from .space import Settings, Space
from .study import ENDED, Record, Soup


COLUMNS = ("trial", "term", "layers", "rate", "steps", "loss", "accuracy", "seconds", "")
PICTURE_FILE = "tuning.png"
RESULT_FILE = "tuning.json"


@dataclass(frozen=True)
class Choice:
    """What a search chose.

    Attributes:
        kind: `"default"`, `"trial"` or `"soup"`.
        records: the trials of the study.
        default: the trial of the default settings.
        best: the trial with the lowest loss.
        soup: the mean of some trials, if there is one.
        verdict: the default next to the lowest loss, or `None` if the default has it.
    """

    kind: str
    records: list[Record]
    default: Record
    best: Record
    soup: Soup | None
    verdict: Verdict | None

    @property
    def winner(self) -> Record:
        """The chosen trial, of a soup the best of its members."""
        if self.kind == "soup" and self.soup is not None:
            return self.soup.members[0]
        return self.default if self.kind == "default" else self.best

    @property
    def members(self) -> list[Settings]:
        """The settings to train, whose mean is taken if there are several."""
        if self.kind == "soup" and self.soup is not None:
            return [record.settings for record in self.soup.members]
        return [self.winner.settings]

    def sentence(self) -> str:
        """What was chosen and why."""
        if self.verdict is None:
            return f"Chosen: the default settings, trial {self.default.number}, which have the lowest loss."
        name = f"trial {self.best.number}"
        if self.soup is not None and self.soup.loss < (self.best.loss or 0.0):
            name = f"the mean of trials {', '.join(str(record.number) for record in self.soup.members)}"
        gain, chance = f"{self.verdict.difference:.4f}", f"{self.verdict.factor * self.verdict.error:.4f}"
        if self.kind == "default":
            return (
                f"Chosen: the default settings, trial {self.default.number}. The loss of {name} is lower by {gain}, "
                f"and by up to {chance} that of the best of so many can be by chance."
            )
        return (
            f"Chosen: {name}, whose loss is lower than the default's by {gain}, which is more than the {chance} that "
            "chance gives the best of so many."
        )


def choose(space: Space, records: Sequence[Record], soup: Soup | None) -> Choice:
    """Keeps the default unless the lowest loss is ahead of it by more than chance.

    Args:
        space (`Space`): of the search.
        records (`Sequence[Record]`): its trials, with the default among those that are done.
        soup (`Soup`, *optional*): another candidate.

    Raises:
        ValueError: if the default is not done.
    """
    done = [record for record in records if record.state == "done" and record.rows is not None]
    default = next((record for record in done if record.settings == space.default), None)
    if default is None:
        raise ValueError("The trial of the default settings is not done, and the others are compared to it.")
    best = min(done, key=lambda record: record.loss or 0.0)
    kind, rows = "trial", best.rows
    if soup is not None and soup.loss < (best.loss or 0.0):
        kind, rows = "soup", soup.rows
    if kind == "trial" and best is default:
        return Choice("default", list(records), default, best, soup, None)
    # Trials that were stopped early were judged by the same rows: they are among those that the best is the best of.
    others = sum(record.loss is not None and record is not default for record in records) + (soup is not None)
    verdict = compare(default.rows or [], rows or [], others)
    return Choice(kind if verdict.ahead else "default", list(records), default, best, soup, verdict)


def rows_of_table(choice: Choice) -> Iterator[list[str]]:
    """The trials, one row of `COLUMNS` each, and the soup."""
    for record in choice.records:
        if record.state != "waiting":
            yield row_of(record, _mark(choice, record))
    if choice.soup is not None:
        first = choice.soup.members[0].settings
        numbers = "+".join(str(record.number) for record in choice.soup.members)
        accuracy = share_right(all_rows(choice.soup.rows))
        state = "chosen" if choice.kind == "soup" else "mean"
        yield [
            numbers, first.term, first.layers, "", "", f"{choice.soup.loss:.4f}", f"{accuracy:.3f}",
            f"{choice.soup.seconds:.0f}", state,
        ]  # fmt: skip


def _mark(choice: Choice, record: Record) -> str:
    if choice.kind != "soup" and record is choice.winner:
        return "chosen" if record is not choice.default else "default, chosen"
    return "default" if record is choice.default else record.state if record.state != "done" else ""


def row_of(record: Record, mark: str) -> list[str]:
    """One trial in the columns of the table."""
    term, layers, rate, steps = record.settings
    return [
        str(record.number), term, layers, f"{rate:.3g}", str(steps),
        "" if record.loss is None else f"{record.loss:.4f}",
        "" if record.accuracy is None else f"{record.accuracy:.3f}",
        "" if record.seconds is None else f"{record.seconds:.0f}", mark,
    ]  # fmt: skip


def empty_table(title: str) -> Table:
    """A table of trials without rows."""
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("term", "layers", "") else "right")
    return table


def table_of(choice: Choice) -> Table:
    """Every trial, with what was chosen and why."""
    table = empty_table("Trials")
    for row in rows_of_table(choice):
        table.add_row(*row, style="bold" if "chosen" in row[-1] else "dim" if row[-1] in ENDED else "")
    table.caption = Text(choice.sentence())
    return table


def section_of(choice: Choice, picture: str, judged_by: str) -> str:
    """The study as a section of a model card.

    Args:
        choice (`Choice`): what was found.
        picture (`str`): the name of its file.
        judged_by (`str`): on what the losses are.
    """
    lines = [COLUMNS, ("---:", "---", "---", *["---:"] * 5, "---"), *rows_of_table(choice)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"## How the settings were chosen\n\nBy `beft tune`: loss and accuracy are those {judged_by}. "
        f"{choice.sentence()} The adapter here was then trained on all rows.\n\n{table}\n\n![trials]({picture})"
    )


def picture_of(choice: Choice) -> bytes:
    """A PNG of the trials' losses: in the order in which they ran, and by their rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    order, by_rate = figure.subplots(1, 2, sharey=True)
    shown = [record for record in choice.records if record.loss is not None]
    for term in dict.fromkeys(record.settings.term for record in shown):
        for axes, place in ((order, lambda each: each.number), (by_rate, lambda each: each.settings.rate)):
            of_term = [record for record in shown if record.settings.term == term]
            for state, marker in (("done", "o"), ("pruned", "x")):
                points = [(place(record), record.loss) for record in of_term if record.state == state]
                if points:
                    color = f"C{['query', 'key', 'value', 'all'].index(term)}"
                    label = term if state == "done" or all(each.state == "pruned" for each in of_term) else None
                    axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label)
    order.axhline(choice.default.loss or 0.0, color="gray", linewidth=0.8, linestyle="--")
    by_rate.axhline(choice.default.loss or 0.0, color="gray", linewidth=0.8, linestyle="--", label="default")
    order.set_xlabel("trial (x: pruned)")
    by_rate.set_xlabel("rate")
    by_rate.set_xscale("log")
    order.set_ylabel("development loss")
    by_rate.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def to_json(choice: Choice, more: dict[str, Any]) -> str:
    """Every trial and the choice, for machines."""

    def plain(record: Record) -> dict[str, Any]:
        return {**asdict(record), "settings": record.settings._asdict()}

    verdict = choice.verdict._asdict() if choice.verdict is not None else None
    soup = choice.soup
    found = {
        "chosen": choice.kind,
        "settings": [settings._asdict() for settings in choice.members],
        "verdict": verdict,
        "default": choice.default.number,
        "best": choice.best.number,
        "soup": None
        if soup is None
        else {"members": [record.number for record in soup.members], "loss": soup.loss, "seconds": soup.seconds},
        "trials": [plain(record) for record in choice.records],
        **more,
    }
    return json.dumps(found, indent=2) + "\n"
