"""A short training aside of a run, which leaves the trainer, its random state and its data order as they were."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from .compat.adapters import METRICS
from .compat.engines import forget_engine, forget_preparation


@contextmanager
def set_aside(
    trainer: Any, steps: int, learning_rate: float, callbacks: Sequence[TrainerCallback] = ()
) -> Iterator[None]:
    """Inside, the trainer's `train()` runs `steps` steps at a constant rate; after it, all but weights is as before.

    It is no run of the user's: none of its callbacks and trackers are called, nothing is evaluated, logged or saved.
    """
    before = dict(vars(trainer))
    # TRL fills these containers in place; everything else that the loop changes is bound anew.
    filled = {name: value for name, value in before.items() if name.endswith(METRICS)}
    before.update(copy.deepcopy({name: value for name, value in filled.items() if isinstance(value, dict)}))
    plugin = trainer.args.deepspeed_plugin
    deepspeed_config = copy.deepcopy(plugin.hf_ds_config.config) if plugin is not None else {}
    if plugin is not None:
        # An optimizer or scheduler of DeepSpeed's own would have learning rates of its own.
        plugin.hf_ds_config.config.pop("optimizer", None)
        plugin.hf_ds_config.config.pop("scheduler", None)
    trainer.args = _short(trainer.args, steps, learning_rate)
    if trainer.optimizer_cls_and_kwargs is not None:
        optimizer, options = trainer.optimizer_cls_and_kwargs
        trainer.optimizer_cls_and_kwargs = (optimizer, {**options, "lr": learning_rate})
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
    trainer.control = TrainerControl()
    trainer.callback_handler = CallbackHandler(
        [DefaultFlowCallback(), *callbacks], trainer.model, trainer.processing_class, None, None
    )
    with random_state_kept():
        try:
            yield
        finally:
            if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
                trainer.deepspeed.destroy()
                forget_engine(trainer.model)
            trainer.model.zero_grad(set_to_none=True)
            forget_preparation(trainer.model, trainer.accelerator)
            vars(trainer).clear()
            vars(trainer).update(before)
            if plugin is not None:
                # In place: DeepSpeed's "auto" values were filled in from the settings of this short run.
                plugin.hf_ds_config.config.clear()
                plugin.hf_ds_config.config.update(deepspeed_config)
            trainer.accelerator.free_memory()  # collects garbage, too


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts the random states of Python, NumPy, PyTorch and the accelerators back."""
    python, numpy = random.getstate(), np.random.get_state()
    device = torch.accelerator.current_accelerator()
    devices = range(torch.accelerator.device_count()) if device is not None else ()
    try:
        with torch.random.fork_rng(devices, device_type=device.type if device is not None else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def run_steps(trainer: Any) -> int:
    """The optimizer steps of a trainer's run."""
    with random_state_kept():
        return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _short(args: TrainingArguments, steps: int, learning_rate: float) -> TrainingArguments:
    short = copy.copy(args)
    short.max_steps = steps
    short.learning_rate = learning_rate
    short.lr_scheduler_type = "constant"
    short.warmup_steps = 0
    short.eval_strategy = short.save_strategy = short.logging_strategy = "no"
    short.eval_on_start = short.load_best_model_at_end = short.push_to_hub = False
    return short
