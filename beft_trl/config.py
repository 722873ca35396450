"""The settings of a BEFT run: what is added to a Transformers or TRL training configuration, and its defaults."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments, logging
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .importance import SCORE_OF_METHOD
from .layout import TERMS
from .spans import spec_of


CHOICES = {
    "bias_term": ["auto", *TERMS, "all"],
    "score_method": list(SCORE_OF_METHOD),
    "score_anchor": ["auto", "bias", "activation"],
}


RELATIVE_LEARNING_RATE = 0.05
ENOUGH_STEPS = 400
# Optimizer steps of the scoring pass. One costs two of training. Adam's first moves every bias equally far, so that it
# tells little.
DEFAULT_SCORE_STEPS = 5
SCORED_SHARE = 30  # a short run has one for each of so many

# The least that whole numbers of Transformers' and TRL's can be, which they do not check themselves.
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "pad_to_multiple_of": 1,
    "max_length": 2,  # one token to see and one to learn; None cuts nothing off
}
NOT_NEGATIVE = (
    "learning_rate",
    "neftune_noise_alpha",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "label_smoothing_factor",
)
MAPPINGS = ("lr_scheduler_kwargs", "model_init_kwargs", "dataset_kwargs", "gradient_checkpointing_kwargs")


@dataclass
class BeftConfigMixin:
    """The BEFT settings, to be put before any configuration that derives from `transformers.TrainingArguments`:
    `@dataclass class BeftDPOConfig(BeftConfigMixin, DPOConfig)`.

    Args:
        bias_term: the term to train. `"auto"` scores query, key and value first and takes the best; `"all"` trains
            the three together.
        bias_layers: the layers whose bias is trained: `"all"`, `"upper"` (the upper half), a range such as `"15-29"`,
            or a list of numbers. Frozen layers below the lowest of them take no part in the backward pass.
        score_method: how the terms are ranked: `"beft"` (angle and change of magnitude together), `"magnitude"` or
            `"fisher"`. All three are reported.
        score_steps: optimizer steps of the scoring pass, which runs over as many batches a second time for the
            gradients before any update. `None`: see [`default_score_steps`].
        score_learning_rate: constant learning rate of the scoring pass.
        score_anchor: the biases that the change is measured from: `"bias"`, the model's own, `"activation"`, the mean
            of each projection's output over the tokens of the scoring batches, or `"auto"`, the model's own if
            every layer has one and they are together longer than their change.
        relative_learning_rate: learning rate of the biases as a share of what they are added to: each layer's is this
            times the root mean square (RMS) of its projection's outputs, over the tokens of the first `score_steps`
            batches. It takes the place of `learning_rate`, which is then only that of a task's head.
        cache_frozen_layers: compute the frozen layers below the lowest trained one once for each row, and keep what
            they give in the processor's memory, so that later steps begin after them. `None`: if nothing but the time
            changes by it, and half of the free memory is enough. `True` is an error where it cannot be.
        allow_changed_resume: resume a checkpoint although the data or the settings of the run are others, for
            instance for more steps.
        trust_checkpoint: resume a ZeRO checkpoint that belongs to another user. DeepSpeed unpickles it, and that runs
            what code it holds.

    Raises:
        ValueError: for a value out of range.
    """

    bias_term: str = field(
        default="auto",
        metadata={
            "help": "Attention bias term to train: `query`, `key`, `value`, `all` of them together, or `auto`, which "
            "scores all three first and takes the best.",
            "choices": CHOICES["bias_term"],
        },
    )
    bias_layers: str = field(
        default="upper",
        metadata={
            "help": "Layers whose bias is trained: `all`, `upper` (the upper half), a range such as `15-29`, or a "
            "list. Frozen layers below them take no part in the backward pass."
        },
    )
    score_method: str = field(
        default="beft",
        metadata={
            "help": "Score that ranks the terms: `beft` (importance), `magnitude` or `fisher`. All are reported.",
            "choices": CHOICES["score_method"],
        },
    )
    score_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Optimizer steps of the scoring pass. Default: {DEFAULT_SCORE_STEPS}; in a run of fewer than "
            f"{SCORED_SHARE * DEFAULT_SCORE_STEPS} steps one for each {SCORED_SHARE}, and at least 2."
        },
    )
    score_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the scoring pass, which is constant."}
    )
    score_anchor: str = field(
        default="auto",
        metadata={
            "help": "What the change of a bias is measured from: `bias`, the model's own, `activation`, the mean "
            "output of its projection, or `auto`, the first if every layer has one longer than its change.",
            "choices": CHOICES["score_anchor"],
        },
    )
    relative_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the biases in each layer, as a share of the RMS of what its projection gives, "
            f"in place of `learning_rate`. Default: {RELATIVE_LEARNING_RATE}, if `learning_rate` is not given either."
        },
    )
    cache_frozen_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the frozen layers below `bias_layers` once for each row, and keep what they give in the "
            "processor's memory. Default: where it changes nothing but the time."
        },
    )
    allow_changed_resume: bool = field(
        default=False,
        metadata={"help": "Resume a checkpoint although data or settings differ, for instance for more steps."},
    )
    trust_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume a ZeRO checkpoint of another user, whose code DeepSpeed would run."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide losses that are not finite. This trainer stops at one, so there are none to hide."},
    )

    def __post_init__(self):
        check_values({name: getattr(self, name) for name in SETTINGS})
        self.bias_layers = spec_of(self.bias_layers)
        init = getattr(self, "model_init_kwargs", None)
        if isinstance(init, dict) and "torch_dtype" in init:
            # The old name of a key that most public recipes have: TRL reads only the new one.
            old = init.pop("torch_dtype")
            if init.setdefault("dtype", old) != old:
                raise ValueError(
                    f"model_init_kwargs has dtype={init['dtype']} and torch_dtype={old}, which is its old name. Give "
                    "dtype only."
                )
        _check_ranges(self)
        _set_up_cpu_under_a_launcher(self)
        super().__post_init__()
        if self.fp16 and self.deepspeed_plugin is None and (self.use_cpu or not torch.accelerator.is_available()):
            raise ValueError(
                "fp16=True has no effect on a CPU: accelerate (1.15) would train in fp32 without a word. Use "
                "bf16=True, or leave both out."
            )
        _check_kinds(self)
        _checkpoint_reentrantly_under_zero3(self)


# The settings that this package adds, by name.
SETTINGS = {each.name: each for each in fields(BeftConfigMixin) if each.name != "logging_nan_inf_filter"}


def enough_steps(rows: int) -> int:
    """The optimizer steps of a run on `rows` whose length is not given. A bias underfits in fewer steps."""
    return max(ENOUGH_STEPS, rows)


def default_score_steps(run: int) -> int:
    """The optimizer steps of the scoring pass of a run of `run` steps."""
    return min(DEFAULT_SCORE_STEPS, max(2, run // SCORED_SHARE), run)


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuses values of `SETTINGS` that are out of range: argparse checks choices for the command line only.

    Raises:
        ValueError: with the setting and its value.
    """
    for name, choices in CHOICES.items():
        if name in settings and settings[name] not in choices:
            raise ValueError(f"{name}={settings[name]!r} is not one of {', '.join(map(repr, choices))}.")
    if "bias_layers" in settings:
        spec_of(settings["bias_layers"])
    steps = settings.get("score_steps")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(
            f"score_steps={steps!r} cannot score anything: give a whole number of at least 1, or leave it out."
        )
    for name in ("score_learning_rate", "relative_learning_rate"):
        rate = settings.get(name)
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ValueError(f"{name}={rate!r} moves no bias: give a positive number, or leave it out.")


