"""The scoring pass: two short trainings aside of the run, and what their gradients and changes say of each term."""

from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from .aside import random_state_kept, set_aside, short_collections
from .deltas import gather_deltas, gather_saved_whole, native_biases, restore_saved_whole, set_deltas
from .importance import BiasScores, LayerScores, TermScores, fisher, importance, magnitude, rank
from .layout import TERMS, BiasSite, BiasSites
from .probe import ScoringProbe, ScoringProgress
from .tuner import confine_deltas, keep_deltas, put_back_deltas


logger = get_logger(__name__)

DEFAULT_SCORE_STEPS = 5
# The key's gradient relative to the value's, as root mean squares over a layer: below, it is dead; above, alive.
# Measured on tiny models and SmolLM2: in fp32 at most 1e-7 where the key is dead and at least 7e-4 where it is alive;
# in 16 bits, where rounding has a gradient of its own, up to 1.5e-3 where it is dead, so that in between the
# structure's word stands.
DEAD_BELOW = 1e-5
ALIVE_ABOVE = {"fp32": 1e-5, "16 bits": 2e-2}
NOTHING_LEARNT = (
    "Usually all labels are masked (-100): look at completion_only_loss, assistant_only_loss, max_length and the data "
    "collator. `beft check` shows what is learnt."
)


