"""`beft tune` from end to end: a search over a recipe's settings, and the winner trained on all rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from datasets import Dataset
from rich.console import Console
from transformers.utils import ADAPTER_CONFIG_NAME

from ..aside import run_steps
from ..checkpoints import check_writable
from ..deltas import gather_deltas, set_deltas
from ..engines import ENGINES, engine_of
from ..evaluation import mean_loss, share_right
from ..trainer import BeftSFTTrainer
from ..tuning.outcome import PICTURE_FILE, RESULT_FILE, Choice, choose, picture_of, section_of, table_of, to_json
from ..tuning.progress import Progress
from ..tuning.space import Settings, Space, space_around
from ..tuning.split import Fold, split_rows
from ..tuning.study import STUDY_FILE, Record, Search, open_study
from ..tuning.trials import QUIET, Bench, class_of, labelled_rows, mean_deltas
from .recipe import Recipe, parse_recipe
from .run import build_trainer, check_base, load_data, next_commands
from .tuned_recipe import given_values, recipe_text


TUNED_FILE = "tuned.yaml"
TRIALS = "trials"  # the folder of the trials' biases
LOGGED = ("logging_strategy", "report_to", "disable_tqdm")
TUNE_ENGINES = ("single", "ddp")


@dataclass
class Tuned:
    """What a search gave.

    Attributes:
        choice: the trials, and what was chosen.
        output_dir: the folder of the adapter, the study and the figures.
        figures: loss and accuracy of the adapter on the test rows, if there are any.
        accelerator: that it ran with.
    """

    choice: Choice
    output_dir: Path
    figures: dict[str, float]
    accelerator: Any = field(repr=False)


def tune(
    recipe: str | Path | BeftSFTTrainer,
    trials: int = 16,
    minutes: float | None = None,
    folds: int | None = None,
    storage: str | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Tuned:
    """Searches term, layers, rate and steps by the loss on rows taken from the training rows, and trains the winner.

    The default settings are the first trial, and stay unless another is ahead by more than chance. The base is
    loaded once. Every process of a DDP run calls it.

    Args:
        recipe (`str`, `Path` or `BeftSFTTrainer`): a YAML file, or a trainer that has not trained, whose base is
            taken; its `eval_dataset` is the test set.
        trials (`int`, *optional*, defaults to 16): in all, with those of earlier calls.
        minutes (`float`, *optional*): limit of the search. The winner is trained after it.
        folds (`int`, *optional*): of cross-validation. Default: none, a quarter of the rows is held back.
        storage (`str`, *optional*): URL of the study's database. Default: a file in the output folder.
        output (`str` or `Path`, *optional*): folder. Default: that of the recipe with `-tuned`.
        overrides (`Sequence[str]`, *optional*): of the recipe's fields, as `--name value`.

    Returns:
        `Tuned`: trials, choice and test figures.

    Raises:
        ImportError: without Optuna.
        OSError, ValueError: for a recipe or trainer that cannot be searched (a recipe before any weight is loaded), or
            a study of something else.
    """
    _check_numbers(trials, minutes, folds)
    parsed: Recipe | None = None
    if isinstance(recipe, BeftSFTTrainer):
        trainer = recipe
        _refuse(trainer.args)
        _refuse_used(trainer)
        values: dict[str, Any] | None = None
    else:
        argv = ["--config", str(recipe), *overrides]
        parsed = parse_recipe(argv)
        values = given_values(str(recipe), overrides)
        _refuse(parsed.training)
    args = parsed.training if parsed is not None else trainer.args
    folder = Path(output) if output is not None else Path(f"{Path(str(args.output_dir))}-tuned")
    check_writable(folder)
    if (folder / ADAPTER_CONFIG_NAME).exists() and not (folder / RESULT_FILE).exists():
        raise ValueError(
            f"{folder} holds an adapter that no search wrote, and this one would take its place. Give another "
            "--output."
        )
    if parsed is not None:
        check_base(parsed)
        parsed.training.output_dir = str(folder)
        data = load_data(parsed)
        _check_rows(data.train, folds)
        trainer = build_trainer(parsed, data)
    return _tune(trainer, folder, values, trials, minutes, folds, storage)


def _check_numbers(trials: Any, minutes: Any, folds: Any) -> None:
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials={trials!r} cannot be: give a whole number of at least 1.")
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or minutes <= 0):
        raise ValueError(f"minutes={minutes!r} cannot be: give a number above 0, or leave it out.")
    if folds is not None and (isinstance(folds, bool) or not isinstance(folds, int) or folds < 2):
        raise ValueError(f"folds={folds!r} leaves nothing to judge by: give at least 2, or leave it out.")


def refuse_engine(engine: str) -> None:
    """Raises ValueError for an engine that has to be built again for each trial.

    Args:
        engine: name in `engines.ENGINES`.
    """
    if engine not in TUNE_ENGINES:
        raise ValueError(
            f"beft tune runs in one process or under DDP, and this is {ENGINES[engine]}, whose engine would have to "
            "be built again for each trial. Use --launch ddp, or train the settings one by one with beft train."
        )


def _refuse(args: Any) -> None:
    refuse_engine(engine_of(args))
    if args.packing or args.padding_free:
        name = "packing" if args.packing else "padding_free"
        raise ValueError(
            f"{name}=True puts rows together, and beft tune judges by single rows that were left out. Leave {name} "
            "out."
        )
    if args.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint is of one run. A search goes on by itself: leave it out.")


def _check_rows(rows: Any, folds: int | None) -> None:
    if not isinstance(rows, Dataset):
        raise ValueError("The rows are a stream, of which none can be set aside to judge by: leave streaming out.")
    split_rows(range(len(rows)), folds, 0)  # says if they are too few


def _refuse_used(trainer: BeftSFTTrainer) -> None:
    if trainer.bias_scores is not None or trainer.state.global_step:
        raise ValueError("The trainer has trained already. Give one that has not: its base is taken for the trials.")
    own = [
        name
        for name in ("compute_loss_func", "compute_metrics", "optimizer_cls_and_kwargs", "_formatting_func")
        if getattr(trainer, name, None) is not None
    ]
    if type(trainer) is not BeftSFTTrainer or own:
        raise ValueError(
            f"The trials are runs of BeftSFTTrainer with only its settings, and this trainer has its own "
            f"{', '.join(own) or 'class, ' + type(trainer).__name__}: they would be left out. Give one without."
        )


def _tune(
    trainer: BeftSFTTrainer,
    folder: Path,
    values: dict[str, Any] | None,
    trials: int,
    minutes: float | None,
    folds: int | None,
    storage: str | None,
) -> Tuned:
    _check_rows(trainer.train_dataset, folds)
    main = trainer.accelerator.is_main_process
    args, asked = trainer.args, trainer.args.bias_term
    steps = run_steps(trainer)
    labelled = labelled_rows(trainer, trainer.train_dataset)
    whole = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in labelled]
    splits = split_rows([class_of(row) for row in labelled], folds, args.seed, whole)
    about = trainer.identity()
    bench = Bench(trainer, splits, labelled)
    rate = args.relative_learning_rate if args.relative_learning_rate is not None else args.learning_rate
    default = Settings(asked, args.bias_layers, rate, steps)
    ranking = _ranking(bench, default, splits[0], folder) if asked == "auto" else []
    default = default._replace(term=ranking[0]) if ranking else default
    space = space_around(default, ranking, bench.sites)
    folder.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{folder / STUDY_FILE}"
    study = open_study(url, {**about, "space": space, "folds": folds}) if main else None
    console = Console(highlight=False)
    result = _Result(folder, values, _judged_by(splits), args.relative_learning_rate is not None)
    with Progress(console if main else None, trials, minutes) as progress:
        search = Search(bench, space, study, folder / TRIALS, progress)
        progress.records = search.records if main else list
        try:
            search.run(trials, minutes)
        except KeyboardInterrupt:
            progress.close()
            if main:
                _tell_interrupted(search.records(), space, result, console)
            raise
    records = bench.together(search.records() if main else None)
    choice = choose(space, records, search.soup(records))
    if main:
        console.print(table_of(choice))
        result.write(choice)
    figures = _train_winner(bench, choice, result)
    if main:
        result.write(choice, {"test": figures})
        for name, value in figures.items():
            console.print(f"Test {name}: {value:.4f}")
        written = [RESULT_FILE, PICTURE_FILE, *([TUNED_FILE] if values is not None else [])]
        console.print(f"Wrote {folder}: the adapter, {', '.join(written)}.", markup=False)
        console.print(next_commands(folder, bench.base_name), markup=False)
    return Tuned(choice, folder, figures, bench.accelerator)


class _Result(NamedTuple):
    """Where what was found goes, and what it is told with."""

    folder: Path
    values: dict[str, Any] | None  # of the recipe, if there is one
    judged_by: str
    relative: bool

    def write(self, choice: Choice, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Writes figures, picture and recipe."""
        texts = {RESULT_FILE: to_json(choice, {"judged_by": self.judged_by, **more})}
        if self.values is not None:
            texts[TUNED_FILE] = recipe_text(choice, self.values, self.folder, self.relative)
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        (self.folder / PICTURE_FILE).write_bytes(picture_of(choice))


