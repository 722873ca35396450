"""Scores the bias terms, selects one, trains and saves it: `BeftTrainerMixin` for any Trainer, and TRL's with it."""

import copy
import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel, PeftType
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.training_args import ParallelMode
from trl import SFTTrainer

from . import report
from .aside import random_state_kept, set_aside
from .checkpoints import (
    check_writable,
    checkpoint_to_resume,
    last_complete_checkpoint,
    mark_complete,
    recorded_scores,
    refuse_foreign_output,
    refuse_other_engine,
)
from .config import BeftConfigMixin, BeftSFTConfig, BeftTrainingArguments
from .engines import engine_of, refuse_cell
from .importance import SCORE_OF_METHOD, SCORES_FILE, BiasScores, rank
from .labels import check_columns, drop_masked
from .layout import TERMS, BiasSite, build_skeleton, find_bias_sites, sites_of_term
from .scoring import ScoringProbe, ScoringProgress, judge_dead, layers_left_out, score_terms
from .tuner import (
    ADAPTER_NAME,
    adapter_state_dict,
    adopt_deltas,
    attach_deltas,
    beft_config,
    beft_tuner,
    check_moved,
    confine_deltas,
    deltas_as_state_dict,
    deltas_to_fp32,
    gather_deltas,
    gather_saved_whole,
    keep_4bit_trainable,
    keep_deltas,
    native_biases,
    parameters_saved_whole,
    projection,
    restore_saved_whole,
    task_ending,
    zero_deltas,
)


logger = get_logger(__name__)

DEFAULT_SCORE_STEPS = 5


