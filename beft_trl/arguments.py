"""What a trainer was given: its arguments by name, and those that cannot train anything."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from .config import BeftConfigMixin
from .tuner import refuse_other_adapters


# What Transformers' evaluation gives without a function for metrics.
EVALUATED = ("loss", "runtime", "samples_per_second", "steps_per_second")


def arguments_by_name(init: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by the names that its own `__init__` gives them.

    Args:
        init (`Callable`): the trainer's bound `__init__`.
        args (`tuple`): arguments by position. `(model, args)` is taken from every trainer, whatever comes second.
        kwargs (`dict`): arguments by name.

    Raises:
        TypeError: for arguments that the trainer does not take.
    """
    signature = inspect.signature(init)
    if len(args) == 2 and isinstance(args[1], BeftConfigMixin):
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


def refuse_unknown_metric(args: TrainingArguments, eval_dataset: Any, compute_metrics: Callable | None) -> None:
    """Refuses a `metric_for_best_model` that no evaluation gives, which Transformers says after the first one.

    Raises:
        ValueError: with the metrics that there are.
    """
    metric = args.metric_for_best_model
    if metric is None or compute_metrics is not None or str(getattr(args.eval_strategy, "value", "no")) == "no":
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [f"{prefix}{name}" for prefix in prefixes for name in EVALUATED]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={metric!r} is no metric of this run's evaluation, which gives "
            f"{', '.join(known)}. Use 'loss', or give compute_metrics."
        )