class ScoringMixin:
    """The part of [`BeftTrainerMixin`] that runs the scoring pass."""

    args: Any
    model: Any
    accelerator: Any
    bias_scores: BiasScores | None
    _all_sites: BiasSites
    _sites: list[BiasSite]
    _candidates: list[BiasSite]
    _removed: dict[str, nn.Module]  # layers whose deltas were candidates, by path
    _confined: list[RemovableHandle]
    _verdict: list[str] | None = None  # on dead keys, once their gradients were seen

    def score(self, score_steps: int | None = None) -> BiasScores:
        """Runs the scoring pass alone, and leaves the model, the data order and the random state as they were.

        All candidates are scored, from zero deltas: those of `bias_term="auto"` again after `train()` has kept one of
        them, or the terms of the `bias_term` that was given. What was trained is put back.

        Args:
            score_steps (`int`, *optional*): optimizer steps. Default: that of the configuration.

        Raises:
            ValueError: for steps beyond the run, or an anchor that says nothing of the model.
            RuntimeError: after `train()` under DeepSpeed, whose engine holds the trained biases.
        """
        steps = self._score_steps(score_steps or self.args.score_steps)
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise RuntimeError(
                "score() after train() would take the trained biases out of DeepSpeed's engine. Call it before, or "
                "make another trainer for it."
            )
        trained, kept = gather_deltas(self.model, self._sites), self._sites
        put_back_deltas(self.model, self._removed)
        self._keep([site for site in self._candidates if self._verdict is None or site.dead is None])
        set_deltas(self.model, dict.fromkeys(self._sites))
        try:
            return self._scored(steps)
        finally:
            if any(values.any() for values in trained.values()):
                self._keep(kept)
                set_deltas(self.model, trained)

    def _scored(self, steps: int) -> BiasScores:
        self._own_biases()  # if they cannot serve as anchor, that is refused before the first step
        terms = [term for term in TERMS if any(site.term == term for site in self._sites)]
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with closing(ScoringProgress(terms, 2 * steps, disable=quiet)) as progress, short_collections():
            with ScoringProbe(self.model, self._sites, self.accelerator) as probe:
                untouched = self._train_aside(steps, 0.0, probe, progress)
            if not any(values.any() for values in probe.gradients.values()):
                raise ValueError(
                    f"No bias has a gradient in the first {steps} steps: the loss does not depend on any of them. "
                    f"{NOTHING_LEARNT}"
                )
            if self._verdict is None:
                self._verdict = judge_dead(self._all_sites, probe.gradients, precision=self._precision())
                self._keep([site for site in self._sites if site.dead is None])
            moved = self._train_aside(steps, self.args.score_learning_rate, progress)
        if any(values.any() for values in untouched.values()) or not any(values.any() for values in moved.values()):
            raise RuntimeError(
                "The scoring pass trains at learning_rate=0 to measure gradients, at score_learning_rate to measure "
                f"changes, and optim={self.args.optim!s} moved the biases in the first or left them in the second: it "
                "does not follow the learning rate. Use another optim, or give an explicit bias_term."
            )
        own, anchor = self._own_biases(), self.args.score_anchor
        if anchor == "auto":
            # Next to a change that is longer, every bias is nearly zero: the importance of all terms would be near 1.
            anchor = "bias" if own is not None and _length(own) > _length(moved) else "activation"
        anchors = own if anchor == "bias" and own is not None else probe.mean_outputs
        before = {site: anchors[site] for site in self._sites}
        scored = score_terms(self._all_sites, before, moved, probe.gradients)
        selected = rank(scored, self.args.score_method)[0]
        return BiasScores(
            selected=selected,
            method=self.args.score_method,
            anchor=anchor,
            steps=steps,
            base_model=self._base_model_name(),
            quantization=self._quantization(),
            terms=scored,
            notes=[*layers_left_out(self._all_sites), *self._verdict],
            versions=_versions(),
            learning_rates=self._relative_learning_rates(selected, probe),
        )

    def _unscored(self, term: str) -> BiasScores:
        return BiasScores(
            selected=term,
            method=None,
            anchor=None,
            steps=0,
            base_model=self._base_model_name(),
            quantization=self._quantization(),
            terms=score_terms(self._all_sites, {}, {}, {}),
            notes=layers_left_out(self._all_sites),
            versions=_versions(),
            learning_rates=self._relative_learning_rates(term),
        )

    def _relative_learning_rates(self, term: str, probe: ScoringProbe | None = None) -> dict[str, float]:
        """By module, from the outputs that `probe` saw, or a new one where nothing was scored."""
        rate = self.args.relative_learning_rate
        if rate is None:
            return {}
        if probe is None:
            with ScoringProbe(self.model, self._sites, self.accelerator) as probe:
                self._train_aside(self._score_steps(self.args.score_steps), 0.0, probe)
        outputs: dict[str, list[Tensor]] = {}
        for site in self._sites:
            if term in (site.term, "all"):
                outputs.setdefault(site.module, []).append(probe.mean_outputs[site])
        return {path: rate * _rms(torch.cat(parts)) for path, parts in outputs.items()}

    def _keep(self, sites: list[BiasSite]) -> None:
        self._sites = sites
        self._removed |= keep_deltas(self.model, sites)
        for handle in self._confined:
            handle.remove()
        self._confined = confine_deltas(self.model, sites)

    def _train_aside(self, steps: int, learning_rate: float, *callbacks: TrainerCallback) -> dict:
        """Trains for `steps` steps at a constant rate, puts everything back, and returns the deltas that it made."""
        head = gather_saved_whole(self.model)
        try:
            with set_aside(self, steps, learning_rate, callbacks):
                self.bias_scores = None  # and with them learning rates that are not those of this run
                super().train()
                return gather_deltas(self.model, self._sites)
        finally:
            set_deltas(self.model, dict.fromkeys(self._sites))
            restore_saved_whole(self.model, head)

    def _run_steps(self) -> int:
        with random_state_kept():
            return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _score_steps(self, asked: int | None) -> int:
        run_steps = self._run_steps()
        if asked is not None and asked > run_steps:
            raise ValueError(
                f"score_steps={asked} is more than the {run_steps} optimizer steps of this run. Give at most "
                f"{run_steps}, leave it out, or name the bias_term."
            )
        if asked is not None:
            return asked
        # A step of scoring costs two of training. Adam's first moves every bias equally far, so that one tells little.
        steps = min(DEFAULT_SCORE_STEPS, max(2, run_steps // 30), run_steps)
        if steps < DEFAULT_SCORE_STEPS:
            logger.warning(
                f"The scoring pass takes {steps} of its usual {DEFAULT_SCORE_STEPS} steps, since this run has "
                f"{run_steps}. Set score_steps for another number."
            )
        return steps

    def _own_biases(self) -> dict[BiasSite, Tensor] | None:
        biases = native_biases(self.model, self._sites)
        if all(bias is not None and bool(bias.any()) for bias in biases.values()):
            return biases
        if self.args.score_anchor == "bias":
            raise ValueError(
                "score_anchor='bias' says nothing of this model: it has projections without a bias, or with one of "
                "zeros, where the importance of every change is 1. Use 'activation' or 'auto'."
            )
        return None

    def _precision(self) -> str:
        full = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return "fp32" if full and not hasattr(self.model, "quantization_method") else "16 bits"

    def _base_model_name(self) -> str:
        return self.model.get_base_model().name_or_path

    def _quantization(self) -> dict[str, Any] | None:
        config = getattr(self.model.config, "quantization_config", None)
        return config.to_diff_dict() if config is not None else None


def _length(biases: dict[BiasSite, Tensor]) -> float:
    return torch.cat([values.double() for values in biases.values()]).norm().item()


def layers_left_out(sites: BiasSites) -> list[str]:
    """The sentence of the report on layers without attention, if there are any."""
    if not sites.left_out:
        return []
    return [f"{sites.left_out} layers without query, key and value projections of their own are left out."]


def judge_dead(sites: Sequence[BiasSite], gradients: dict[BiasSite, Tensor], precision: str) -> list[str]:
    """Holds the structure's word on dead keys against their gradients, and corrects `site.dead`, in place.

    Args:
        sites: the model's sites.
        gradients: batch gradients at zero delta, shape (steps, n).
        precision: of the forward pass, a key of `ALIVE_ABOVE`.

    Returns:
        A sentence on each correction, and on each term that is dead in some of its layers alone.
    """
    value = {site.layer: _rms(gradients[site]) for site in sites if site.term == "value" and site in gradients}
    corrected: dict[str, list[int]] = {}
    for site in sites:
        if site.term != "key" or site not in gradients or not value.get(site.layer):
            continue
        share = _rms(gradients[site]) / value[site.layer]
        if site.dead is None and share < DEAD_BELOW:
            site.dead = f"its gradient is {share:.0e} of the value's"
            corrected.setdefault("dead, though its structure does not say so", []).append(site.layer)
        elif site.dead is not None and share > ALIVE_ABOVE[precision]:
            site.dead = None
            corrected.setdefault("alive, though its structure says that it is dead", []).append(site.layer)
    notes = [
        f"By its gradient the key bias of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} is {state}."
        for state, layers in corrected.items()
    ]
    for term in TERMS:
        dead = [site for site in sites if site.term == term and site.dead is not None]
        if dead and any(site.term == term and site.dead is None for site in sites):
            layers = ", ".join(str(site.layer) for site in dead)
            notes.append(f"The {term} bias is dead in layer{'s' * (len(dead) > 1)} {layers}: {dead[0].dead}.")
    return notes


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def score_terms(
    all_sites: Sequence[BiasSite],
    before: dict[BiasSite, Tensor],
    moved: dict[BiasSite, Tensor],
    gradients: dict[BiasSite, Tensor],
) -> dict[str, TermScores]:
    """Scores every term.

    Args:
        all_sites: the model's sites, those that were not scored among them.
        before: for each scored site the bias before the scoring pass, by the chosen anchor, shape (n,).
        moved: its delta after it, shape (n,).
        gradients: its batch gradients at zero delta, shape (steps, n).
    """
    terms = {}
    for term in TERMS:
        sites = [site for site in all_sites if site.term == term]
        live = [site for site in sites if site.dead is None]
        reasons = {site.dead for site in sites if site.dead is not None}
        terms[term] = TermScores(
            parameters=sum(len(site.rows) for site in live or sites),
            dead="; ".join(sorted(reasons)) if not live else None,
            layers=[
                LayerScores(
                    layer=site.layer,
                    importance=importance(before[site] + moved[site], before[site]).item(),
                    magnitude=magnitude(before[site] + moved[site], before[site]).item(),
                    fisher=fisher(gradients[site]).item(),
                )
                for site in sites
                if site in before
            ],
        )
    return terms


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("beft_trl", "peft", "torch", "transformers", "trl")}
