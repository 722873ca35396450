"""What a trainer was given: its arguments by name, and those that cannot train anything."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from huggingface_hub import get_token, is_offline_mode
from peft import PeftModel
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from .aside import run_steps
from .config import BeftConfigMixin, enough_steps
from .layout import BiasSites
from .tuner import refuse_other_adapters


logger = get_logger(__name__)

# What an evaluation gives without a function for metrics: for each dataset by Transformers, and for all by TRL.
EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")
TRLS = ("mean_token_accuracy", "entropy", "num_tokens")
NEED_THE_MODEL = ("galore", "lomo", "adalomo", "apollo", "muon")  # optimizers that are made of its layers
STEPS = 1000  # of a run for which a schedule is tried


def arguments_by_name(init: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by the names that its own `__init__` gives them.

    Args:
        init (`Callable`): the trainer's bound `__init__`.
        args (`Sequence`): arguments by position. `(model, args)` is taken from every trainer, whatever comes second.
        kwargs (`dict`): arguments by name.

    Raises:
        TypeError: for arguments that the trainer does not take.
    """
    signature = inspect.signature(init)
    if len(args) == 2 and isinstance(args[1], (BeftConfigMixin, type(None))):
        args, kwargs = args[:1], {**kwargs, "args": args[1]}
    given = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
        elif parameter.kind == inspect.Parameter.VAR_POSITIONAL and given.pop(name, ()):
            raise TypeError(f"This trainer takes its arguments by name, got {len(args)} without one.")
    if isinstance(given.get("model"), Path):
        given["model"] = str(given["model"])
    return given


def path_of(model: Any) -> str:
    """A model's name or path, and `"model"` for one that was made, not loaded."""
    config: Any = model.config if isinstance(model, nn.Module) else None
    return (str(model) if config is None else config.name_or_path) or "model"


def name_of(model: Any) -> str:
    """The last part of a model's name or path, for a folder of its runs."""
    return Path(path_of(model)).name


def check_datasets(given: dict[str, Any], check: Callable[[Any, str], Any]) -> None:
    """Puts what `check(rows, name)` gives in the place of each dataset of a trainer's arguments."""
    for name in ("train_dataset", "eval_dataset"):
        rows = given.get(name)
        if isinstance(rows, dict):
            kind = type(rows)
            given[name] = kind({key: check(part, f"{name} {key!r}") for key, part in rows.items()})
        elif rows is not None:
            given[name] = check(rows, name)


def refuse_arguments(given: dict[str, Any]) -> None:
    """Refuses arguments with which no bias can be trained, before anything is loaded.

    Raises:
        TypeError, ValueError: with what was given and what would do.
    """
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
    refuse_reference(given)
    plugin = args.deepspeed_plugin
    if args.relative_learning_rate is not None and plugin is not None and "optimizer" in plugin.hf_ds_config.config:
        raise ValueError(
            f"relative_learning_rate={args.relative_learning_rate} gives each layer a learning rate, and DeepSpeed's "
            "own optimizer, which its configuration asks for, takes one for all. Take the optimizer out of that "
            "configuration, or give learning_rate."
        )
    options: dict[str, Any] = (given.get("optimizer_cls_and_kwargs") or (None, {}))[1]
    if args.relative_learning_rate is not None and "lr" in options:
        raise ValueError(
            f"optimizer_cls_and_kwargs has lr={options['lr']}, and each layer learns at relative_learning_rate="
            f"{args.relative_learning_rate} of its size. Leave lr out, or give learning_rate in args too."
        )
    if any(given.get("optimizers") or ()):
        raise ValueError(
            "optimizers=(...) was built before the biases existed and would train none of them. Use optim, optim_args "
            "and learning_rate, or optimizer_cls_and_kwargs."
        )


def refuse_reference(given: dict[str, Any]) -> None:
    """Refuses a reference model that TRL stumbles over once weights are loaded.

    Raises:
        TypeError, ValueError: with what was given and what would do.
    """
    reference, remedy = given.get("ref_model"), "leave it out, the reference is the base without biases"
    if getattr(given["args"], "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True moves a reference model towards the trained one, and here the reference is the base "
            "without biases, of which there is one. Leave sync_ref_model out."
        )
    if reference is None:
        return
    if reference is given["model"]:
        raise ValueError(f"ref_model is the model itself: {remedy}.")
    if not isinstance(reference, nn.Module):
        raise TypeError(f"ref_model must be a loaded model, got {reference!r:.80}. Load it, or {remedy}.")
    if isinstance(reference, PeftModel):
        raise ValueError(
            "ref_model has an adapter, which TRL does not see through. Merge it first (merge_and_unload, or beft "
            f"merge), or {remedy}."
        )


def refuse_encoder(model: Any) -> None:
    """Refuses a model that does not generate text, at which TRL's trainers stop with errors of their own.

    Raises:
        ValueError: with the class of the model.
    """
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} does not generate text, and this trainer trains models that do. Give a causal "
            "language model, or train the head of an encoder's task with BeftTrainer."
        )


