"""Scores the bias terms, selects one, trains and saves it: `BeftTrainerMixin` for any Trainer, and TRL's with it."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel, PeftType
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode
from trl import SFTTrainer

from . import report
from .checkpoints import (
    check_writable,
    checkpoint_to_resume,
    last_complete_checkpoint,
    recorded_scores,
    refuse_foreign_output,
    refuse_other_engine,
)
from .config import BeftConfigMixin, BeftSFTConfig, BeftTrainingArguments
from .deltas import check_moved, gather_deltas, gather_saved_whole
from .engines import engine_of, refuse_cell, slow_16_bits
from .importance import BiasScores
from .labels import check_columns, drop_masked
from .layout import TERMS, find_bias_sites, sites_of_term, skeleton_of
from .saving import SavingMixin
from .scoring import ScoringMixin
from .tuner import (
    adopt_deltas,
    attach_deltas,
    beft_config,
    beft_tuner,
    confine_deltas,
    delta,
    deltas_to_fp32,
    keep_4bit_trainable,
)


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

    def __init__(self, model: str | PreTrainedModel, args: Any, **kwargs: Any):
        _refuse_arguments(model, args, kwargs)
        check_writable(args.output_dir)
        if isinstance(model, str):
            init = args.model_init_kwargs or {}
            quantization = kwargs.get("quantization_config") or init.get("quantization_config")
            refuse_cell(engine_of(args), args, quantization, init.get("dtype"))
        sites = find_bias_sites(skeleton_of(model, args) if isinstance(model, str) else model)
        # A scoring pass looks at the dead terms too: the gradient has the last word.
        candidates = sites if args.bias_term == "auto" else sites_of_term(sites, args.bias_term)
        if isinstance(model, str):
            kwargs["peft_config"] = beft_config(candidates)
        elif isinstance(model, PeftModel):
            candidates = adopt_deltas(model, sites)
        else:
            saved_whole = getattr(args, "modules_to_save", None) or ()
            model = attach_deltas(model, candidates, saved_whole)  # type: ignore[assignment]
        with beft_tuner():
            # By name: trainers differ in what comes second.
            super().__init__(model=model, args=args, **kwargs)
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
        self._sites = list(candidates)
        self._confined = confine_deltas(self.model, candidates)
        deltas_to_fp32(self.model)
        keep_4bit_trainable(self.model)
        self.add_callback(_LogScores(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any):
        """Scores the bias terms where `bias_term="auto"`, keeps the selected one, and trains it.

        A run that resumes continues with the selection recorded in its checkpoint and does not score again.

        Raises:
            ValueError: for an output folder of a different run, a checkpoint with another selection, or `score_steps`
                beyond the run.
            FloatingPointError: where a loss is NaN or infinite, before its optimizer step.
            RuntimeError: where a delta did not move.
        """
        checkpoint = checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            refuse_other_engine(checkpoint, engine_of(self.args), self.args.world_size)
            term, relative = self.selected_bias_term or self.args.bias_term, self.args.relative_learning_rate
            self._select(recorded_scores(checkpoint, term, relative))
        elif self.bias_scores is None:
            refuse_foreign_output(self.args.output_dir, self._base_model_name(), self.args.bias_term)
            term = self._trained_term() or self.args.bias_term
            self._select(self.score() if term == "auto" else self._unscored(term))
        head = gather_saved_whole(self.model)
        output = super().train(checkpoint, *others, **kwargs)
        changes = {name: values - head[name] for name, values in gather_saved_whole(self.model).items()}
        check_moved(gather_deltas(self.model, self._sites), changes)
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any):
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self.bias_scores.learning_rates if self.bias_scores is not None else {}
        if made and rates:
            by_parameter = {delta(self.model, site): rates[site.module] for site in self._sites}
            _give_learning_rates(optimizer, by_parameter, self.args.relative_learning_rate)
        return optimizer

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
        loss = computed[0] if isinstance(computed, tuple) else computed
        if self.model.training and not math.isfinite(loss.item()):
            last = last_complete_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. Stopped before the optimizer step; "
                + (f"the last checkpoint is {last}. " if last else "no checkpoint was written yet. ")
                + "Lower learning_rate, or look at the rows of this step."
            )
        return computed


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
        model: str | PreTrainedModel,
        args: BeftSFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = BeftSFTConfig(f"{Path(name or 'model').name}-BEFT")
        check_columns(train_dataset, args, kwargs.get("formatting_func"))
        super().__init__(model, args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)

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


def _give_learning_rates(optimizer: Optimizer, rates: dict[nn.Parameter, float], logged: float) -> None:
    """Puts each parameter of `rates` into a group of its own, with that learning rate."""
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in rates]
        group["params"] = [parameter for parameter in group["params"] if parameter not in rates]
        for parameter in own:
            optimizer.add_param_group({**group, "params": [parameter], "lr": rates[parameter]})
        if not group["params"]:
            group["lr"] = logged  # the first group's rate is the one in the logs


def _refuse_arguments(model: Any, args: Any, kwargs: dict) -> None:
    if not isinstance(args, BeftConfigMixin) or not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args must be a BeftSFTConfig, or another training configuration with BeftConfigMixin, got "
            f"{type(args).__name__}, which has no bias_term."
        )
    if kwargs.get("peft_config") is not None:
        raise ValueError(
            f"peft_config={type(kwargs['peft_config']).__name__} and bias_term={args.bias_term!r} exclude each other: "
            "this trainer builds its own adapter from bias_term. Leave peft_config out, or use SFTTrainer."
        )
    if isinstance(model, PeftModel) and {config.peft_type for config in model.peft_config.values()} != {PeftType.BEFT}:
        raise ValueError(
            "The model already has a PEFT adapter of another kind. Give the base model, to which this trainer adds "
            "the biases itself, or a model with a BEFT adapter, to go on training it."
        )
    plugin = args.deepspeed_plugin
    if args.relative_learning_rate is not None and plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ValueError(
            f"relative_learning_rate={args.relative_learning_rate} gives each layer a learning rate, and DeepSpeed's "
            "own optimizer, which its configuration asks for, takes one for all. Take the optimizer out of that "
            "configuration, or give learning_rate."
        )
    if any(kwargs.get("optimizers") or ()):
        raise ValueError(
            "optimizers=(...) was built before the biases existed and would train none of them. Use optim, optim_args "
            "and learning_rate, or optimizer_cls_and_kwargs."
        )
