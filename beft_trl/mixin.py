"""`BeftTrainerMixin`, for any Trainer: score, select, train, save."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode
from trl import RewardTrainer

from . import report
from .arguments import arguments_by_name, name_of, refuse_arguments
from .checkpoints import check_writable, output_lock, refuse_broken_loss, warn_of_other_runs
from .compat.adapters import beft_tuner, reference_copied
from .compat.engines import forget_preparation, keep_4bit_trainable
from .compat.losses import labelled_tokens_only
from .compat.models import forget_input_gradients
from .data.labels import check_tokens_of
from .data.vocabulary import known_tokens_only
from .deltas import adapter_state_dict, check_moved, exact_start, gather_deltas, gather_saved_whole
from .engines import engine_of, refuse_cell, refuse_separate_processes, warn_of_slow_16_bits
from .frozen_cache import frozen_cache
from .identity import identify_base, identify_run
from .importance import BiasScores
from .layout import BiasSite, find_bias_sites, sites_of_term, skeleton_of
from .rates import give_learning_rates, logged_learning_rates
from .resume import Resumed, find_checkpoint
from .saving import (
    card_of,
    complete_or_none,
    default_adapter_only,
    draw_scores,
    refuse_broken_deltas,
    sizes,
    whole_or_nothing,
    write_description,
)
from .selection import choose, scores_of, scoring_pass, trained_term
from .spans import end_backward_below, ranges, sites_in
from .tuner import (
    ADAPTER_NAME,
    Deltas,
    adapter_config,
    adopt_deltas,
    attach_deltas,
    base_given_back,
    delta,
    name_saved_modules,
    trained_to_fp32,
    trained_values,
)


if TYPE_CHECKING:
    from transformers import Trainer  # that it is put before, whichever it is
else:
    Trainer = object


class BeftTrainerMixin(Trainer):
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
        bias_sites (`list[BiasSite]`): every bias of the layers that the run may train.
        frozen_cache ([`FrozenLayersCache`]): what the frozen layers gave, `None` if it is not kept. One of another
            trainer over the same base can be put in its place.
        resumed_at (`int`): optimizer steps of the checkpoint that the run goes on from, 0 if there is none.

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
    resumed_at = 0
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
        with base_given_back(model):
            self._build(given, skeleton)
        self._span_ends = end_backward_below(self.model, self._deltas.candidates)
        self.add_callback(_LogScores(self))

    def _build(self, given: dict[str, Any], skeleton: Any) -> None:
        """Puts a delta at each candidate, and lets the trainer make itself of what is given."""
        model, args = given["model"], given["args"]
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
        check_tokens_of(self)
        distributed = self.args.parallel_mode == ParallelMode.DISTRIBUTED
        refuse_separate_processes(self.accelerator.num_processes if distributed else 1)
        warn_of_slow_16_bits(self.model.dtype, self.args)
        trained_to_fp32(self.model, exact)
        keep_4bit_trainable(self.model)
        self.bias_sites = sites
        self.learning_rates: dict[str, float] = {}
        self._deltas = Deltas(self.model, candidates)
        self.frozen_cache = frozen_cache(self, candidates, engine_of(self.args))
        # A model without weights, which only a check has, stands for the one of its name.
        named = isinstance(model, str) or self.model.device.type == "meta"
        base = self.model.get_base_model()
        self._base = identify_base(base, base.name_or_path if named else None)

    def _check_given(self, given: dict[str, Any], skeleton: Any) -> None:
        """Refuses arguments and models before weights are loaded; for trainers that know what theirs must be."""

    @property
    def trained_sites(self) -> list[BiasSite]:
        """The biases that are trained: all candidates until `train()` has selected, then those it has kept."""
        return self._deltas.sites

    def identity(self) -> dict[str, Any]:
        """What identifies the run: its base, its data and its settings, see [`identity.identify_run`]."""
        return identify_run(self.model.get_base_model(), self.args, self.train_dataset, self._base)

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
            ValueError: for no steps, or some beyond the run, or an anchor that says nothing of the model.
            RuntimeError: after `train()` under DeepSpeed, whose engine holds the trained biases.
        """
        found = scoring_pass(self, self._deltas, self.bias_sites, super().train, score_steps)
        return scores_of(self, self.bias_sites, found)

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
        self.resumed_at, self._losses = 0, None
        if self.frozen_cache is not None and self.state.global_step:
            self.frozen_cache.prove_again()  # since the run before, the base may have been changed
        resumed = self.find_checkpoint(resume_from_checkpoint, engine_of(self.args), self.args.world_size)
        checkpoint = None
        if resumed is not None:
            checkpoint, scores, rates, self.resumed_at = resumed
            self._select(scores, rates)
        elif self.bias_scores is None:
            warn_of_other_runs(self.args.output_dir, self._run)
            term = trained_term(self._deltas, self.args.bias_term) or self.args.bias_term
            self._select(*choose(self, self._deltas, self.bias_sites, term, super().train))
        if self.model_wrapped is self.model:
            # An evaluation before the run marks the model as prepared, and DDP would be left out.
            forget_preparation(self.model, self.accelerator)
        head = gather_saved_whole(self.model)
        if self.is_deepspeed_enabled and checkpoint is None:
            self.add_callback(_Begin(exact_start(self.model, self.trained_sites)))
        try:
            output = super().train(checkpoint, *others, **kwargs)
        finally:
            self.pop_callback(_Begin)
        changes = {name: values - head[name] for name, values in gather_saved_whole(self.model).items()}
        trained_before = self.resumed_at >= output.global_step
        check_moved(gather_deltas(self.model, self.trained_sites), {} if trained_before else changes)
        return output

    def find_checkpoint(self, asked: str | bool | None, engine: str, processes: int) -> Resumed | None:
        """The checkpoint that a run goes on from, see [`resume.find_checkpoint`]."""
        self._run = self.identity()
        trained, layers = self.selected_bias_term, [site.layer for site in self.bias_sites]
        return find_checkpoint(asked, self.args, self._deltas, layers, self._run, engine, processes, trained)

    def _select(self, scores: BiasScores, learning_rates: dict[str, float]) -> None:
        self.bias_scores, self.learning_rates = scores, learning_rates
        self.selected_bias_term = scores.selected
        self._deltas.keep(scores.trained_sites(self._deltas.candidates))
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            Console().print(report.scores_table(scores, *sizes(self._deltas), learning_rates))

    def set_initial_training_values(self, *args: Any, **kwargs: Any):
        epochs, *values, max_steps = super().set_initial_training_values(*args, **kwargs)
        # A checkpoint of the last step: the Trainer would go on in the epoch that it stands in for one step more.
        return 0 if self.resumed_at >= max_steps else epochs, *values, max_steps

    def create_optimizer(self, *args: Any, **kwargs: Any):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.learning_rates:
            rates = {delta(self.model, site): self.learning_rates[site.module] for site in self.trained_sites}
            give_learning_rates(optimizer, rates)
            self._first_rate = optimizer.param_groups[0]["lr"]  # which the Trainer logs
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names to which `weight_decay` applies: the deltas too, which Transformers leaves out as biases."""
        deltas = [name for name, _ in model.named_parameters() if ".beft_bias." in name]
        return [*super().get_decay_parameter_names(model), *deltas]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs and self.learning_rates:
            rates = logged_learning_rates(logs["learning_rate"], self._first_rate, self.learning_rates)
            logs = {**logs, **rates}
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, *others: Any, **kwargs: Any):
        cached = self.frozen_cache.in_use() if self.frozen_cache is not None else nullcontext()
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
                refuse_broken_loss(total, self.state.global_step + 1, self.args.output_dir)
        return computed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter with its scores, pictures and model card. Every process calls it."""
        if self.bias_scores is None:
            raise RuntimeError("There is no bias to save yet: call train() first, it selects the one to train.")
        # The Trainer would gather the frozen base from the engine too, and the deltas in the engine's 16 bits.
        state_dict = adapter_state_dict(self.model, self.trained_sites)
        self._save(output_dir or self.args.output_dir, state_dict=state_dict)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        refuse_broken_deltas(state_dict or {}, self.state.global_step)
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
        with complete_or_none(self, checkpoint, self._run):
            super()._save_checkpoint(model, trial)

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

    def create_model_card(  # type: ignore[override]  # as TRL's trainers have it
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


class _Begin(TrainerCallback):
    """Does something once the engine of a run is there."""

    def __init__(self, act: Callable[[], None]):
        self.act = act

    def on_train_begin(self, args, state, control, **kwargs):
        self.act()


class _LogScores(TrainerCallback):
    """Sends the scores to the run's trackers, once, when they have been set up."""

    def __init__(self, trainer: BeftTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        scores = self.trainer.bias_scores
        if scores is not None and scores.method is not None and state.global_step == 0:
            self.trainer.log(report.logged_values(scores, *sizes(self.trainer._deltas)))
