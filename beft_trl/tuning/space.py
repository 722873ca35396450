"""What `beft tune` searches: which term, in which layers, how fast and for how many steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..layout import BiasSites
from ..spans import ranges, sites_in


RATE_FACTOR = 5.0  # rates from a fifth to five times that of the recipe
STEP_FACTOR = 2.0  # steps from half to twice those of the recipe


class Settings(NamedTuple):
    """The settings of a trial.

    Attributes:
        term: `bias_term`.
        layers: `bias_layers`.
        rate: `relative_learning_rate`, or `learning_rate` for a recipe that gives one for all layers.
        steps: `max_steps`.
    """

    term: str
    layers: str
    rate: float
    steps: int


@dataclass(frozen=True)
class Space:
    """The settings among which a search chooses.

    Attributes:
        default: what the recipe does by itself.
        terms: in the order of their scores.
        layers: values of `bias_layers`, that of the default first.
        rates: the lowest and the highest.
        steps: the fewest and the most.
    """

    default: Settings
    terms: tuple[str, ...]
    layers: tuple[str, ...]
    rates: tuple[float, float]
    steps: tuple[int, int]

    def first(self) -> list[Settings]:
        """What is tried before the sampler chooses, each next to the default with one setting changed: a larger rate,
        half-way to the highest, and then the other terms in the order of their scores.
        """
        larger = self.default._replace(rate=math.sqrt(self.default.rate * self.rates[1]))
        terms = [self.default._replace(term=term) for term in self.terms if term != self.default.term]
        return [self.default, larger, *terms]

    def suggest(self, trial: Any, affordable: float = math.inf) -> Settings:
        """The settings that a study asks a trial to try.

        Args:
            trial (`optuna.Trial`): of a study of this space.
            affordable (`float`, *optional*): steps that there is time for. Those of the default are always tried.
        """
        fewest, most = self.steps
        most = max(self.default.steps, int(min(most, affordable)))
        return Settings(
            trial.suggest_categorical("term", self.terms),
            trial.suggest_categorical("layers", self.layers),
            trial.suggest_float("rate", *self.rates, log=True),
            trial.suggest_int("steps", fewest, most, log=True),
        )


def space_around(default: Settings, ranking: Sequence[str], sites: BiasSites) -> Space:
    """The space around the settings of a recipe.

    Args:
        default (`Settings`): of the recipe.
        ranking (`Sequence[str]`): the terms that can be trained, by their scores. Empty if the recipe names its term,
            which is kept then.
        sites (`BiasSites`): of the whole model.
    """
    terms: tuple[str, ...] = (default.term,)
    if ranking:
        terms = (*ranking, "all") if len(ranking) > 1 else tuple(ranking)
    layers = sorted({site.layer for site in sites})
    specs = {default.layers: None, "upper": None, "all": None, ranges(layers[-(-2 * len(layers) // 3) :]): None}
    spans: dict[frozenset[int], str] = {}
    for spec in specs:
        if spec:
            spans.setdefault(frozenset(site.layer for site in sites_in(sites, spec)), spec)
    rates = (default.rate / RATE_FACTOR, default.rate * RATE_FACTOR)
    steps = (max(1, round(default.steps / STEP_FACTOR)), round(default.steps * STEP_FACTOR))
    return Space(default, terms, tuple(spans.values()), rates, steps)
