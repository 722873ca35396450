"""The search: Optuna chooses what is tried, prunes, and keeps the study in its database."""

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from ..evaluation import RowLoss, mean_loss, share_right
from .judge import all_rows
from .space import Settings, Space
from .trials import Bench, Stopped, load_deltas, mean_deltas, save_deltas


try:
    import optuna
except ImportError as error:
    raise ImportError("beft tune needs Optuna, which is not installed: pip install 'beft-trl[tune]'.") from error


STUDY_FILE = "study.db"
STUDY_NAME = "beft-tune"
RANDOM_TRIALS = 4  # before the sampler goes by what it has seen
HEARTBEAT = 30  # seconds: a process that has been killed leaves a trial that others give up after a few of them
STOPS_AFTER = 2  # trials that have ended before others are stopped at a look
STOPPED_BEYOND = 75.0  # percent of those that have ended: what is in their worst quarter at the same look is stopped
# What a trial fails of, while the search goes on.
FAILURES: dict[type[Exception], str] = {FloatingPointError: "not finite", torch.OutOfMemoryError: "out of memory"}
ENDED = ("done", "pruned", *FAILURES.values())
SOUP = 3  # trials whose mean is a candidate, at most


class OutOfTime(Exception):
    """The minutes of a search are over."""


@dataclass(frozen=True)
class Record:
    """A trial.

    Attributes:
        number: in the study.
        settings: that it tried.
        state: `"done"`, `"pruned"`, `"running"`, `"waiting"`, `"stopped"`, or why it failed, one of `FAILURES`.
        loss: on the development rows, at its end or where it was pruned.
        accuracy: share of development rows of which each token is the likeliest.
        seconds: that it took.
        rows: the losses of the development rows of each fold, if it is done.
    """

    number: int
    settings: Settings
    state: str
    loss: float | None = None
    accuracy: float | None = None
    seconds: float | None = None
    rows: list[list[RowLoss]] | None = None


@dataclass(frozen=True)
class Soup:
    """The mean of the biases of some trials of the same term and layers.

    Attributes:
        members: the trials.
        rows: the losses of the development rows of each fold.
        seconds: that it took to judge.
    """

    members: list[Record]
    rows: list[list[RowLoss]]
    seconds: float

    @property
    def loss(self) -> float:
        """On the development rows."""
        return mean_loss(all_rows(self.rows))


