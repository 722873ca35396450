"""`BeftTrainerMixin`, for any Trainer: score, select, train, save."""

import inspect
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from huggingface_hub import ModelCard
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.training_args import ParallelMode
from trl import RewardTrainer

from . import report
from .arguments import arguments_by_name, name_of, refuse_arguments
from .aside import run_steps
from .checkpoints import (
    check_writable,
    checkpoint_to_resume,
    last_complete_checkpoint,
    mark_complete,
    output_lock,
    recorded_selection,
    refuse_foreign_output,
    refuse_foreign_pickles,
    refuse_other_run,
    refuse_other_tensors,
    steps_of,
    warn_of_other_runs,
)
from .compat.adapters import beft_tuner, reference_copied
from .compat.engines import forget_preparation, keep_4bit_trainable, whole_shape
from .compat.losses import labelled_tokens_only
from .compat.models import forget_input_gradients
from .config import default_score_steps
from .data.labels import check_tokens, position_limit
from .data.vocabulary import known_tokens_only
from .deltas import (
    adapter_shapes,
    adapter_state_dict,
    check_moved,
    deltas_as_state_dict,
    gather_deltas,
    gather_saved_whole,
)
from .engines import engine_of, refuse_cell, slow_16_bits
from .frozen_cache import frozen_cache
from .identity import identify_base, identify_run, quantization_of
from .importance import BiasScores, rank
from .layout import TERMS, BiasSite, find_bias_sites, sites_of_term, skeleton_of
from .rates import give_learning_rates, relative_learning_rates
from .saving import (
    card_of,
    checkpoint_or_none,
    default_adapter_only,
    draw_scores,
    remove,
    sizes,
    whole_or_nothing,
    write_description,
)
from .scoring import ScoringResult, measure_sizes, score_biases, score_steps, score_terms
from .spans import end_backward_below, ranges, sites_in
from .tuner import (
    ADAPTER_NAME,
    Deltas,
    adapter_config,
    adopt_deltas,
    attach_deltas,
    delta,
    name_saved_modules,
    trained_to_fp32,
    trained_values,
)


logger = get_logger(__name__)


class Resumed(NamedTuple):
    """What a run goes on from: the checkpoint, its selection and learning rates, and its optimizer steps."""

    checkpoint: str
    scores: BiasScores
    learning_rates: dict[str, float]
    steps: int