def refuse_endless(processor: Any) -> None:
    """Refuses a tokenizer that has no token to pad or to end with.

    Raises:
        ValueError: with what to set.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not None and (tokenizer.eos_token, tokenizer.pad_token) == (None, None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no eos_token to end an answer and no pad_token to fill a batch. Set "
            "tokenizer.eos_token to the token with which this model ends its text."
        )


def refuse_unknown_metric(args: TrainingArguments, eval_dataset: Any, compute_metrics: Callable | None) -> None:
    """Refuses a `metric_for_best_model` that no evaluation gives, which Transformers says after the first one.

    Raises:
        ValueError: with the metrics that there are.
    """
    metric = args.metric_for_best_model
    if metric is None or compute_metrics is not None or str(getattr(args.eval_strategy, "value", "no")) == "no":
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [*(f"{prefix}{name}" for prefix in prefixes for name in EVALUATED), *TRLS]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={metric!r} is no metric of this run's evaluation, which gives "
            f"{', '.join(known)}. Use 'loss', or give compute_metrics."
        )


def check_settings(args: TrainingArguments, given: tuple[Any, dict] | None = None) -> None:
    """Refuses settings at which Transformers stops once weights are loaded: it tries optimizer and schedule.

    Args:
        args (`TrainingArguments`): with `optim`, `lr_scheduler_type` and what belongs to them.
        given (`tuple`, *optional*): `optimizer_cls_and_kwargs`, in the place of `optim`.

    Raises:
        ImportError: for a package that is not installed.
        ValueError: with the settings, and what is wrong with them.
    """
    refuse_push(args)
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel=True needs a package that is not installed: pip install liger-kernel.")
    number = nn.Parameter(torch.zeros(1, 1))
    try:
        if given is None:
            made, settings = Trainer.get_optimizer_cls_and_kwargs(args, nn.Module())  # type: ignore[arg-type]
            if isinstance(made, type) and issubclass(made, torch.optim.Optimizer):
                made([number], **settings)
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        optim = OptimizerNames(args.optim).value
        if not optim.startswith(NEED_THE_MODEL):
            raise ValueError(
                f"optim={optim!r} cannot be made with learning_rate={args.learning_rate}, "
                f"adam_beta1={args.adam_beta1}, adam_beta2={args.adam_beta2}, adam_epsilon={args.adam_epsilon} and "
                f"optim_args={args.optim_args!r}: {error}."
            ) from error
    name = SchedulerType(args.lr_scheduler_type).value
    try:
        optimizer = torch.optim.SGD([number], lr=args.learning_rate)
        warmup = args.get_warmup_steps(STEPS)
        options: Any = args.lr_scheduler_kwargs
        schedule = get_scheduler(name, optimizer, warmup, STEPS, options)
        for step in (0, warmup, STEPS // 2, STEPS):
            for factor in getattr(schedule, "lr_lambdas", ()):
                factor(step)
    except (TypeError, ValueError, AssertionError, KeyError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler_type={name!r} cannot be made with lr_scheduler_kwargs={args.lr_scheduler_kwargs} and "
            f"warmup_steps={args.warmup_steps}: {error}."
        ) from error


def give_enough_steps(trainer: Any) -> None:
    """Takes as many epochs as a bias needs, if the settings ask for no length, and warns of one that is too short.

    The rows of `trainer` are prepared; its `args.num_train_epochs` is set.
    """
    args = trainer.args
    if not hasattr(trainer.train_dataset, "__len__"):
        return  # a stream, for which max_steps is given
    rows = len(trainer.train_dataset)
    enough = enough_steps(rows)
    if args.num_train_epochs is None:
        args.num_train_epochs = 1.0
        args.num_train_epochs = float(math.ceil(enough / run_steps(trainer)))
    steps = run_steps(trainer)
    if steps < enough / 2:
        logger.warning(
            f"This run has {steps} optimizer steps, and a bias learns {rows} rows in about {enough} small ones. Leave "
            "out num_train_epochs and max_steps to get so many, or lower the batch size."
        )


def refuse_push(args: TrainingArguments) -> None:
    """Refuses `push_to_hub` without a hub or a token, which Transformers asks for once weights are loaded.

    Raises:
        ValueError: with what is missing.
    """
    if args.push_to_hub and is_offline_mode():
        raise ValueError("push_to_hub=True, and HF_HUB_OFFLINE is set: leave one of the two out.")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError("push_to_hub=True, and there is no token for the hub: hf auth login, or give hub_token.")


def refuse_absent_anchor(args: Any, sites: BiasSites) -> None:
    """Refuses the model's own biases as anchor of the scores if it has none, before a scoring pass looks for them.

    Raises:
        ValueError: with the first projection that has none.
    """
    bare = next((site for site in sites if not site.has_bias), None)
    if args.bias_term == "auto" and args.score_anchor == "bias" and bare is not None:
        raise ValueError(
            f"score_anchor='bias' says nothing of this model: {bare.module} has no bias, and of 0 every change "
            "has the importance 1. Use 'activation' or 'auto'."
        )
