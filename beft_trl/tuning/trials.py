"""Trials: runs with other settings on one loaded base, each as an ordinary run would have gone."""

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from ..data.labels import IGNORED
from ..deltas import gather_deltas, set_deltas
from ..evaluation import RowLoss, mean_loss, row_losses
from ..frozen_cache import FrozenLayersCache
from ..layout import BiasSite, find_bias_sites
from ..trainer import BeftSFTTrainer
from ..weight_files import write_tensors
from .space import Settings
from .split import Fold


LOOKS = 4  # at the development loss of a trial without folds, evenly spread over its steps, the last at its end
# A trial is no run of the user's: nothing of it is logged, saved or evaluated but what judges it.
QUIET: dict[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": [],
    "disable_tqdm": True,
    "resume_from_checkpoint": None,
}
# Takes the step that a trial is at, and its development loss if that was just measured; gives a reason to stop, or
# nothing.
Watch = Callable[[int, float | None], Exception | None]


class Stopped(Exception):
    """A trial that was stopped; its cause says why."""


@dataclass
class Trained:
    """What a trial gave.

    Attributes:
        rows: the development rows of each fold, as the model that did not learn them judges them.
        deltas: the trained biases of each fold.
    """

    rows: list[list[RowLoss]]
    deltas: list[dict[BiasSite, Tensor]]


class Bench:
    """Trains settings on the rows of a trainer, over the base that it has loaded.

    Args:
        trainer (`BeftSFTTrainer`): untrained. Its adapter is taken off, so that it is of no use any more.
        folds (`Sequence[Fold]`): the rows to learn from and to judge by.
        labelled (`Sequence`, *optional*): what [`labelled_rows`] gave for the trainer's rows, if it was asked already.
    """

    def __init__(
        self, trainer: BeftSFTTrainer, folds: Sequence[Fold], labelled: Sequence[Mapping[str, Any]] | None = None
    ):
        self.args = copy.copy(trainer.args)
        self.rows: Dataset = trainer.train_dataset
        self.test: Dataset | None = trainer.eval_dataset
        self.given: dict[str, Any] = {
            "processing_class": trainer.processing_class,
            "data_collator": trainer.data_collator,
        }
        self.accelerator = trainer.accelerator
        self.folds = folds
        self.looks = LOOKS if len(folds) == 1 else len(folds)  # at the loss of a trial that is not stopped
        if labelled is None:
            labelled = labelled_rows(trainer, self.rows)
        self.development = [[labelled[number] for number in fold.development] for fold in folds]
        self.tested = labelled_rows(trainer, self.test) if isinstance(self.test, Dataset) else []
        self._caches: dict[int, FrozenLayersCache] = {}  # by the lowest trained layer
        self._base = trainer.detach()
        self.sites = find_bias_sites(self._base)
        self.base_name = str(self._base.name_or_path)

    @contextmanager
    def trainer(
        self, settings: Settings, rows: Dataset, share: bool = True, **changes: Any
    ) -> Iterator[BeftSFTTrainer]:
        """A trainer of these settings on the base, which is given back after it.

        Args:
            settings (`Settings`): of the run.
            rows (`Dataset`): to learn from.
            share (`bool`, *optional*, defaults to `True`): begin with what the frozen layers gave in other trials. In
                16 bits their rounding depends on the batch that a row was in.
            changes: of other fields of its arguments.
        """
        args = with_settings(self.args, settings, changes)
        if "labels" in rows.column_names:  # they are prepared; TRL before 1.16 makes labels as it makes batches
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        with _no_advice():
            trainer = BeftSFTTrainer(self._base, args, train_dataset=rows, **self.given)
        if args.disable_tqdm:
            trainer.remove_callback(PrinterCallback)
        if share and trainer.frozen_cache is not None:
            # What the frozen layers give depends on the base and the row only, and so serves every trial of a span.
            lowest = id(trainer.frozen_cache.frozen.first_trained)
            trainer.frozen_cache = self._caches.setdefault(lowest, trainer.frozen_cache)
        try:
            yield trainer
        finally:
            trainer.detach()

    def run(self, settings: Settings, folder: Path, watch: Watch) -> Trained:
        """Trains the settings on every fold, and judges them by its other rows.

        Args:
            settings (`Settings`): to try.
            folder (`Path`): for the locks of the runs.
            watch (`Callable`): is called after each step. With one fold the loss is measured four times on the way,
                with more after each: the mean over those that are done.

        Raises:
            Stopped: for a reason of `watch`.
            FloatingPointError: if a loss is not finite.
        """
        trained = Trained([], [])
        for number, fold in enumerate(self.folds):
            with self.trainer(settings, self.rows.select(fold.train), output_dir=str(folder), **QUIET) as trainer:
                looks = LOOKS if len(self.folds) == 1 else 1
                judge = _Judge(self, trainer, number, trained, looks, watch)
                trainer.add_callback(judge)
                trainer.train()
                if judge.reason is not None:
                    raise Stopped from judge.reason
                trained.deltas.append(gather_deltas(trainer.model, trainer.trained_sites))
        return trained

    def judge_deltas(
        self, settings: Settings, deltas: Sequence[Mapping[BiasSite, Tensor | None]], folder: Path
    ) -> list[list[RowLoss]]:
        """Judges biases that were not trained here, such as a mean.

        Args:
            settings (`Settings`): whose term and layers they are of.
            deltas (`Sequence`): for each fold.
            folder (`Path`): of the runs, which write nothing.
        """
        judged = []
        with self.trainer(settings, self.rows, output_dir=str(folder), **QUIET) as trainer:
            for number, of_fold in enumerate(deltas):
                set_deltas(trainer.model, of_fold)
                judged.append(self.losses(trainer, self.development[number]))
        return judged

    def losses(self, trainer: BeftSFTTrainer, rows: Sequence[Mapping[str, Any]]) -> list[RowLoss]:
        """The losses of rows, of which each process computes its share."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        cache = trainer.frozen_cache
        size = trainer.args.per_device_eval_batch_size
        mine = row_losses(trainer.model, rows[rank::world], size, cache.in_use() if cache is not None else None)
        if world == 1:
            return mine
        shares = dict(gather_object([(rank, mine)]))
        return [shares[number % world][number // world] for number in range(len(rows))]

    def together(self, value: Any) -> Any:
        """The value of the first process, in all of them."""
        if self.accelerator.num_processes == 1:
            return value
        return broadcast_object_list([value])[0]


class _Judge(TrainerCallback):
    """Measures the development loss at some steps of a trial, and stops it for a reason of `watch`."""

    def __init__(self, bench: Bench, trainer: BeftSFTTrainer, fold: int, trained: Trained, looks: int, watch: Watch):
        self.bench, self.trainer, self.fold, self.trained, self.watch = bench, trainer, fold, trained, watch
        steps = trainer.args.max_steps
        self.marks = {-(-steps * look // looks) for look in range(1, looks + 1)}
        self.reason: Exception | None = None

    def on_step_end(self, args, state, control, **kwargs):
        loss = None
        if state.global_step in self.marks:
            rows = self.bench.losses(self.trainer, self.bench.development[self.fold])
            done = self.trained.rows
            loss = mean_loss([row for each in (*done, rows) for row in each])
            if not math.isfinite(loss):
                raise FloatingPointError(f"The loss on the development rows is {loss} after step {state.global_step}.")
            if state.global_step == args.max_steps:
                done.append(rows)
        elif self.bench.accelerator.num_processes > 1:
            return  # the processes agree where they measure
        # The first process has the study and the clock.
        main = self.bench.accelerator.is_main_process
        self.reason = self.bench.together(self.watch(state.global_step, loss) if main else None)
        control.should_training_stop |= self.reason is not None


@contextmanager
def _no_advice() -> Iterator[None]:
    """Keeps advice on settings to itself: that they are not those of the recipe is the point of a search."""
    logger = logging.getLogger("beft_trl.arguments")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def with_settings(args: Any, settings: Settings, changes: Mapping[str, Any]) -> Any:
    """A copy of training arguments with the settings of a trial, and other fields changed."""
    args = copy.copy(args)
    args.bias_term, args.bias_layers = settings.term, settings.layers
    args.learning_rate, args.max_steps = settings.rate, settings.steps
    if args.relative_learning_rate is not None:
        args.relative_learning_rate = settings.rate
    args.model_init_kwargs = None  # the model is loaded
    args.shuffle_dataset = False  # the rows are prepared, and shuffled if they should be
    for name, value in changes.items():
        # As `__post_init__` has made them: the Trainer compares them to members of enumerations, which are text.
        kind = type(getattr(args, name))
        setattr(args, name, kind(value) if isinstance(value, str) and isinstance(getattr(args, name), str) else value)
    return args


def labelled_rows(trainer: BeftSFTTrainer, rows: Dataset) -> list[dict[str, list[int]]]:
    """Tokens and labels of prepared rows, as the trainer's collator gives them."""
    found = []
    for row in rows:
        batch = trainer.data_collator([row])
        real = batch["attention_mask"][0].bool() if "attention_mask" in batch else slice(None)
        found.append({name: batch[name][0][real].tolist() for name in ("input_ids", "labels")})
    return found


