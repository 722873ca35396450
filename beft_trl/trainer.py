"""Scores the bias terms, selects one, trains and saves it: `BeftTrainerMixin` for any Trainer, and TRL's with it."""

import inspect
import math
import os
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.training_args import ParallelMode
from trl import RewardTrainer, SFTTrainer

from . import report
from .aside import forget_preparation
from .checkpoints import (
    check_writable,
    checkpoint_to_resume,
    last_complete_checkpoint,
    output_lock,
    recorded_scores,
    refuse_foreign_output,
    refuse_foreign_pickles,
    refuse_other_run,
    refuse_other_tensors,
    steps_of,
    warn_of_other_runs,
)
from .config import BeftConfigMixin, BeftSFTConfig, BeftTrainingArguments
from .deltas import adapter_shapes, check_moved, gather_deltas, gather_saved_whole
from .engines import engine_of, refuse_cell, slow_16_bits
from .identity import hash_weights, identify_run
from .importance import BiasScores
from .labels import check_columns, drop_masked
from .layout import TERMS, find_bias_sites, sites_of_term, skeleton_of
from .saving import SavingMixin
from .scoring import ScoringMixin
from .tuner import (
    adapter_config,
    adopt_deltas,
    attach_deltas,
    beft_tuner,
    confine_deltas,
    copy_to_reference,
    delta,
    deltas_to_fp32,
    keep_4bit_trainable,
    name_saved_modules,
    refuse_other_adapters,
)
from .vocabulary import known_tokens_only


logger = get_logger(__name__)