def _judged_by(splits: Sequence[Fold]) -> str:
    if len(splits) > 1:
        rows = sum(len(fold.development) for fold in splits)
        return f"on {rows} rows in {len(splits)} folds, each judged by what was trained on the others"
    return f"on {len(splits[0].development)} rows that were not trained on, with {len(splits[0].train)} to learn from"


def _tell_interrupted(records: list[Record], space: Space, result: _Result, console: Console) -> None:
    """What is known so far, in the files too."""
    try:
        choice = choose(space, records, None)
    except ValueError:
        console.print("No trial is done yet. The same command begins with what is left.")
        return
    result.write(choice)
    console.print(table_of(choice))
    console.print(f"Best so far, in {result.folder}. The same command goes on.", markup=False)


def _ranking(bench: Bench, default: Settings, fold: Fold, folder: Path) -> list[str]:
    """The terms by their scores, on rows that the trials learn."""
    with bench.trainer(default, bench.rows.select(fold.train), output_dir=str(folder), **QUIET) as trainer:
        return trainer.score().ranking


def _train_winner(bench: Bench, choice: Choice, result: _Result) -> dict[str, float]:
    """Trains the choice on all rows as an ordinary run, saves it, and measures it on the test rows."""
    members: list[Any] = []
    for number, settings in enumerate(choice.members, 1):
        # Every checkpoint and evaluation would be one of no run of the user's; what is logged is.
        quiet = {name: value for name, value in QUIET.items() if name not in LOGGED}
        # With nothing that trials kept: `beft train` with the recipe that is written gives the same bits.
        apart = {**quiet, "share": False, "output_dir": str(result.folder / TRIALS)}
        with bench.trainer(settings, bench.rows, **apart) as trainer:
            trainer.train()
            members.append(gather_deltas(trainer.model, trainer.trained_sites))
            if number < len(choice.members):
                continue
            if number > 1:
                set_deltas(trainer.model, mean_deltas(members))
                trainer.state.log_history.clear()  # a learning curve of the last member would not be that of the mean
            trainer.card_sections = [section_of(choice, PICTURE_FILE, result.judged_by)]
            trainer.save_model(str(result.folder))
            if bench.tested:
                rows = bench.losses(trainer, bench.tested)
                return {"loss": mean_loss(rows), "accuracy": share_right(rows)}
    return {}