@dataclass
class RelativeRatesMixin(BeftConfigMixin):
    """[`BeftConfigMixin`] for TRL's configurations, with learning rates and a precision that suit biases.

    Args:
        learning_rate: one for all layers, as in TRL. Without it each layer learns at `relative_learning_rate`, by
            default 0.05, of what its projection gives, since a bias of a size that is right in one layer is nothing in
            another. Giving both is an error.
        bf16: on if neither it nor `fp16` is given and the device is a GPU that can. TRL's own default is an error
            on one that cannot, and on a CPU without AVX512 many times slower than fp32.
    """

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "The initial learning rate, one for all layers. Default: none, each layer has its own by "
            f"`relative_learning_rate`, {RELATIVE_LEARNING_RATE}."
        },
    )
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision. Default: on, if the GPU supports it."})

    def __post_init__(self):
        if self.learning_rate is None:
            if self.relative_learning_rate is None:
                self.relative_learning_rate = RELATIVE_LEARNING_RATE
            self.learning_rate = self.relative_learning_rate  # which the schedule scales
        elif self.relative_learning_rate is not None and self.learning_rate != self.relative_learning_rate:
            raise ValueError(
                f"learning_rate={self.learning_rate} is one for all layers, and relative_learning_rate="
                f"{self.relative_learning_rate} gives each layer its own: the two exclude each other. Leave one out."
            )
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()


