"""The `beft` command, thin: what it does is done elsewhere."""

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape


if TYPE_CHECKING:
    from ..merge.adapter import MergeReport
    from .recipe import Recipe


app = typer.Typer(
    help="Fine-tunes language models by one attention bias.",
    epilog="Exit codes: 0 done, 1 failed with one paragraph on stderr, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# What Typer raises for wrong usage, a class of its own copy of click in newer versions.
USAGE_ERROR: Any = typer.BadParameter.__base__
# Errors whose text is for the user; any other is a defect, and its traceback is of use.
EXPLAINED = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
# A recipe's fields come after it as they do with TRL's scripts: `--learning_rate 1e-3`.
TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipePath = Annotated[str, typer.Argument(help="YAML file; its fields can be overridden after it: --seed 1.")]
Launch = Annotated[
    str | None,
    typer.Option(help="Launch configuration: ddp, zero1, zero2, zero3, ..., or a file of accelerate's."),
]

NewFolder = Annotated[Path, typer.Option(help="Folder to write, new or empty.")]
Base = Annotated[
    str | None, typer.Option(help="Folder or hub name of the base model. Default: what the adapter names.")
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option(help="Folder of llama.cpp's source, whose converter writes the GGUF. Default: $LLAMA_CPP."),
]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


@app.command(context_settings=TAKES_OVERRIDES)
def check(
    context: typer.Context,
    recipe: RecipePath,
    launch: Launch = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load the weights; do a scoring and a training step.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says what a recipe would do, without its weights, and every reason why it cannot.

    Bias sites, engine and precision, memory, supervised tokens, steps. Exit code 0 only if the run can start.
    """
    with _quiet():
        _tell_working(f"Reading {recipe}, its data and its model's configuration")
        from .check import check_recipe
        from .check_report import check_report

        found = check_recipe(recipe, context.args, launch, dry_run, _tell_working)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        console = Console(highlight=False)
        for part in check_report(found):
            console.print(part)
    if found.problems:
        raise typer.Exit(1)


@app.command(context_settings=TAKES_OVERRIDES)
def score(
    context: typer.Context,
    recipe: RecipePath,
    steps: Annotated[
        str | None, typer.Option(help="Optimizer steps of the pass, or several, as in 5,10,20, to compare them.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for beft_scores.json and .png. Default: output_dir of the recipe.")
    ] = None,
) -> None:
    """Runs only the scoring pass, prints its table, and writes the scores and their heat map."""
    counts = _numbers(steps)
    _tell_working(f"Reading {recipe}")
    from .run import score as run_score

    run_score(_parse(recipe, [*context.args, "--bias_term", "auto"]), counts, output)


@app.command(context_settings=TAKES_OVERRIDES)
def train(context: typer.Context, recipe: RecipePath, launch: Launch = None) -> None:
    """Scores, selects and trains a bias term, and saves the adapter.

    Under a launcher of your own: accelerate launch -m beft_trl.cli train RECIPE.
    """
    if launch is not None:
        from .launch import launch_command

        raise typer.Exit(subprocess.call(launch_command(launch, ["train", recipe, *context.args])))
    _tell_working(f"Reading {recipe}")
    from .run import leave
    from .run import train as run_train

    leave(run_train(_parse(recipe, context.args)))


@app.command(context_settings=TAKES_OVERRIDES)
def tune(
    context: typer.Context,
    recipe: RecipePath,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, with those of earlier calls.")] = 16,
    minutes: Annotated[
        float | None, typer.Option(help="Limit of the search; the winner is trained after it. Default: none.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Folds of cross-validation. Default: a quarter of the rows is held back.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="URL of the study's database. Default: a file in the output folder.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder. Default: output_dir of the recipe with -tuned.")] = None,
    launch: Launch = None,
) -> None:
    """Searches term, layers, rate and steps by the loss on rows that are held back, and trains the winner.

    The test file is only for the final figure. An interrupted search goes on with the same command.
    """
    if launch is not None:
        from .launch import launch_command, launched_engine
        from .tune import refuse_engine

        refuse_engine(launched_engine(launch)[0])
        given = {"--minutes": minutes, "--folds": folds, "--storage": storage, "--output": output}
        options = [str(part) for name, value in given.items() if value is not None for part in (name, value)]
        command = ["tune", recipe, "--trials", str(trials), *options, *context.args]
        raise typer.Exit(subprocess.call(launch_command(launch, command)))
    _tell_working(f"Reading {recipe}")
    from .run import leave
    from .tune import tune as run_tune

    leave(run_tune(recipe, trials, minutes, folds, storage, output, context.args))


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[str], typer.Argument(help="Folders of adapters, and folders or hub names of models, merged ones too.")
    ],
    test_file: Annotated[
        str, typer.Option("--test_file", "--test-file", help="Held-out rows: JSON, JSONL, CSV or Parquet.")
    ],
    base: Annotated[str | None, typer.Option(help="Base model of the adapters. Default: what each names.")] = None,
    choices: Annotated[
        str | None, typer.Option(help="Answers to rank, as in yes,no. Default: the completions, if they are classes.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.", show_default="by device")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", "--batch-size", min=1, help="Rows at a time.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens",
            "--max-new-tokens",
            min=1,
            help="Tokens of a written answer. Default: enough for the longest completion, and at least 8.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures and answers.")] = None,
) -> None:
    """Measures adapters, their bases and models side by side on held-out rows.

    Loss, answers that equal the completion, answers by rank of the choices, and a confusion matrix for classes.
    """
    with _quiet():
        _tell_working(f"Reading {test_file}")
        from .evaluate import evaluate_targets, print_evaluation

        ranked = [part.strip() for part in choices.split(",")] if choices is not None else None
        measured = evaluate_targets(targets, test_file, base, ranked, dtype, batch_size, max_new_tokens, _tell_working)
    print_evaluation(measured, test_file, json_file)


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="Folder of an adapter.")]) -> None:
    """Tells what an adapter holds: base, term, layers, norm of each delta, scores, versions."""
    _tell_working(f"Reading {folder}")
    from .info import adapter_report

    console = Console(highlight=False)
    for part in adapter_report(folder):
        console.print(part)


@app.command()
def merge(
    output: NewFolder,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the adapter. Default: none, the base gets biases of zero.")
    ] = None,
    base: Base = None,
    output_projection: Annotated[
        bool, typer.Option("--output-projection", help="Turn the value bias into one of the output projection.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard-link shards that do not change.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the logits of both models, which loads them.")] = True,
    server: Annotated[
        str, typer.Option("--for", help="What is to serve it: transformers, vllm, sglang, llama.cpp, ollama or mlx.")
    ] = "transformers",
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Add a GGUF of the merged model, with --for llama.cpp.")
    ] = False,
    llama_cpp: LlamaCpp = None,
) -> None:
    """Writes a plain Transformers checkpoint with the adapter's biases in it."""
    if adapter is None and (base is None or output_projection or gguf or server != "transformers"):
        raise typer.BadParameter("Give an adapter, or only --base for that base with biases of zero.")
    if adapter is None:
        _tell_working(f"Adding biases of zero to {base}")
    else:
        _tell_working(f"Merging {adapter}" + (", and comparing the logits of both models" if verify else ""))
    from ..merge.adapter import merge_adapter
    from ..merge.zero_biases import add_zero_biases

    if adapter is not None:
        _tell(merge_adapter(adapter, output, base, output_projection, verify, link, server, gguf, llama_cpp))
    elif base is not None:
        _tell(add_zero_biases(base, output, link))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter, of this package or of plain PEFT.")],
    output: NewFolder,
    base: Base = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="A few hundred rows like those of the run. Not needed if the vectors of the base are kept."),
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="File that keeps the base's vectors. Default: in the cache of the hub.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it even if it is too far from the adapter.")] = False,
    file_format: Annotated[
        str, typer.Option("--format", help="lora, or gguf to add a GGUF of it, for llama-server --lora.")
    ] = "lora",
    llama_cpp: LlamaCpp = None,
) -> None:
    """Writes the adapter as an ordinary LoRA of rank 1, for servers that apply LoRAs: vLLM, SGLang, llama.cpp."""
    with _quiet():
        _tell_working(f"Loading the base of {adapter}, and comparing the adapter with the LoRA")
        from ..export.lora import export_lora
        from .export import export_report, read_texts

        texts = read_texts(rows, adapter, base) if rows is not None else None
        report = export_lora(adapter, output, base, texts, vectors, force, file_format, llama_cpp)
    console = Console(highlight=False)
    for part in export_report(report):
        console.print(part)


