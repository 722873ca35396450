"""The scoring pass: two short runs of a trainer's own loop, and what their gradients and changes say of each term."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

from .aside import set_aside
from .config import DEFAULT_SCORE_STEPS, default_score_steps
from .deltas import all_at_zero, gather_deltas, gather_saved_whole, native_biases, restore_saved_whole, set_deltas
from .importance import LayerScores, TermScores, fisher, importance, magnitude
from .layout import TERMS, BiasSite, BiasSites
from .probe import ScoringProbe, ScoringProgress
from .tuner import Deltas, trained_to_fp32


logger = get_logger(__name__)

# The key's gradient relative to the value's, as root mean squares over a layer: below, it is dead; above, alive.
# Measured on tiny models and SmolLM2: in fp32 at most 1e-7 if the key is dead and at least 7e-4 if it is alive;
# in 16 bits, in which rounding has a gradient of its own, up to 1.5e-3 if it is dead, so that in between the
# structure's word stands.
DEAD_BELOW = 1e-5
ALIVE_ABOVE = {"fp32": 1e-5, "16 bits": 2e-2}


@dataclass(frozen=True)
class ScoringResult:
    """What a scoring pass found.

    Attributes:
        terms (`dict[str, TermScores]`): the scores of query, key and value.
        anchor (`str`): `"bias"` or `"activation"`, what the biases before training were taken to be.
        steps (`int`): optimizer steps of the pass.
        sizes (`dict[BiasSite, float]`): root mean squares of the projections' outputs over the real tokens.
        notes (`list[str]`): sentences on dead keys.
    """

    terms: dict[str, TermScores]
    anchor: str
    steps: int
    sizes: dict[BiasSite, float]
    notes: list[str]


def score_biases(trainer: Any, deltas: Deltas, sites: BiasSites, steps: int, run: Callable[[], Any]) -> ScoringResult:
    """Scores every candidate, from zero deltas, and leaves the trainer, its model and the random state as they were.

    Args:
        trainer (`Trainer`): whose loss, data, engine and precision are used, with the settings of
            [`BeftConfigMixin`] in its `args`.
        deltas (`Deltas`): of the trainer's model.
        sites (`BiasSites`): all sites of the model, those that are no candidates among them.
        steps (`int`): optimizer steps of each of the two runs.
        run (`Callable`): the trainer's own training loop.

    Raises:
        ValueError: if the anchor says nothing of the model, or the loss depends on no bias.
        RuntimeError: if the optimizer does not follow the learning rate.
    """
    args = trainer.args
    with all_at_zero(deltas):
        own = _own_biases(deltas)
        if own is None and args.score_anchor == "bias":
            raise ValueError(
                "score_anchor='bias' says nothing of this model: it has projections without a bias, or with one of "
                "zeros, from which the importance of every change is 1. Use 'activation' or 'auto'."
            )
        terms = [term for term in TERMS if any(site.term == term for site in deltas.sites)]
        quiet = args.disable_tqdm or not trainer.is_local_process_zero()
        with closing(ScoringProgress(terms, 2 * steps, disable=quiet)) as progress:
            with ScoringProbe(deltas.model, deltas.sites, trainer.accelerator) as probe:
                untouched = _train_aside(trainer, deltas, steps, 0.0, run, probe, progress)
            if not any(values.any() for values in probe.gradients.values()):
                raise ValueError(
                    f"No bias has a gradient in the first {steps} steps: the loss depends on none of them. "
                    + trainer.why_no_gradient()
                )
            judged, notes = judge_dead(sites, probe.gradients, _precision(trainer))
            live = [site for site in judged if site in probe.gradients and site.dead is None]
            deltas.keep(live)
            moved = _train_aside(trainer, deltas, steps, args.score_learning_rate, run, progress)
    if any(values.any() for values in untouched.values()) or not any(values.any() for values in moved.values()):
        raise RuntimeError(
            "The scoring pass trains at learning_rate=0 to measure gradients, at score_learning_rate to measure "
            f"changes, and optim={args.optim!s} moved the biases in the first or left them in the second: it does not "
            "follow the learning rate. Use another optim, or give an explicit bias_term."
        )
    anchor = args.score_anchor
    if anchor == "auto":
        # Next to a change that is longer, every bias is nearly zero: the importance of all terms would be near 1.
        own_biases_lead = own is not None and _length(own, live) > _length(moved, live)
        anchor = "bias" if own_biases_lead else "activation"
    anchors: Mapping[BiasSite, Tensor] = own if anchor == "bias" and own is not None else probe.mean_outputs
    before = {site: anchors[site] for site in live}
    scored = score_terms(judged, before, moved, probe.gradients)
    return ScoringResult(scored, anchor, steps, probe.sizes, notes)


def measure_sizes(trainer: Any, deltas: Deltas, steps: int, run: Callable[[], Any]) -> dict[BiasSite, float]:
    """The sizes of [`ScoringResult`], with the deltas as they are, for a run that scores nothing."""
    with ScoringProbe(deltas.model, deltas.sites, trainer.accelerator) as probe:
        _train_aside(trainer, deltas, steps, 0.0, run, probe)
    return probe.sizes


def score_steps(asked: int | None, run: int) -> int:
    """The optimizer steps of the scoring pass of a run.

    Args:
        asked (`int`, *optional*): `score_steps`.
        run (`int`): optimizer steps of the run.

    Raises:
        ValueError: for none, or more than the run has.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"score_steps={asked} cannot score anything: give at least 1, or leave it out.")
    if asked is not None and asked > run:
        raise ValueError(
            f"score_steps={asked} is more than the {run} optimizer steps of this run. Give at most {run}, leave it "
            "out, or name the bias_term."
        )
    if asked is not None:
        return asked
    steps = default_score_steps(run)
    if steps < DEFAULT_SCORE_STEPS:
        logger.warning(
            f"The scoring pass takes {steps} of its usual {DEFAULT_SCORE_STEPS} steps, since this run has {run}. Set "
            "score_steps for another number."
        )
    return steps