@dataclass
class BeftSFTConfig(RelativeRatesMixin, SFTConfig):
    """`trl.SFTConfig` with the settings of [`BeftConfigMixin`] and [`RelativeRatesMixin`], and defaults that suit
    biases.

    Args:
        num_train_epochs: as many as [`enough_steps`] take, if neither it nor `max_steps` is given.
        per_device_train_batch_size: 2. Many small steps teach a bias more than few large ones.
        weight_decay: 0.0. Decay would pull a bias back towards the pretrained one.
    """

    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the biases."})
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Passes over the rows. Default, if max_steps is not given: enough for {ENOUGH_STEPS} "
            "optimizer steps, or for as many as there are rows, if those are more."
        },
    )
    per_device_train_batch_size: int = field(
        default=2, metadata={"help": "Rows of a step on each device. A bias learns more from many small steps."}
    )

    def __post_init__(self):
        if self.num_train_epochs is None and self.max_steps > 0:
            self.num_train_epochs = 3.0  # which max_steps overrides
        if self.eval_packing and not self.packing:
            # TRL (1.16) packs the held-out rows, and has only the collator of packed training tell them apart.
            raise ValueError(
                f"eval_packing={self.eval_packing} with packing=False: held-out rows that are packed together would "
                "see each other, and their loss would be wrong. Leave eval_packing out."
            )
        super().__post_init__()


@dataclass
class BeftTrainingArguments(BeftConfigMixin, TrainingArguments):
    """`transformers.TrainingArguments` with the BEFT settings of [`BeftConfigMixin`], for task models of encoders.

    Args:
        learning_rate: 3e-3. It is the rate of the new head, too, which the paper's 4e-4 to 1e-3 leaves at chance
            where examples and epochs are few (examples/benchmarks/encoder.py).
        bias_layers: `"all"`, as in the paper.
        modules_to_save: names of modules to train and save whole, next to the head of the task, such as `["pooler"]`
            of BERT, in PEFT's words.
    """

    learning_rate: float = field(default=3e-3, metadata={"help": "The initial learning rate for AdamW."})
    bias_layers: str = field(default="all", metadata=BeftConfigMixin.__dataclass_fields__["bias_layers"].metadata)
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train and save whole, next to the bias and the head of the task."},
    )


def _set_up_cpu_under_a_launcher(args: Any) -> None:
    # Without these two settings the processes that a launcher starts on a CPU do not form one run: each trains by
    # itself, and the losses are scaled as if they had.
    launched = int(os.environ.get("LOCAL_RANK", -1)) >= 0
    if launched and (args.use_cpu or not torch.accelerator.is_available()):
        args.use_cpu = True
        args.ddp_backend = args.ddp_backend or "gloo"


def _checkpoint_reentrantly_under_zero3(args: Any) -> None:
    # ZeRO-3 with PEFT recomputes activations of other shapes otherwise (huggingface/trl#2514). TRL 1.16 sets it by
    # the old name, after Transformers has copied that to the one it reads. This goes when TRL sets the new one.
    if args.gradient_checkpointing and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if hasattr(args, name):
                setattr(args, name, {**(getattr(args, name) or {}), "use_reentrant": True})


def _check_ranges(args: Any) -> None:
    """Raises ValueError for numbers with which no run makes sense, before Transformers computes with them."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        known = value is None or (name == "pad_to_multiple_of" and value == "auto")
        if not known and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name}={value!r} cannot be: give a whole number of at least {least}.")
    for name in NOT_NEGATIVE:
        value = getattr(args, name, None)
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"{name}={value!r} cannot be: give a number of at least 0.")
    if args.label_smoothing_factor > 1:
        raise ValueError(f"label_smoothing_factor={args.label_smoothing_factor!r} cannot be: give 0 to 1.")
    steps, epochs = args.max_steps, args.num_train_epochs
    if not isinstance(steps, int) or (steps < 1 and steps != -1):
        raise ValueError(f"max_steps={steps!r} cannot be: give at least 1, or -1 to go by num_train_epochs.")
    if steps == -1 and epochs is not None and not (isinstance(epochs, (int, float)) and 0 < epochs < math.inf):
        raise ValueError(f"num_train_epochs={epochs!r} trains nothing: give a number above 0, or max_steps.")


def _check_kinds(args: Any) -> None:
    """Raises ValueError for values of a kind that Transformers and TRL would stumble over later."""
    for name in MAPPINGS:
        value = getattr(args, name, None)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name}={value!r} is no mapping: give names and values, such as {{name: value}}.")
    levels = ("passive", *logging.get_log_levels_dict())
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in levels:
            raise ValueError(f"{name}={getattr(args, name)!r} is not one of {', '.join(levels)}.")
    if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
        raise ValueError("activation_offloading=True moves activations off a GPU, and there is none: leave it out.")
