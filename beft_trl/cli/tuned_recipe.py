"""The recipe of a search's winner: what was given, with the settings that were found."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..tuning.outcome import Choice
from ..tuning.space import Settings


# What a search sets, and so takes out of the recipe.
SEARCHED = (
    "bias_term", "bias_layers", "relative_learning_rate", "learning_rate", "max_steps", "num_train_epochs",
    "output_dir",
)  # fmt: skip


def given_values(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of a recipe, with what was overridden after it.

    Args:
        recipe: a YAML file that has been parsed without an error.
        overrides: as `--name value`, `--name=value`, or a flag by itself.
    """
    values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}
    name: str | None = None
    for text in overrides:
        if text.startswith("--"):
            name, _, value = text.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            values[name] = _value(value) if "=" in text else True
            name = None if "=" in text else name
        elif name is not None:
            # Several values after a name are a list.
            before = values[name]
            value = _value(text)
            values[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return values


def _value(text: str) -> Any:
    """A value of the command line as a recipe has it. Words stay words: YAML would take `no` for false."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if value is None else value


def recipe_text(choice: Choice, values: dict[str, Any], folder: Path, relative: bool) -> str:
    """A recipe that trains the winner with `beft train`.

    Args:
        choice (`Choice`): what was found.
        values (`dict`): of [`given_values`].
        folder (`Path`): of the search; the recipe writes into a folder in it.
        relative (`bool`): whether the rate is relative.
    """
    comments = ["# Written by beft tune: the recipe that it was given, with the settings that it chose."]
    comments += _comment(choice.sentence())
    if choice.kind == "soup":
        others = "; ".join(_told(settings) for settings in choice.members[1:])
        comments += _comment(
            "The adapter of the search is the mean of the biases of several runs. This recipe is the first of them; "
            f"the others differ from it in rate and steps: {others}."
        )
    kept = {name: value for name, value in values.items() if name not in SEARCHED}
    settings = choice.members[0]
    found = {
        "bias_term": settings.term,
        "bias_layers": settings.layers,
        "relative_learning_rate" if relative else "learning_rate": settings.rate,
        "max_steps": settings.steps,
        "output_dir": str(folder / "retrained"),
    }
    return "\n".join(comments) + "\n\n" + yaml.safe_dump({**kept, **found}, sort_keys=False, allow_unicode=True)


def _told(settings: Settings) -> str:
    return f"rate {settings.rate!r}, {settings.steps} steps"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 110)]
