"""What a person sees while a search runs: the trials so far, and how far the one that runs has come."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from .outcome import empty_table, row_of
from .space import Settings
from .study import ENDED, Record


class Progress:
    """A live table with a bar on a terminal, and a line for each trial elsewhere.

    Args:
        console (`Console`, *optional*): where to. `None` shows nothing.
        trials (`int`): of the search.
        minutes (`float`, *optional*): of the search.

    Attributes:
        records (`Callable`): the trials so far.
    """

    def __init__(self, console: Console | None, trials: int, minutes: float | None):
        self.console, self.trials, self.minutes = console, trials, minutes
        self.records: Callable[[], list[Record]] = list
        self._started = time.monotonic()
        self._running: Settings | None = None
        self._told: set[int] = set()
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total}")
        )
        self._all = self._bar.add_task("trials", total=trials)
        self._one = self._bar.add_task("steps", total=1)
        live = console is not None and console.is_terminal
        self._live = Live(console=console, refresh_per_second=4) if live else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __call__(self, settings: Settings | None, step: int, loss: float | None) -> None:
        """Of the trial of `settings`: it has done `step` steps, and has this loss if it was just measured."""
        if self.console is None:
            return
        if settings is None or settings != self._running or loss is not None:
            self._refresh()
        self._running = settings
        if settings is not None:
            name = f"{settings.term}, layers {settings.layers}, rate {settings.rate:.3g}"
            self._bar.update(self._one, total=settings.steps, completed=step, description=name)

    def close(self) -> None:
        """Tells of the last trial, and ends the live display."""
        if self.console is not None:
            self._refresh()
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.console = None

    def _refresh(self) -> None:
        assert self.console is not None
        ended = [record for record in self.records() if record.state not in ("running", "waiting")]
        finished = sum(record.state in ENDED for record in ended)
        self._bar.update(self._all, completed=finished)
        if self._live is not None:
            table = empty_table("Trials so far")
            best = min(
                (each for each in ended if each.state == "done"), key=lambda each: each.loss or 0.0, default=None
            )
            for record in ended[-20:]:
                table.add_row(
                    *row_of(record, "best" if record is best else "" if record.state == "done" else record.state)
                )
            self._live.update(Group(table, self._bar, Text(self._time())))
            return
        for record in ended:
            if record.number not in self._told:
                self._told.add(record.number)
                term, layers, rate, steps = record.settings
                loss = "" if record.loss is None else f", loss {record.loss:.4f}"
                self.console.print(
                    f"Trial {record.number}: {term}, layers {layers}, rate {rate:.3g}, {steps} steps: "
                    f"{record.state}{loss}"
                )

    def _time(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        return f"{minutes:.1f} minutes" + (f" of {self.minutes:g}" if self.minutes is not None else "")