class BeftTrainerMixin:
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
    _verdict: list[str] | None = None  # on dead keys, once their gradients were seen
    _heat_map: bytes | None = None

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
            self._select(recorded_scores(checkpoint, self.selected_bias_term or self.args.bias_term))
        elif self.bias_scores is None:
            refuse_foreign_output(self.args.output_dir, self._base_model_name(), self.args.bias_term)
            term = self._trained_term() or self.args.bias_term
            self._select(self.score() if term == "auto" else self._unscored(term))
        head = gather_saved_whole(self.model)
        output = super().train(checkpoint, *others, **kwargs)
        changes = {name: values - head[name] for name, values in gather_saved_whole(self.model).items()}
        check_moved(gather_deltas(self.model, self._sites), changes)
        return output

    def score(self, score_steps: int | None = None) -> BiasScores:
        """Runs the scoring pass alone, and leaves the model, the data order and the random state as they were.

        Args:
            score_steps: optimizer steps. Default: that of the configuration.

        Raises:
            ValueError: for steps beyond the run, or an anchor that says nothing of the model.
        """
        steps = self._score_steps(score_steps or self.args.score_steps)
        self._score_anchor()  # an anchor that cannot serve is refused before the first step
        terms = [term for term in TERMS if any(site.term == term for site in self._sites)]
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with closing(ScoringProgress(terms, 2 * steps, disable=quiet)) as progress:
            with ScoringProbe(self.model, self._sites, self.accelerator) as probe:
                untouched = self._train_aside(steps, 0.0, probe, progress)
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
        anchor = self._score_anchor()
        before = native_biases(self.model, self._sites) if anchor == "bias" else probe.mean_outputs
        before = {site: before[site] for site in self._sites}
        scored = score_terms(self._all_sites, before, moved, probe.gradients)
        return BiasScores(
            selected=rank(scored, self.args.score_method)[0],
            method=self.args.score_method,
            anchor=anchor,
            steps=steps,
            base_model=self._base_model_name(),
            quantization=self._quantization(),
            terms=scored,
            notes=[*layers_left_out(self._all_sites), *self._verdict],
            versions=_versions(),
        )

    def _trained_term(self) -> str | None:
        """The term of an adapter that the model came with and that has been trained before."""
        deltas = gather_deltas(self.model, self._sites)
        terms = [term for term in TERMS if any(deltas[site].any() for site in self._sites if site.term == term)]
        if not terms:
            return None
        term = terms[0] if len(terms) == 1 else "all"
        if self.args.bias_term not in ("auto", term):
            raise ValueError(
                f"The model's adapter trains the {term} bias, and this run asks for bias_term="
                f"{self.args.bias_term!r}. Give the base model for another term, or leave bias_term out to go on."
            )
        return term

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
        )

    def _select(self, scores: BiasScores) -> None:
        self.bias_scores = scores
        self.selected_bias_term = scores.selected
        self._keep([site for site in self._sites if scores.selected in (site.term, "all") and scores.covers(site)])
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            Console().print(report.scores_table(scores, *self._sizes()))

    def _keep(self, sites: list[BiasSite]) -> None:
        self._sites = sites
        keep_deltas(self.model, sites)
        for handle in self._confined:
            handle.remove()
        self._confined = confine_deltas(self.model, sites)

    def _sizes(self) -> tuple[int, int]:
        """Trained parameters, without the zero part of fused layers' deltas, and all parameters."""
        # Under ZeRO-3 a parameter is empty between its uses.
        whole = [values.numel() or values.ds_numel for values in parameters_saved_whole(self.model).values()]
        return sum(len(site.rows) for site in self._sites) + sum(whole), self.model.get_nb_trainable_parameters()[1]

    def _precision(self) -> str:
        full = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return "fp32" if full and not hasattr(self.model, "quantization_method") else "16 bits"

    def _train_aside(self, steps: int, learning_rate: float, *callbacks: TrainerCallback) -> dict:
        """Trains for `steps` steps at a constant rate, puts everything back, and returns the deltas that it made."""
        head = gather_saved_whole(self.model)
        try:
            with set_aside(self, steps, learning_rate, callbacks):
                super().train()
                return gather_deltas(self.model, self._sites)
        finally:
            zero_deltas(self.model, self._sites)
            restore_saved_whole(self.model, head)

    def _run_steps(self) -> int:
        with random_state_kept():
            return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _score_steps(self, asked: int | None) -> int:
        run_steps = self._run_steps()
        if asked is not None and asked > run_steps:
            raise ValueError(
                f"score_steps={asked} is more than the {run_steps} optimizer steps of this run. Give at most "
                f"{run_steps}, leave it out for a tenth of the run, or name the bias_term."
            )
        steps = asked or min(DEFAULT_SCORE_STEPS, max(1, run_steps // 10))
        if asked is None and steps < DEFAULT_SCORE_STEPS:
            logger.warning(
                f"The scoring pass takes {steps} of its usual {DEFAULT_SCORE_STEPS} steps, a tenth of this run of "
                f"{run_steps} steps. Set score_steps for another number."
            )
        return steps

    def _score_anchor(self) -> str:
        biases = native_biases(self.model, self._sites).values()
        has_biases = all(bias is not None and bool(bias.any()) for bias in biases)
        if self.args.score_anchor == "bias" and not has_biases:
            raise ValueError(
                "score_anchor='bias' says nothing of this model: it has projections without a bias, or with one of "
                "zeros, where the importance of every change is 1. Use 'activation' or 'auto'."
            )
        if self.args.score_anchor != "auto":
            return self.args.score_anchor
        return "bias" if has_biases else "activation"

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter with its scores, heat map and model card. Every process calls it."""
        if self.bias_scores is None:
            raise RuntimeError("There is no bias to save yet: call train() first, it selects the one to train.")
        # The Trainer would gather the frozen base from the engine too, and the deltas in the engine's 16 bits.
        self._save(output_dir or self.args.output_dir, state_dict=adapter_state_dict(self.model, self._sites))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not all(values.isfinite().all() for values in (state_dict or {}).values()):
            raise FloatingPointError(
                f"The bias deltas are not finite after step {self.state.global_step}, so they are not saved. Lower "
                "learning_rate and resume from the last checkpoint."
            )
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.bias_scores is not None:
            folder = Path(output_dir or self.args.output_dir)
            if parameters_saved_whole(self.model):
                self._task_config().save_pretrained(folder)
            self.bias_scores.to_json(folder / SCORES_FILE)
            if self.bias_scores.method is not None:
                # Drawn once: every checkpoint takes it along.
                self._heat_map = self._heat_map or report.heat_map(self.bias_scores)
                (folder / report.HEAT_MAP_FILE).write_bytes(self._heat_map)
            self._model_card(folder.name).save(folder / "README.md")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a run that was killed here left of it
        self.accelerator.wait_for_everyone()
        # The Trainer would delete old checkpoints before this one is known to be complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with deltas_as_state_dict(self.model):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint, engine_of(self.args), self.args.world_size)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            last = last_complete_checkpoint(checkpoint.parent)
            raise OSError(
                f"{checkpoint} could not be written ({error}) and was removed. "
                + (f"{last} is complete: free some space and resume from it." if last else "Free some space.")
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(checkpoint.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

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
            self._model_card(model_name, dataset_name, tags).save(Path(self.args.output_dir) / "README.md")

    def _task_config(self) -> PreTrainedConfig:
        """The configuration of the task model, whose labels the base model's own does not have."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model.get_base_model()).__name__]
        if hasattr(config, "quantization_config"):  # of this run's base: the adapter serves in any precision
            del config.quantization_config
        return config

    def _model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None):
        assert self.bias_scores is not None
        return report.model_card(
            self.bias_scores,
            *self._sizes(),
            model_name=model_name,
            dataset_name=dataset_name,
            tags=[*getattr(self, "_tag_names", []), *(tags or [])],
            auto_class=f"AutoModel{task_ending(self.model.get_base_model())}",
            saved_whole=self.model.peft_config[ADAPTER_NAME].modules_to_save or (),
            plain_peft=not any(isinstance(projection(self.model, site.module), Conv1D) for site in self._sites),
        )

    def _base_model_name(self) -> str:
        return self.model.get_base_model().name_or_path

    def _quantization(self) -> dict[str, Any] | None:
        config = getattr(self.model.config, "quantization_config", None)
        return config.to_diff_dict() if config is not None else None


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
        if scores is None or scores.method is None or state.global_step > 0:
            return
        trainable, total = self.trainer._sizes()
        values: dict[str, Any] = {"beft/trainable_parameters": trainable, "beft/trainable_share": trainable / total}
        if scores.margin is not None:
            values["beft/margin"] = scores.margin
        for name, term in scores.terms.items():
            for score in SCORE_OF_METHOD.values() if term.layers else ():
                values[f"beft/{score}/{name}"] = term.score(score)
        self.trainer.log(values)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("beft_trl", "peft", "torch", "transformers", "trl")}


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
    if any(kwargs.get("optimizers") or ()):
        raise ValueError(
            "optimizers=(...) was built before the biases existed and would train none of them. Use optim, optim_args "
            "and learning_rate, or optimizer_cls_and_kwargs."
        )


def skeleton_of(name: str, args: TrainingArguments) -> nn.Module:
    """The model of that name without weights, to find its biases, and refuse it, before anything is loaded."""
    init = getattr(args, "model_init_kwargs", None) or {}
    trust = init.get("trust_remote_code", getattr(args, "trust_remote_code", False))
    where = {key: init[key] for key in ("revision", "subfolder", "cache_dir", "token") if key in init}
    return build_skeleton(AutoConfig.from_pretrained(name, trust_remote_code=trust, **where), trust)