def open_study(storage: str, about: dict[str, Any]) -> Any:
    """The study in a database, which is made if there is none.

    Args:
        storage (`str`): URL of the database, as SQLAlchemy takes it.
        about (`dict`): what makes trials comparable: base, rows, settings that are not searched, space.

    Raises:
        ValueError: for a URL that is no database, or a study of something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    database = _database(storage)
    study = optuna.create_study(
        storage=database,
        study_name=STUDY_NAME,
        load_if_exists=True,
        # Looks are at shares of each trial's own schedule. At the same share two trials have as much of their rate
        # left; at the same step one can be at its end and another at its full rate. A longer trial looks better at a
        # share, and mostly ends better too. Successive halving would keep, of the first three, only those that are
        # the best so far, at every look: after a default that is good hardly anything would end.
        pruner=optuna.pruners.PercentilePruner(STOPPED_BEYOND, n_startup_trials=STOPS_AFTER),
    )
    about = json.loads(json.dumps(about, default=str))
    known = study.user_attrs.get("about")
    if known is None:
        study.set_user_attr("about", about)
    elif known != about:
        other = [name for name in {**known, **about} if known.get(name) != about.get(name)]
        raise ValueError(
            f"The study in {storage} is one of other trials: {', '.join(sorted(other))} differ. Give another --output "
            "or --storage, or what it was begun with."
        )
    return study


def _database(storage: str) -> Any:
    engine: dict[str, Any] = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
    tries = 3  # another process may be making its tables
    for number in range(1, tries + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are "experimental"
                return optuna.storages.RDBStorage(
                    storage, engine_kwargs=engine, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT
                )
        except Exception as error:  # SQLAlchemy's drivers raise whatever they do
            if number == tries:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(
                    f"storage={storage!r} cannot be opened as a database: {reason}. Give a URL such as "
                    "sqlite:///study.db."
                ) from error
            time.sleep(number)


class Search:
    """Tries settings until their number or the time is over.

    Args:
        bench (`Bench`): trains.
        space (`Space`): of the settings.
        study (`optuna.Study`): of the first process, `None` in the others.
        folder (`Path`): for the biases of the trials.
        said (`Callable`): is called with the step and the loss as a trial goes on, and without at its end.
    """

    def __init__(
        self,
        bench: Bench,
        space: Space,
        study: Any,
        folder: Path,
        said: Callable[[Settings | None, int, float | None], None] = lambda *progress: None,
    ):
        self.bench, self.space, self.study, self.folder, self.said = bench, space, study, folder, said

    def run(self, trials: int, minutes: float | None) -> None:
        """Runs trials in every process; the first has the study.

        Args:
            trials (`int`): to have in the study, those of other processes and of earlier runs among them.
            minutes (`float`, *optional*): after which no trial but the default goes on.
        """
        if self.study is None:
            while (settings := self.bench.together(None)) is not None:
                try:
                    self.bench.run(settings, self.folder, lambda step, loss: None)
                except Stopped:
                    pass
                except FloatingPointError:  # in every process at once
                    if settings == self.space.default:
                        raise
            return
        seed = self.bench.args.seed
        seconds = math.inf if minutes is None else 60 * minutes
        deadline = time.monotonic() + seconds
        while self._goes_on(trials, deadline):
            # Another seed for each: a study that goes on, or another process, would draw what was drawn before.
            self.study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=RANDOM_TRIALS, seed=seed + 7919 * len(self.study.trials)
            )
            # More steps than the default's would take other trials their time, unless there is enough for all.
            of_step = self._seconds_of_a_step(self.records())
            affordable = seconds / trials / of_step if of_step else math.inf
            objective = partial(self._objective, affordable=affordable, deadline=deadline)
            self.study.optimize(objective, n_trials=1, catch=(OutOfTime,))
        self.bench.together(None)

    def _seconds_of_a_step(self, records: Sequence[Record]) -> float:
        """What the default took for each of its steps; 0 if it is not done."""
        done = (each for each in records if each.settings == self.space.default and each.state == "done")
        default = next(done, None)
        return (default.seconds or 0.0) / default.settings.steps if default is not None else 0.0

    def _goes_on(self, trials: int, deadline: float) -> bool:
        """Whether there is another trial to run, with those before the sampler's in the queue.

        Nothing ends before the default is done, which the others are compared to. One that another process runs is
        waited for; if that process is dead, the trial is given up after some heartbeats, and begun again here.
        """
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "experimental" since Optuna 2.9
                optuna.storages.fail_stale_trials(self.study)
            records = self.records()
            shortest = self.space.steps[0] * self._seconds_of_a_step(records)  # what cannot end is not begun
            over = time.monotonic() + shortest > deadline or sum(each.state in ENDED for each in records) >= trials
            states: dict[Settings, set[str]] = {}
            for record in records:
                states.setdefault(record.settings, set()).add(record.state)
            for settings in [self.space.default] if over else self.space.first():
                if not states.get(settings, set()) & {*ENDED, "running", "waiting"}:
                    self.study.enqueue_trial(settings._asdict())
            default = states.get(self.space.default, set())
            if not over or "done" in default:
                return not over
            if "running" not in default:
                return True
            time.sleep(1)

    def _objective(self, trial: Any, affordable: float, deadline: float) -> float:
        settings = self.space.suggest(trial, affordable)
        is_default = settings == self.space.default
        started = time.monotonic()
        looks = 0

        def watch(step: int, loss: float | None) -> Exception | None:
            nonlocal looks
            self.said(settings, step, loss)
            if loss is not None:
                looks += 1
                trial.report(loss, looks)
                if not is_default and looks < self.bench.looks and trial.should_prune():
                    return optuna.TrialPruned()
            return OutOfTime() if time.monotonic() > deadline and not is_default else None

        failure = None
        try:
            trained = self.bench.run(self.bench.together(settings), self.folder, watch)
        except Stopped as stopped:
            assert stopped.__cause__ is not None
            raise stopped.__cause__ from None
        except tuple(FAILURES) as error:
            # Memory runs out in one process: the others are in the middle of a step, and only their end frees them.
            in_one = isinstance(error, torch.OutOfMemoryError) and self.bench.accelerator.num_processes > 1
            if is_default or in_one:
                raise
            failure = next(name for kind, name in FAILURES.items() if isinstance(error, kind))
        finally:
            trial.set_user_attr("seconds", time.monotonic() - started)
            self.said(None, 0, None)
        if failure is not None:
            clear_device_cache(garbage_collection=True)  # here, where the error holds the trial's tensors no more
            trial.set_user_attr("failure", failure)
            raise optuna.TrialPruned
        trial.set_user_attr("rows", [[list(row) for row in fold] for fold in trained.rows])
        save_deltas(trained.deltas, self.deltas_file(trial.number))
        return mean_loss(all_rows(trained.rows))

    def deltas_file(self, number: int) -> Path:
        """Where the biases of a trial are."""
        return self.folder / f"{number}.safetensors"

    def records(self) -> list[Record]:
        """The trials of the study, in their order; those that wait are not told of."""
        return [record for trial in self.study.trials if (record := _record(trial)) is not None]

    def soup(self, records: list[Record]) -> Soup | None:
        """The mean of the best trials of the winner's term and layers, judged; `None` if there is only one.

        Every process calls it, with the records of the first.
        """
        done = sorted((record for record in records if record.state == "done"), key=lambda record: record.loss or 0.0)
        alike = [
            record
            for record in done
            if record.settings[:2] == done[0].settings[:2] and self.deltas_file(record.number).is_file()
        ]
        members = alike[:SOUP]
        if len(members) < 2:
            return None
        started = time.monotonic()
        deltas = [load_deltas(self.deltas_file(record.number), self.bench.sites) for record in members]
        means = [mean_deltas([each[fold] for each in deltas]) for fold in range(len(deltas[0]))]
        rows = self.bench.judge_deltas(members[0].settings, means, self.folder)
        return Soup(members, rows, time.monotonic() - started)


def _record(trial: Any) -> Record | None:
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if set(params) != set(Settings._fields):
        return None
    states = optuna.trial.TrialState
    state = {states.COMPLETE: "done", states.PRUNED: "pruned", states.RUNNING: "running", states.WAITING: "waiting"}
    attributes = trial.user_attrs
    rows = [[RowLoss(*row) for row in fold] for fold in attributes["rows"]] if "rows" in attributes else None
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
    return Record(
        trial.number,
        Settings(**{name: params[name] for name in Settings._fields}),
        attributes.get("failure", state.get(trial.state, "stopped")),
        trial.value if trial.value is not None else last,
        None if rows is None else share_right(all_rows(rows)),
        attributes.get("seconds"),
        rows,
    )