@click.command("merge-beft")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: merged, in output_dir.")
@click.option("--verify/--no-verify", default=True, help="Compare the logits of both models, which loads them.")
def merge_beft(config: Path, output: Path | None, verify: bool) -> None:
    """Fold the BEFT adapter of an Axolotl CONFIG into a plain Transformers checkpoint."""
    import yaml

    from ..merge.adapter import merge_adapter

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    adapter = Path(settings.get("output_dir", "model-out"))
    try:
        _tell(merge_adapter(adapter, output or adapter / "merged", settings["base_model"], verify=verify))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _parse(recipe: str, overrides: Sequence[str]) -> "Recipe":
    from .recipe import parse_recipe

    return parse_recipe(["--config", recipe, *overrides])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and warnings of the libraries from a report, and their logs from standard output."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _tell_working(text: str) -> None:
    """Says on a terminal what goes on, before seconds without a word: importing PyTorch and TRL takes some, too."""
    if sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes that were launched
        print(f"{text} ...", file=sys.stderr, flush=True)


def _numbers(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers above 0, such as 5,10,20.", param_hint="--steps"
        )
    return [int(part) for part in text.split(",")]


def _tell(report: "MergeReport") -> None:
    say = Console(highlight=False, markup=False).print
    say(f"Wrote {report.output}: {len(report.changed)} tensors changed, {len(report.added)} added. {report.rule}")
    if report.quantized_difference is not None:
        say(
            f"To the quantised base that the adapter was trained on: {report.quantized_difference:.1e} of the "
            "largest. The merged weights are not quantised."
        )
    if report.difference is not None:
        say(f"Largest difference of a logit to base plus adapter: {report.difference:.1e} of the largest.")
    else:
        say("Not verified: the logits were not compared.")
    if report.gguf is not None:
        say(f"  llama-server -m {report.gguf}")


@contextmanager
def explained_errors() -> Iterator[None]:
    """Ends the process with one paragraph on stderr for an error that explains itself, unless `--debug` is given.

    An interruption ends it with 130. Other errors are defects, and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # rows and paths have letters that a terminal may not have
    # TRL (1.16) and PEFT (0.21) use the names that Transformers (5.23) renames. This goes when they use the new ones.
    renamed = "`(is_)?gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    try:
        yield
    except (typer.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, USAGE_ERROR):
            error.show()
            sys.exit(error.exit_code)
        if "--debug" in sys.argv or not isinstance(error, EXPLAINED):
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(1)


def main() -> None:
    """The entry point of the `beft` command."""
    with explained_errors():
        sys.exit(app(standalone_mode=False) or 0)  # not standalone, where Ctrl-C would end in 1
