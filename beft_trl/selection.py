"""What a run trains: the bias term, by its scores or as given, and the learning rates of its layers."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from .aside import run_steps
from .config import default_score_steps
from .deltas import gather_deltas
from .identity import quantization_of
from .importance import BiasScores, rank
from .layout import TERMS, BiasSites
from .rates import relative_learning_rates
from .scoring import ScoringResult, measure_sizes, score_biases, score_steps, score_terms
from .tuner import Deltas


def choose(
    trainer: Any, deltas: Deltas, sites: BiasSites, term: str, run: Callable[[], Any]
) -> tuple[BiasScores, dict[str, float]]:
    """Selects `term`, or the best one for `"auto"`, and measures the learning rates if they are relative.

    The arguments are those of [`scoring.score_biases`].

    Returns:
        The scores with what they select, and the learning rates by the path of their module.
    """
    args = trainer.args
    result = scoring_pass(trainer, deltas, sites, run) if term == "auto" else None
    scores = scores_of(trainer, sites, result, term)
    share = args.relative_learning_rate
    if share is None:
        return scores, {}
    if result is not None:
        found = result.sizes
    else:
        steps = run_steps(trainer)
        steps = min(args.score_steps or default_score_steps(steps), steps)
        found = measure_sizes(trainer, deltas, steps, run)
    return scores, relative_learning_rates(share, found, scores.trained_sites(deltas.candidates))


def scoring_pass(
    trainer: Any, deltas: Deltas, sites: BiasSites, run: Callable[[], Any], asked: int | None = None
) -> ScoringResult:
    """The scoring pass of a trainer, see [`scoring.score_biases`], of `asked` steps or of those that it is set to.

    Raises:
        RuntimeError: after `train()` under DeepSpeed.
        ValueError: for no steps, or more than the run has.
    """
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        raise RuntimeError(
            "score() after train() would take the trained biases out of DeepSpeed's engine. Call it before, or "
            "make another trainer for it."
        )
    steps = score_steps(trainer.args.score_steps if asked is None else asked, run_steps(trainer))
    return score_biases(trainer, deltas, sites, steps, run)


def scores_of(trainer: Any, sites: BiasSites, result: ScoringResult | None, term: str = "") -> BiasScores:
    """What is recorded of a scoring pass, or of a `term` that was given."""
    method, left_out = trainer.args.score_method, sites.left_out
    notes = [f"{left_out} layers without query, key and value projections of their own are left out."]
    return BiasScores(
        selected=rank(result.terms, method)[0] if result else term,
        method=method if result else None,
        anchor=result.anchor if result else None,
        steps=result.steps if result else 0,
        base_model=trainer.model.get_base_model().name_or_path,
        layers=sorted({site.layer for site in sites}),
        quantization=quantization_of(trainer.model.config),
        terms=result.terms if result else score_terms(sites, {}, {}, {}),
        notes=[*(notes if left_out else ()), *(result.notes if result else ())],
        versions={name: version(name) for name in ("beft_trl", "peft", "torch", "transformers", "trl")},
    )


def trained_term(deltas: Deltas, asked: str) -> str | None:
    """The term of an adapter that the model came with and that has been trained before.

    Raises:
        ValueError: if it is not what `bias_term` asks for.
    """
    values = gather_deltas(deltas.model, deltas.sites)
    terms = [term for term in TERMS if any(moved.any() for site, moved in values.items() if site.term == term)]
    if not terms:
        return None
    term = terms[0] if len(terms) == 1 else "all"
    if asked not in ("auto", term):
        raise ValueError(
            f"The model's adapter trains the {term} bias, and this run asks for bias_term={asked!r}. Give the base "
            "model for another term, or leave bias_term out to go on."
        )
    return term
