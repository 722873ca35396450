"""Scores of bias terms: pure functions on tensors, and `BiasScores`, the table that they fill."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .layout import TERMS, BiasSite


SCORES_FILE = "beft_scores.json"
# Keys of the file that earlier ones lack.
OPTIONAL_KEYS = ("layers", "quantization", "notes", "versions")
# score_method -> the score that ranks by it
SCORE_OF_METHOD = {"beft": "importance", "magnitude": "magnitude", "fisher": "fisher"}


def importance(b1: Tensor, b0: Tensor) -> Tensor:
    """BEFT's importance of a bias term in one layer: the angle and the change of magnitude together.

        1 - <b1, b0> / max(||b1||, ||b0||)^2

    Args:
        b1: the bias after a short training, shape (n,).
        b0: the bias before it, shape (n,).

    Returns:
        A float64 scalar in [0, 2]: 0 for no change (two zero vectors included), 1 if one of the two is zero or they
        are orthogonal, above 1 for an angle over 90 degrees.

    Raises:
        ValueError: for shapes that differ.

    Source: https://arxiv.org/abs/2509.15974, the projection-ratio score of section 3.
    """
    if b1.shape != b0.shape:
        raise ValueError(f"importance compares two biases of one shape, got {tuple(b1.shape)} and {tuple(b0.shape)}.")
    shorter, longer = sorted((b1.double(), b0.double()), key=lambda bias: float(bias @ bias))
    if not longer.any():
        return torch.zeros((), dtype=torch.float64)
    # The difference first, so that no change is exactly 0 and a small one keeps its digits.
    return ((longer - shorter) @ longer / (longer @ longer)).clamp(0, 2)


def magnitude(b1: Tensor, b0: Tensor) -> Tensor:
    """Mean absolute change of a bias, float64 scalar, in the bias's own units. A baseline of the same paper."""
    return (b1.double() - b0.double()).abs().mean()


def fisher(gradients: Tensor) -> Tensor:
    """Mean squared batch gradient of a bias, the diagonal of the empirical Fisher information.

    Args:
        gradients: shape (batches, n), one gradient of the mean loss per batch, all at the same bias.

    Returns:
        A float64 scalar.
    """
    return gradients.double().square().mean()


@dataclass(frozen=True)
class LayerScores:
    """The three scores of one bias term in one layer."""

    layer: int
    importance: float
    magnitude: float
    fisher: float


@dataclass(frozen=True)
class TermScores:
    """One bias term: its size, why it is dead (or `None`), and its scores in each live layer, if it was scored."""

    parameters: int
    dead: str | None = None
    layers: list[LayerScores] = field(default_factory=list)

    def score(self, name: str) -> float | None:
        """Mean over the layers of `"importance"`, `"magnitude"` or `"fisher"`; `None` if nothing was scored."""
        return fmean(getattr(layer, name) for layer in self.layers) if self.layers else None