class BeftTrainerMixin(ScoringMixin, SavingMixin):
    """Adds BEFT to a `transformers.Trainer` class: `class BeftDPOTrainer(BeftTrainerMixin, DPOTrainer)`.

    `train()` is two runs of the trainer's own loop. The first, a short one, trains every candidate bias and is thrown
    away but for its scores; the second is the user's run, of the selected bias alone.

    Args:
        model: a loaded model, or its name or path for trainers that load models and take a `peft_config`. A model that
            comes with a BEFT adapter goes on training that.
        args: a training configuration with the fields of [`BeftConfigMixin`].
        kwargs: whatever else the trainer takes, except a `peft_config` or ready-made `optimizers`.

    Attributes:
        bias_scores: [`BiasScores`] of the run, from `train()` on.
        selected_bias_term: `"query"`, `"key"`, `"value"` or `"all"`, from `train()` on.

    Raises:
        TypeError, ValueError: for arguments that exclude each other or that cannot train, before anything is loaded.
    """

    args: Any
    bias_scores: BiasScores | None = None
    selected_bias_term: str | None = None

    def __init__(self, *positional: Any, **kwargs: Any):
        given = _by_name(super().__init__, positional, kwargs)
        _refuse_arguments(given)
        self._check_given(given)
        model, args = given["model"], given["args"]
        check_writable(args.output_dir)
        if isinstance(model, str):
            init = args.model_init_kwargs or {}
            quantization = given.get("quantization_config") or init.get("quantization_config")
            refuse_cell(engine_of(args), args, quantization, init.get("dtype"))
        known_tokens_only(given)
        skeleton = skeleton_of(model, args, _loaded_class(self)) if isinstance(model, str) else model
        sites = find_bias_sites(skeleton)
        # A scoring pass looks at the dead terms too: the gradient has the last word.
        candidates = sites if args.bias_term == "auto" else sites_of_term(sites, args.bias_term)
        saved_whole = None
        if isinstance(model, PeftModel):
            candidates = adopt_deltas(model, sites)
        elif "peft_config" in inspect.signature(super().__init__).parameters:
            # TRL's trainers take the base without an adapter as reference model; of a PeftModel they would copy it.
            given["peft_config"] = adapter_config(skeleton, candidates)
            saved_whole = given["peft_config"].modules_to_save
        else:
            given["model"] = attach_deltas(model, candidates, getattr(args, "modules_to_save", None) or ())
        with beft_tuner():
            super().__init__(**given)
        if saved_whole:
            name_saved_modules(self.model, saved_whole)
        copy_to_reference(self.model)
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
        self._all_sites = sites
        self._candidates = list(candidates)
        self._sites = list(candidates)
        self._removed = {}
        self._confined = confine_deltas(self.model, candidates)
        self._losses = None
        self._resumed_at = 0
        deltas_to_fp32(self.model)
        keep_4bit_trainable(self.model)
        self._base_weights = hash_weights(self.model.get_base_model())
        self.add_callback(_LogScores(self))

    def _check_given(self, given: dict[str, Any]) -> None:
        """Refuses arguments of one trainer's, by name, before anything is loaded."""

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
            return self._train_alone(resume_from_checkpoint, *others, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, *others: Any, **kwargs: Any):
        model = self.model.get_base_model()
        self._identity = identify_run(model, self.args, self.train_dataset, self._base_weights)
        checkpoint = self._checkpoint(resume_from_checkpoint, engine_of(self.args), self.args.world_size)
        self._resumed_at, self._losses = 0, None
        if checkpoint is not None:
            term, relative = self.selected_bias_term or self.args.bias_term, self.args.relative_learning_rate
            self._select(recorded_scores(checkpoint, term, relative))
            refuse_other_tensors(checkpoint, adapter_shapes(self.model, self._sites))
            self._resumed_at = steps_of(checkpoint)
        elif self.bias_scores is None:
            warn_of_other_runs(self.args.output_dir, self._identity)
            term = self._trained_term() or self.args.bias_term
            self._select(self.score() if term == "auto" else self._unscored(term))
        if self.model_wrapped is self.model:
            # An evaluation before the run marks the model as prepared, and DDP would be left out.
            forget_preparation(self.model, self.accelerator)
        head = gather_saved_whole(self.model)
        output = super().train(checkpoint, *others, **kwargs)
        changes = {name: values - head[name] for name, values in gather_saved_whole(self.model).items()}
        done = self._resumed_at >= output.global_step > 0
        check_moved(gather_deltas(self.model, self._sites), {} if done else changes)
        return output

    def _checkpoint(self, asked: str | bool | None, engine: str, processes: int) -> str | None:
        """The checkpoint to resume from, after everything that could speak against it and against the folder."""
        checkpoint = checkpoint_to_resume(self.args.output_dir, asked)
        if checkpoint is not None:
            refuse_other_run(checkpoint, engine, processes, self._identity, self.args.allow_changed_resume)
            if engine.startswith("zero"):
                refuse_foreign_pickles(checkpoint, self.args.trust_checkpoint)
        elif self.bias_scores is None:
            refuse_foreign_output(self.args.output_dir, self._base_model_name(), self.args.bias_term)
        return checkpoint

    def set_initial_training_values(self, *args: Any, **kwargs: Any):
        epochs, *values, max_steps = super().set_initial_training_values(*args, **kwargs)
        # A checkpoint of the last step: the Trainer would go on in the epoch that it stands in for one step more.
        return 0 if self._resumed_at >= max_steps else epochs, *values, max_steps

    def create_optimizer(self, *args: Any, **kwargs: Any):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self.bias_scores.learning_rates if self.bias_scores is not None else {}
        if made and rates:
            _give_learning_rates(optimizer, {delta(self.model, site): rates[site.module] for site in self._sites})
            self._first_rate = optimizer.param_groups[0]["lr"]  # which the Trainer logs
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names to which `weight_decay` applies: the deltas too, which Transformers leaves out as biases."""
        deltas = [name for name, _ in model.named_parameters() if ".beft_bias." in name]
        return [*super().get_decay_parameter_names(model), *deltas]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs and self.bias_scores is not None and self.bias_scores.learning_rates:
            # Each layer has its own, and the schedule scales all alike: the middle one, and the two ends.
            scale = logs["learning_rate"] / self._first_rate
            rates = [rate * scale for rate in self.bias_scores.learning_rates.values()]
            logs = {**logs, "learning_rate": median(rates)}
            logs |= {"learning_rate_min": min(rates), "learning_rate_max": max(rates)}
        super().log(logs, *args, **kwargs)

    def _trained_term(self) -> str | None:
        """The term of an adapter that the model came with and that has been trained before."""
        deltas = gather_deltas(self.model, self._sites)
        terms = [term for term in TERMS if any(deltas[site].any() for site in self._sites if site.term == term)]
        if not terms:
            return None
        term = terms[0] if len(terms) == 1 else "all"
        if self.args.relative_learning_rate is not None:
            raise ValueError(
                "relative_learning_rate is measured before a bias is trained, and the model's adapter has been. Give "
                "learning_rate to go on training it."
            )
        if self.args.bias_term not in ("auto", term):
            raise ValueError(
                f"The model's adapter trains the {term} bias, and this run asks for bias_term="
                f"{self.args.bias_term!r}. Give the base model for another term, or leave bias_term out to go on."
            )
        return term

    def _select(self, scores: BiasScores) -> None:
        self.bias_scores = scores
        self.selected_bias_term = scores.selected
        self._keep([site for site in self._sites if scores.selected in (site.term, "all") and scores.covers(site)])
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            Console().print(report.scores_table(scores, *self._sizes()))

    def compute_loss(self, model: nn.Module, *others: Any, **kwargs: Any):
        computed = super().compute_loss(model, *others, **kwargs)
        if self.model.training:
            loss = computed[0] if isinstance(computed, tuple) else computed
            # One look for each optimizer step, since it waits for the device: NaN and infinity stay in a sum.
            self._losses = loss.detach() if self._losses is None else self._losses + loss.detach()
            if self.accelerator.sync_gradients:
                total, self._losses = self._losses.item(), None
                if not math.isfinite(total):
                    self._refuse_loss(total)
        return computed

    def _refuse_loss(self, loss: float) -> None:
        last = last_complete_checkpoint(self.args.output_dir)
        raise FloatingPointError(
            f"The loss is {loss} at step {self.state.global_step + 1}. Stopped before the optimizer step; "
            + (f"the last checkpoint is {last}. " if last else "no checkpoint was written yet. ")
            + "Lower learning_rate, or look at the rows of this step."
        )


class BeftSFTTrainer(BeftTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains one attention bias term: it scores query, key and value on the training data,
    keeps the best, and trains it on a frozen base, in any precision or quantisation.

    Takes what `SFTTrainer` takes, except a `peft_config`; see [`BeftTrainerMixin`] for `train()` and the attributes.

    ```python
    trainer = BeftSFTTrainer(
        model="facebook/opt-125m",
        args=BeftSFTConfig(output_dir="out", bias_term="auto"),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["trl", "sft", "beft"]
    _name = "BEFT"
    _paper = report.PAPER

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: BeftSFTConfig | None = None,
        *positional: Any,
        **kwargs: Any,
    ):
        if args is None:
            name = model.config.name_or_path if isinstance(model, nn.Module) else model
            args = BeftSFTConfig(f"{Path(name or 'model').name}-BEFT")
        super().__init__(model, args, *positional, **kwargs)

    def _check_given(self, given: dict[str, Any]) -> None:
        check_columns(given.get("train_dataset"), given["args"], given.get("formatting_func"))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepared = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(prepared, IterableDataset):
            return prepared
        return drop_masked(prepared, dataset, dataset_name, args.max_length, packing)


class BeftTrainer(BeftTrainerMixin, Trainer):
    """`transformers.Trainer` that trains one attention bias term of an encoder, and the head of its task.

    The head of a `...ForSequenceClassification` model (of token classification and question answering too) is trained
    and saved whole, as PEFT's `modules_to_save`; the scoring pass trains it along and puts it back.

    Takes what `Trainer` takes; see [`BeftTrainerMixin`] for `train()` and the attributes.

    ```python
    model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-cased", num_labels=2)
    trainer = BeftTrainer(model, BeftTrainingArguments("out"), train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["beft"]

    def __init__(self, model: PreTrainedModel, args: BeftTrainingArguments | None = None, **kwargs: Any):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"BeftTrainer takes a loaded model, got {model!r}. Load it with the class of its task, such as "
                "AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)."
            )
        args = args or BeftTrainingArguments(f"{Path(model.config.name_or_path or 'model').name}-BEFT")
        super().__init__(model, args, **kwargs)
        # BERT's forward pass takes any keyword, so Transformers believes that it divides its loss by
        # `num_items_in_batch`, and multiplies by the processes; it is a plain mean (huggingface/transformers#47688).
        self.model_accepts_loss_kwargs = False


class _LogScores(TrainerCallback):
    """Sends the scores to the run's trackers, once, when they have been set up."""

    def __init__(self, trainer: BeftTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        scores = self.trainer.bias_scores
        if scores is not None and scores.method is not None and state.global_step == 0:
            self.trainer.log(report.logged_values(scores, *self.trainer._sizes()))


def _give_learning_rates(optimizer: Optimizer, rates: dict[nn.Parameter, float]) -> None:
    """Puts each parameter of `rates` into a group with that learning rate, and leaves no group empty."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        others = [parameter for parameter in group["params"] if parameter not in rates]
        groups += [{**group, "params": others}] if others else []
        for parameter in group["params"]:
            if parameter in rates:
                groups.append({**group, "params": [parameter], "lr": rates[parameter]})
    optimizer.param_groups[:] = groups


def _by_name(init: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by the names that its own `__init__` gives them.

    Raises:
        TypeError: for arguments that it does not take.
    """
    signature = inspect.signature(init)
    if len(args) == 2 and isinstance(args[1], BeftConfigMixin):
        args, kwargs = args[:1], {**kwargs, "args": args[1]}  # some trainers have another argument in second place
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind == inspect.Parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise TypeError(f"This trainer takes its arguments by name, got {len(args)} without one.")
    if isinstance(given.get("model"), Path):
        given["model"] = str(given["model"])
    return given


def _loaded_class(trainer: Any) -> Any:
    """The auto class with which TRL's trainers load a model that is named."""
    return AutoModelForSequenceClassification if isinstance(trainer, RewardTrainer) else None


def _refuse_arguments(given: dict[str, Any]) -> None:
    model, args = given.get("model"), given.get("args")
    if given.get("model_init") is not None:
        raise TypeError(
            "model_init makes another model for each trial, and the biases are put into one model. Give model, and "
            "make a trainer for each trial."
        )
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model must be a loaded model, or a name or path, got {type(model).__name__}.")
    if not isinstance(args, BeftConfigMixin) or not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args must be a BeftSFTConfig, or another training configuration with BeftConfigMixin, got "
            f"{type(args).__name__}, which has no bias_term."
        )
    if given.get("peft_config") is not None:
        raise ValueError(
            f"peft_config={type(given['peft_config']).__name__} and bias_term={args.bias_term!r} exclude each other: "
            "this trainer builds its own adapter from bias_term. Leave peft_config out, or use SFTTrainer."
        )
    if isinstance(model, nn.Module):
        refuse_other_adapters(model)
        if given.get("ref_model") is model:
            raise ValueError("ref_model is the model itself: leave it out, the reference is the base without biases.")
    plugin = args.deepspeed_plugin
    if args.relative_learning_rate is not None and plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ValueError(
            f"relative_learning_rate={args.relative_learning_rate} gives each layer a learning rate, and DeepSpeed's "
            "own optimizer, which its configuration asks for, takes one for all. Take the optimizer out of that "
            "configuration, or give learning_rate."
        )
    if any(given.get("optimizers") or ()):
        raise ValueError(
            "optimizers=(...) was built before the biases existed and would train none of them. Use optim, optim_args "
            "and learning_rate, or optimizer_cls_and_kwargs."
        )