class BeftTrainerMixin:
    """Adds BEFT to a `transformers.Trainer` class: `class BeftDPOTrainer(BeftTrainerMixin, DPOTrainer)`.

    `train()` is two runs of the trainer's own loop. The first, a short one, trains every candidate bias and is thrown
    away but for its scores; the second is the user's run, of the selected bias only.

    What it changes in the trainer:

    - `__init__` puts a delta at each candidate bias, and refuses what cannot train one;
    - `train` scores, selects, resumes only its own checkpoints, and checks that the deltas moved;
    - `create_optimizer`, `get_decay_parameter_names` and `log` know the deltas' learning rates and weight decay;
    - `compute_loss` starts after the frozen layers for rows that it has seen, and stops at a loss that is not finite;
    - `save_model` and checkpoints hold the deltas, in fp32, and what explains them.

    Args:
        model: a loaded model, or its name or path for trainers that load models and take a `peft_config`. A model that
            comes with a BEFT adapter goes on training that.
        args: a training configuration with the fields of [`BeftConfigMixin`].
        kwargs: whatever else the trainer takes, except a `peft_config` or ready-made `optimizers`.

    Attributes:
        bias_scores ([`BiasScores`]): of the run, from `train()` on.
        selected_bias_term (`str`): `"query"`, `"key"`, `"value"` or `"all"`, from `train()` on.
        learning_rates (`dict[str, float]`): of the trained deltas by the path of their module, if
            `relative_learning_rate` sets them.

    Raises:
        TypeError, ValueError: for arguments that exclude each other or that cannot train, before anything is loaded.
    """

    _config_class: type | None = None  # whose defaults a run has that is given no `args`
    args: Any
    model: Any
    bias_scores: BiasScores | None = None
    selected_bias_term: str | None = None
    _run: dict[str, Any]  # what identifies it, for its checkpoints; from `find_checkpoint` on
    _heat_map: bytes | None = None
    card_sections: Sequence[str] = ()  # Markdown for the model card, before how to load it
    _resumed_at = 0  # optimizer steps of the checkpoint that a run goes on from
    _losses: Tensor | None = None  # sum over the batches of an optimizer step

    def __init__(self, *positional: Any, **kwargs: Any):
        given = arguments_by_name(super().__init__, positional, kwargs)
        if given.get("args") is None and self._config_class is not None:
            given["args"] = self._config_class(f"{name_of(given.get('model'))}-BEFT")
        refuse_arguments(given)
        model, args = given["model"], given["args"]
        check_writable(args.output_dir)
        if isinstance(model, str):
            init = args.model_init_kwargs or {}
            quantization = given.get("quantization_config") or init.get("quantization_config")
            refuse_cell(engine_of(args), args, quantization, init.get("dtype"))
        # RewardTrainer loads a model that is named with a new head.
        auto_class = AutoModelForSequenceClassification if isinstance(self, RewardTrainer) else None
        skeleton = skeleton_of(model, args, auto_class) if isinstance(model, str) else model
        self._check_given(given, skeleton)
        known_tokens_only(given, skeleton.config)
        every_site = find_bias_sites(skeleton)
        sites = sites_in(every_site, args.bias_layers)
        # A scoring pass looks at the dead terms too: the gradient has the last word.
        candidates = sites if args.bias_term == "auto" else sites_of_term(sites, args.bias_term)
        saved_whole, exact = None, None
        if isinstance(model, PeftModel):
            candidates = adopt_deltas(model, every_site)
            exact = trained_values(model)
            sites = sites_in(every_site, ranges(site.layer for site in candidates))
        elif "peft_config" in inspect.signature(super().__init__).parameters:
            # TRL's trainers take the base without an adapter as reference model; of a PeftModel they would copy it.
            given["peft_config"] = adapter_config(skeleton, candidates)
            saved_whole = given["peft_config"].modules_to_save
        else:
            given["model"] = attach_deltas(model, candidates, getattr(args, "modules_to_save", None) or ())
        with beft_tuner(), reference_copied(model, ADAPTER_NAME):
            super().__init__(**given)
        if saved_whole:
            name_saved_modules(self.model, saved_whole)
        self._check_tokens()
        launched = int(os.environ.get("WORLD_SIZE", 1))
        together = self.accelerator.num_processes if self.args.parallel_mode == ParallelMode.DISTRIBUTED else 1
        if launched != together:
            raise RuntimeError(
                f"{launched} processes were launched, but they do not form one distributed run: each would train by "
                "itself. On a CPU set use_cpu=True and ddp_backend='gloo'."
            )
        if slow_16_bits(self.args.device) and (self.model.dtype.itemsize == 2 or self.args.bf16 or self.args.fp16):
            logger.warning(
                f"dtype={self.model.dtype}, bf16={self.args.bf16} and fp16={self.args.fp16} on a processor without "
                "instructions for 16 bits: a step takes up to a hundred times as long as in fp32. Use dtype=float32 "
                "and bf16=False."
            )
        trained_to_fp32(self.model, exact)
        self._span_ends = end_backward_below(self.model, candidates)
        keep_4bit_trainable(self.model)
        self.bias_sites = sites
        self.learning_rates: dict[str, float] = {}
        self._deltas = Deltas(self.model, candidates)
        self._frozen_cache = frozen_cache(self, candidates, engine_of(self.args))
        # A model without weights, which only a check has, stands for the one of its name.
        named = isinstance(model, str) or self.model.device.type == "meta"
        base = self.model.get_base_model()
        self._base = identify_base(base, base.name_or_path if named else None)
        self.add_callback(_LogScores(self))

    def _check_given(self, given: dict[str, Any], skeleton: Any) -> None:
        """Refuses arguments and models before weights are loaded; for trainers that know what theirs must be."""

    def _check_tokens(self) -> None:
        vocabulary = whole_shape(self.model.get_input_embeddings().weight)[0]
        positions = position_limit(self.model.get_base_model())
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, rows in {"train": self.train_dataset, **held_out}.items():
            check_tokens(rows, name, vocabulary, positions, getattr(self.args, "max_length", None))

    def why_no_gradient(self) -> str:
        """What usually keeps a loss from depending on any bias, and what to do: for the error that says so."""
        return (
            "Usually all labels are masked (-100): look at completion_only_loss, assistant_only_loss, max_length and "
            "the data collator. `beft check` shows what is learnt."
        )

    def score(self, score_steps: int | None = None) -> BiasScores:
        """Runs the scoring pass only, and leaves the model, the data order and the random state as they were.

        All candidates are scored, from zero deltas: those of `bias_term="auto"` again after `train()` has kept one of
        them, or the terms of the `bias_term` that was given. What was trained is put back.

        Args:
            score_steps (`int`, *optional*): optimizer steps. Default: that of the configuration.

        Raises:
            ValueError: for steps beyond the run, or an anchor that says nothing of the model.
            RuntimeError: after `train()` under DeepSpeed, whose engine holds the trained biases.
        """
        return self._scores_of(self._scoring_pass(score_steps))

    def _scoring_pass(self, asked: int | None = None) -> ScoringResult:
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise RuntimeError(
                "score() after train() would take the trained biases out of DeepSpeed's engine. Call it before, or "
                "make another trainer for it."
            )
        steps = score_steps(asked or self.args.score_steps, run_steps(self))
        return score_biases(self, self._deltas, self.bias_sites, steps, super().train)

    def _scores_of(self, result: ScoringResult | None, term: str = "") -> BiasScores:
        """What is recorded of a scoring pass, or of a `term` that was given."""
        left_out = self.bias_sites.left_out
        notes = [f"{left_out} layers without query, key and value projections of their own are left out."]
        return BiasScores(
            selected=rank(result.terms, self.args.score_method)[0] if result else term,
            method=self.args.score_method if result else None,
            anchor=result.anchor if result else None,
            steps=result.steps if result else 0,
            base_model=self.model.get_base_model().name_or_path,
            layers=sorted({site.layer for site in self.bias_sites}),
            quantization=quantization_of(self.model.config),
            terms=result.terms if result else score_terms(self.bias_sites, {}, {}, {}),
            notes=[*(notes if left_out else ()), *(result.notes if result else ())],
            versions={name: version(name) for name in ("beft_trl", "peft", "torch", "transformers", "trl")},
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any):
        """Scores the bias terms if `bias_term="auto"`, keeps the selected one, and trains it.

        A run that resumes continues with the selection recorded in its checkpoint and does not score again. One whose
        checkpoint is at the last step trains nothing.

        Raises:
            ValueError: for an output folder or a checkpoint of a different run, or `score_steps` beyond the run.
            FloatingPointError: if a loss is NaN or infinite, before its optimizer step.
            RuntimeError: if a delta did not move, or another run is writing to the output folder.
        """
        with output_lock(self.args.output_dir) if self.is_world_process_zero() else nullcontext():
            return self._train_locked(resume_from_checkpoint, *others, **kwargs)

    def _train_locked(self, resume_from_checkpoint: str | bool | None, *others: Any, **kwargs: Any):
        self._resumed_at, self._losses = 0, None
        resumed = self.find_checkpoint(resume_from_checkpoint, engine_of(self.args), self.args.world_size)
        checkpoint = None
        if resumed is not None:
            checkpoint, scores, rates, self._resumed_at = resumed
            self._select(scores, rates)
        elif self.bias_scores is None:
            warn_of_other_runs(self.args.output_dir, self._run)
            self._choose(self._trained_term() or self.args.bias_term)
        if self.model_wrapped is self.model:
            # An evaluation before the run marks the model as prepared, and DDP would be left out.
            forget_preparation(self.model, self.accelerator)
        head = gather_saved_whole(self.model)
        output = super().train(checkpoint, *others, **kwargs)
        changes = {name: values - head[name] for name, values in gather_saved_whole(self.model).items()}
        trained_before = self._resumed_at >= output.global_step
        check_moved(gather_deltas(self.model, self._deltas.sites), {} if trained_before else changes)
        return output

    def find_checkpoint(self, asked: str | bool | None, engine: str, processes: int) -> Resumed | None:
        """The checkpoint that a run goes on from, or `None` for one that starts, after all that speaks against it.

        Args:
            asked (`str` or `bool`, *optional*): `resume_from_checkpoint`.
            engine (`str`): name of the run's engine, see `engines.ENGINES`.
            processes (`int`): number of the run's processes.

        Raises:
            ValueError: for an output folder or a checkpoint of a different run, or another user's ZeRO checkpoint.
        """
        self._run = identify_run(self.model.get_base_model(), self.args, self.train_dataset, self._base)
        checkpoint = checkpoint_to_resume(self.args.output_dir, asked)
        if checkpoint is None:
            if self.bias_scores is None:
                base = self.model.get_base_model().name_or_path
                refuse_foreign_output(self.args.output_dir, base, self.args.bias_term)
            return None
        refuse_other_run(checkpoint, engine, processes, self._run, self.args.allow_changed_resume)
        if engine.startswith("zero"):
            refuse_foreign_pickles(checkpoint, self.args.trust_checkpoint)
        term, relative = self.selected_bias_term or self.args.bias_term, self.args.relative_learning_rate
        scores, rates = recorded_selection(checkpoint, term, relative)
        refuse_other_tensors(checkpoint, adapter_shapes(self.model, self._sites_of(scores)))
        return Resumed(checkpoint, scores, rates, steps_of(checkpoint))

    def _trained_term(self) -> str | None:
        """The term of an adapter that the model came with and that has been trained before."""
        deltas = gather_deltas(self.model, self._deltas.sites)
        terms = [term for term in TERMS if any(values.any() for site, values in deltas.items() if site.term == term)]
        if not terms:
            return None
        term = terms[0] if len(terms) == 1 else "all"
        if self.args.bias_term not in ("auto", term):
            raise ValueError(
                f"The model's adapter trains the {term} bias, and this run asks for bias_term="
                f"{self.args.bias_term!r}. Give the base model for another term, or leave bias_term out to go on."
            )
        return term

    def _choose(self, term: str) -> None:
        """Selects `term`, or the best one for `"auto"`, and measures the learning rates that are relative."""
        result = self._scoring_pass() if term == "auto" else None
        scores = self._scores_of(result, term)
        share, rates = self.args.relative_learning_rate, {}
        if share is not None:
            sites = self._sites_of(scores)
            if result is None:
                run = run_steps(self)
                steps = min(self.args.score_steps or default_score_steps(run), run)
                found = measure_sizes(self, self._deltas, steps, super().train)
            else:
                found = result.sizes
            rates = relative_learning_rates(share, found, sites)
        self._select(scores, rates)

    def _sites_of(self, scores: BiasScores) -> list[BiasSite]:
        candidates = self._deltas.candidates
        return [site for site in candidates if scores.selected in (site.term, "all") and scores.covers(site)]

    def _select(self, scores: BiasScores, learning_rates: dict[str, float]) -> None:
        self.bias_scores, self.learning_rates = scores, learning_rates
        self.selected_bias_term = scores.selected
        self._deltas.keep(self._sites_of(scores))
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            Console().print(report.scores_table(scores, *sizes(self._deltas), learning_rates))

    def set_initial_training_values(self, *args: Any, **kwargs: Any):
        epochs, *values, max_steps = super().set_initial_training_values(*args, **kwargs)
        # A checkpoint of the last step: the Trainer would go on in the epoch that it stands in for one step more.
        return 0 if self._resumed_at >= max_steps else epochs, *values, max_steps

    def create_optimizer(self, *args: Any, **kwargs: Any):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.learning_rates:
            rates = {delta(self.model, site): self.learning_rates[site.module] for site in self._deltas.sites}
            give_learning_rates(optimizer, rates)
            self._first_rate = optimizer.param_groups[0]["lr"]  # which the Trainer logs
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names to which `weight_decay` applies: the deltas too, which Transformers leaves out as biases."""
        deltas = [name for name, _ in model.named_parameters() if ".beft_bias." in name]
        return [*super().get_decay_parameter_names(model), *deltas]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs and self.learning_rates:
            # Each layer has its own, and the schedule scales all alike: the middle one, and the two ends.
            scale = logs["learning_rate"] / self._first_rate
            rates = [rate * scale for rate in self.learning_rates.values()]
            logs = {**logs, "learning_rate": median(rates)}
            logs |= {"learning_rate_min": min(rates), "learning_rate_max": max(rates)}
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, *others: Any, **kwargs: Any):
        cached = self._frozen_cache.in_use() if self._frozen_cache is not None else nullcontext()
        with labelled_tokens_only(self.args.device), cached:
            computed = super().compute_loss(model, *others, **kwargs)
        if self.model.training:
            loss = computed[0] if isinstance(computed, tuple) else computed
            # One look for each optimizer step, since it waits for the device: NaN and infinity stay in a sum.
            self._losses = loss.detach() if self._losses is None else self._losses + loss.detach()
            if self.accelerator.sync_gradients:
                # Summed over the processes, so that all stop at the same step: one by itself would leave the others
                # waiting for its gradients.
                total, self._losses = self.accelerator.reduce(self._losses).item(), None
                if not math.isfinite(total):
                    last = last_complete_checkpoint(self.args.output_dir)
                    raise FloatingPointError(
                        f"The loss is {total} at step {self.state.global_step + 1}. Stopped before the optimizer "
                        f"step; {f'the last checkpoint is {last}' if last else 'no checkpoint was written yet'}. "
                        "Lower learning_rate, or look at the rows of this step."
                    )
        return computed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter with its scores, pictures and model card. Every process calls it."""
        if self.bias_scores is None:
            raise RuntimeError("There is no bias to save yet: call train() first, it selects the one to train.")
        # The Trainer would gather the frozen base from the engine too, and the deltas in the engine's 16 bits.
        state_dict = adapter_state_dict(self.model, self._deltas.sites)
        self._save(output_dir or self.args.output_dir, state_dict=state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not all(values.isfinite().all() for values in (state_dict or {}).values()):
            raise FloatingPointError(
                f"The bias deltas are not finite after step {self.state.global_step}, so they are not saved. Lower "
                "learning_rate and resume from the last checkpoint."
            )
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        with whole_or_nothing(folder, report.PICTURES) as staged, default_adapter_only(self.model):
            super()._save(str(staged), state_dict)
            if self.bias_scores is not None:
                if self.bias_scores.method is not None and self._heat_map is None:
                    # Drawn once: every checkpoint takes it along.
                    self._heat_map = draw_scores(self._deltas, self.bias_scores, self.learning_rates)
                unit = "nats per token" if "nll" in str(getattr(self.args, "loss_type", None)) else None
                curve = None if self.is_in_train else report.learning_curve(self.state.log_history, unit)
                pictures = dict(zip(report.PICTURES, (self._heat_map, curve), strict=True))
                write_description(staged, self._deltas, self.bias_scores, self.learning_rates, pictures)
                self._card(model_name=folder.name, curve=curve is not None).save(staged / "README.md")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            remove(checkpoint)  # what a run that was killed here left of it
        self.accelerator.wait_for_everyone()
        # The Trainer would delete old checkpoints before this one is known to be complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoint_or_none(checkpoint):
                with deltas_as_state_dict(self.model):
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    mark_complete(checkpoint, engine_of(self.args), self.args.world_size, self._run)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(checkpoint.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def detach(self) -> PreTrainedModel:
        """Takes the adapter off the base model, and gives that back as it came. This trainer is of no use any more.

        The base can be given to another trainer, which then trains it as if it had been loaded again.
        """
        base = self.model.get_base_model()
        self._deltas.keep([])
        for handle in self._span_ends:
            handle.remove()
        vars(base).pop("peft_config", None)  # PEFT leaves it, and takes the base for one that has an adapter
        forget_input_gradients(base)
        # The second is its name before Transformers 5.23.
        disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
        if self.args.gradient_checkpointing:
            disable()
        self.accelerator.free_memory()
        return base

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the model card to `args.output_dir`, see [`report.model_card`]."""
        if self.is_world_process_zero() and self.bias_scores is not None:
            tags = [tags] if isinstance(tags, str) else tags
            folder = Path(self.args.output_dir)
            curve = (folder / report.CURVE_FILE).is_file()
            card = self._card(model_name=model_name, dataset_name=dataset_name, tags=tags, curve=curve)
            card.save(folder / "README.md")

    def _card(self, tags: list[str] | None = None, **about: Any) -> ModelCard:
        tags = [*getattr(self, "_tag_names", []), *(tags or [])]
        assert self.bias_scores is not None
        about["sections"] = self.card_sections
        return card_of(self._deltas, self.bias_scores, self.learning_rates, tags=tags, **about)


class _LogScores(TrainerCallback):
    """Sends the scores to the run's trackers, once, when they have been set up."""

    def __init__(self, trainer: BeftTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        scores = self.trainer.bias_scores
        if scores is not None and scores.method is not None and state.global_step == 0:
            self.trainer.log(report.logged_values(scores, *sizes(self.trainer._deltas)))