@dataclass(frozen=True)
class BiasScores:
    """What a scoring pass found, and the bias term that is trained.

    Attributes:
        selected: `"query"`, `"key"`, `"value"` or `"all"`.
        method: `"beft"`, `"magnitude"` or `"fisher"`; `None` if the term was given and nothing was scored.
        anchor: `"bias"` or `"activation"`, what the biases before training were taken to be; `None` likewise.
        steps: optimizer steps of the scoring pass.
        base_model: name or path of the base model.
        terms: for each of query, key and value, its scores.
        layers: numbers of the layers that `bias_layers` names; empty in files of earlier versions.
        quantization: the configuration that the base model was quantised with, or `None`.
        notes: sentences on layers that were left out, and on dead terms of single layers.
        versions: of this package and of those that the run stood on, by name.
    """

    selected: str
    method: str | None
    anchor: str | None
    steps: int
    base_model: str
    terms: dict[str, TermScores]
    layers: list[int] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def covers(self, site: BiasSite) -> bool:
        """Whether the bias at `site` is alive: it was scored, or its structure says so if nothing was."""
        if self.method is None:
            return site.dead is None
        return any(layer.layer == site.layer for layer in self.terms[site.term].layers)

    def trained_sites(self, candidates: Iterable[BiasSite]) -> list[BiasSite]:
        """The live ones of `candidates` whose term is selected: what a run trains."""
        return [site for site in candidates if self.selected in (site.term, "all") and self.covers(site)]

    @property
    def ranking(self) -> list[str]:
        """The live terms, best first, by `method`; empty if nothing was scored."""
        return [] if self.method is None else rank(self.terms, self.method)

    @property
    def margin(self) -> float | None:
        """The best term's score over the second's; `None` without a second or if the second is zero."""
        if len(self.ranking) < 2:
            return None
        best, second = (self.terms[term].score(self.ranked_by) for term in self.ranking[:2])
        return best / second if best is not None and second else None

    @property
    def ranked_by(self) -> str:
        """Name of the score that `method` ranks by, `"importance"` if there is no method."""
        return SCORE_OF_METHOD[self.method or "beft"]

    def to_dict(self) -> dict[str, Any]:
        """The content of `beft_scores.json`."""
        return {
            "selected": self.selected,
            "ranking": self.ranking,
            "method": self.method,
            "anchor": self.anchor,
            "steps": self.steps,
            "base_model": self.base_model,
            "layers": self.layers,
            "quantization": self.quantization,
            "notes": self.notes,
            "versions": self.versions,
            "terms": {
                name: {
                    **{score: term.score(score) for score in SCORE_OF_METHOD.values()},
                    "dead": term.dead,
                    "parameters": term.parameters,
                    "layers": [asdict(layer) for layer in term.layers],
                }
                for name, term in self.terms.items()
            },
        }

    def to_json(self, path: str | Path, learning_rates: Mapping[str, float] | None = None) -> None:
        """Writes `beft_scores.json`. The same scores give the same bytes.

        Args:
            path (`str` or `Path`): the file.
            learning_rates (`dict[str, float]`, *optional*): of the trained deltas, by the path of their module, if
                `relative_learning_rate` sets them; see [`recorded_learning_rates`].
        """
        record = {**self.to_dict(), "learning_rates": dict(learning_rates or {})}
        Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> "BiasScores":
        """Reads what `to_json` wrote.

        Raises:
            ValueError: if the file is not JSON, lacks a key or has a value that no run writes, with path and reason.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            terms = {
                name: TermScores(
                    parameters=term["parameters"],
                    dead=term["dead"],
                    layers=[LayerScores(**layer) for layer in term["layers"]],
                )
                for name, term in record["terms"].items()
            }
            fields = {name: record[name] for name in ("selected", "method", "anchor", "steps", "base_model")}
            _check_values(terms, **fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} does not hold the scores of a BEFT run ({type(error).__name__}: {error}). "
                "Use a folder that a BEFT run wrote, or train again."
            ) from error
        optional = {name: record[name] for name in OPTIONAL_KEYS if name in record}
        return cls(terms=terms, **fields, **optional)


def _check_values(terms: dict[str, TermScores], selected: Any, method: Any, **others: Any) -> None:
    if not set(terms) <= set(TERMS) or selected not in (*TERMS, "all") or method not in (*SCORE_OF_METHOD, None):
        raise ValueError(f"terms={list(terms)}, selected={selected!r}, method={method!r}")
    if selected != "all" and selected not in terms:
        raise ValueError(f"selected={selected!r} is not among the terms")
    scored = [value for term in terms.values() for layer in term.layers for value in asdict(layer).values()]
    sizes = [term.parameters for term in terms.values()]
    if not all(isinstance(value, (int, float)) for value in (*scored, *sizes, others["steps"])):
        raise TypeError("a score, a size or a number of steps is no number")
    if not isinstance(others["base_model"], str) or others["anchor"] not in ("bias", "activation", None):
        raise TypeError(f"base_model={others['base_model']!r}, anchor={others['anchor']!r}")


def recorded_learning_rates(path: str | Path) -> dict[str, float]:
    """The learning rates that a `beft_scores.json` holds, by the path of their module; empty if it holds none."""
    return json.loads(Path(path).read_text(encoding="utf-8")).get("learning_rates", {})


def rank(terms: dict[str, TermScores], method: str) -> list[str]:
    """The scored terms in falling order of the score that `method` ranks by."""
    scored = [name for name, term in terms.items() if term.layers]
    return sorted(scored, key=lambda name: terms[name].score(SCORE_OF_METHOD[method]) or 0.0, reverse=True)