def class_of(row: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """What a row is an example of: the tokens that it teaches."""
    return tuple(label for label in row["labels"] if label != IGNORED)


def save_deltas(deltas: Sequence[Mapping[BiasSite, Tensor]], file: Path) -> None:
    """Writes the biases of each fold, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{fold}.{site.term}.{site.layer}": values.contiguous()
        for fold, of_fold in enumerate(deltas)
        for site, values in of_fold.items()
    }
    partial = file.with_suffix(f".{os.getpid()}")
    write_tensors(partial, tensors)
    partial.replace(file)


def load_deltas(file: Path, sites: Sequence[BiasSite]) -> list[dict[BiasSite, Tensor]]:
    """Reads what [`save_deltas`] wrote, for the sites of the model."""
    site_of = {f"{site.term}.{site.layer}": site for site in sites}
    folds: dict[int, dict[BiasSite, Tensor]] = {}
    for name, values in load_file(file).items():
        fold, _, site = name.partition(".")
        folds.setdefault(int(fold), {})[site_of[site]] = values
    return [folds[number] for number in sorted(folds)]


def mean_deltas(members: Sequence[Mapping[BiasSite, Tensor]]) -> dict[BiasSite, Tensor]:
    """The mean of biases of the same sites."""
    return {site: sum(member[site] for member in members) / len(members) for site in members[0]}  # type: ignore[misc]