def _train_aside(
    trainer: Any, deltas: Deltas, steps: int, learning_rate: float, run: Callable[[], Any], *callbacks: TrainerCallback
) -> dict[BiasSite, Tensor]:
    """Trains for `steps` steps at a constant rate, puts everything back, and returns the deltas that it made."""
    before, head = gather_deltas(deltas.model, deltas.sites), gather_saved_whole(deltas.model)
    try:
        with set_aside(trainer, steps, learning_rate, callbacks):
            run()
            return gather_deltas(deltas.model, deltas.sites)
    finally:
        trained_to_fp32(deltas.model)  # DeepSpeed leaves 16 bits of them if it computes in 16 bits
        set_deltas(deltas.model, before)
        restore_saved_whole(deltas.model, head)


def _own_biases(deltas: Deltas) -> dict[BiasSite, Tensor] | None:
    biases = native_biases(deltas.model, deltas.sites)
    return biases if all(bias is not None and bool(bias.any()) for bias in biases.values()) else None


def _precision(trainer: Any) -> str:
    full = trainer.model.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
    return "fp32" if full and not hasattr(trainer.model, "quantization_method") else "16 bits"


def _length(biases: Mapping[BiasSite, Tensor], sites: Sequence[BiasSite]) -> float:
    return torch.cat([biases[site].double() for site in sites]).norm().item()


def judge_dead(
    sites: Sequence[BiasSite], gradients: Mapping[BiasSite, Tensor], precision: str
) -> tuple[list[BiasSite], list[str]]:
    """Holds the structure's word on dead keys against their gradients.

    Args:
        sites (`Sequence[BiasSite]`): the model's sites.
        gradients (`dict[BiasSite, Tensor]`): batch gradients at zero delta, shape `(steps, n)`, of the candidates.
        precision (`str`): of the forward pass, a key of `ALIVE_ABOVE`.

    Returns:
        The sites with `dead` corrected, and a sentence on each correction and on each term that is dead in some of
        its layers only.
    """
    value = {site.layer: _rms(gradients[site]) for site in sites if site.term == "value" and site in gradients}
    judged: list[BiasSite] = []
    corrected: dict[str, list[int]] = {}
    for site in sites:
        verdict = site
        if site.term == "key" and site in gradients and value.get(site.layer):
            share = _rms(gradients[site]) / value[site.layer]
            if site.dead is None and share < DEAD_BELOW:
                verdict = replace(site, dead=f"its gradient is {share:.0e} of the value's")
                corrected.setdefault("dead, though its structure does not say so", []).append(site.layer)
            elif site.dead is not None and share > ALIVE_ABOVE[precision]:
                verdict = replace(site, dead=None)
                corrected.setdefault("alive, though its structure says that it is dead", []).append(site.layer)
        judged.append(verdict)
    notes = [
        f"By its gradient the key bias of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} is {state}."
        for state, layers in corrected.items()
    ]
    for term in TERMS:
        dead = [site for site in judged if site.term == term and site.dead is not None]
        if dead and any(site.term == term and site.dead is None for site in judged):
            layers = ", ".join(str(site.layer) for site in dead)
            notes.append(f"The {term} bias is dead in layer{'s' * (len(dead) > 1)} {layers}: {dead[0].dead}.")
    return judged, notes


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def score_terms(
    sites: Sequence[BiasSite],
    before: Mapping[BiasSite, Tensor],
    moved: Mapping[BiasSite, Tensor],
    gradients: Mapping[BiasSite, Tensor],
) -> dict[str, TermScores]:
    """Scores every term.

    Args:
        sites (`Sequence[BiasSite]`): the model's sites, those that were not scored among them.
        before (`dict[BiasSite, Tensor]`): for each scored site the bias before the scoring pass, by the chosen
            anchor, shape `(n,)`.
        moved (`dict[BiasSite, Tensor]`): its delta after it, shape `(n,)`.
        gradients (`dict[BiasSite, Tensor]`): its batch gradients at zero delta, shape `(steps, n)`.
    """
    terms = {}
    for term in TERMS:
        of_term = [site for site in sites if site.term == term]
        live = [site for site in of_term if site.dead is None]
        reasons = {site.dead for site in of_term if site.dead is not None}
        terms[term] = TermScores(
            parameters=sum(len(site.rows) for site in live or of_term),
            dead="; ".join(sorted(reasons)) if not live else None,
            layers=[
                LayerScores(
                    layer=site.layer,
                    importance=importance(before[site] + moved[site], before[site]).item(),
                    magnitude=magnitude(before[site] + moved[site], before[site]).item(),
                    fisher=fisher(gradients[site]).item(),
                )
                for site in of_term
                if site in before
            ],
        )
    return terms
