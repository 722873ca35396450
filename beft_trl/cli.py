"""The `beft` command.

Exit codes: 0 done, 1 failed with one paragraph on stderr, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console


if TYPE_CHECKING:
    from .merge import MergeReport


app = typer.Typer(
    help="Fine-tunes language models by one attention bias.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter, of this package or of plain PEFT.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub name of the base model. Default: what the adapter names.")
    ] = None,
    output_projection: Annotated[
        bool, typer.Option("--output-projection", help="Turn the value bias into one of the output projection.")
    ] = False,
    link: Annotated[bool, typer.Option("--link", help="Hard-link shards that do not change.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the logits of both models, which loads them.")] = True,
) -> None:
    """Writes a plain Transformers checkpoint with the adapter's biases in it."""
    from .merge import merge_adapter

    _tell(merge_adapter(adapter, output, base, output_projection, verify, link))


@click.command("merge-beft")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: merged, in output_dir.")
@click.option("--verify/--no-verify", default=True, help="Compare the logits of both models, which loads them.")
def merge_beft(config: Path, output: Path | None, verify: bool) -> None:
    """Fold the BEFT adapter of an Axolotl CONFIG into a plain Transformers checkpoint."""
    import yaml

    from .merge import merge_adapter

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    adapter = Path(settings.get("output_dir", "model-out"))
    try:
        _tell(merge_adapter(adapter, output or adapter / "merged", settings["base_model"], verify=verify))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _tell(report: "MergeReport") -> None:
    say = Console(highlight=False).print
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


def main() -> None:
    """The entry point: errors are one paragraph on stderr, unless `--debug` asks for the traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {str(error).replace('[', chr(92) + '[')}")
        sys.exit(1)


if __name__ == "__main__":
    main()
