"""Bias-efficient fine-tuning with TRL: scores the query, key and value bias of a language model, trains the best."""

# ruff: noqa: F401
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .cli.tune import tune
    from .config import BeftConfigMixin, BeftSFTConfig, BeftTrainingArguments
    from .export.lora import export_lora
    from .importance import BiasScores
    from .layout import BiasSite, BiasSites, UnsupportedLayoutError, find_bias_sites
    from .merge.adapter import MergeReport, merge_adapter
    from .mixin import BeftTrainerMixin
    from .mixing import add_adapter, swap_adapter
    from .rl import (
        BeftDPOConfig,
        BeftDPOTrainer,
        BeftGRPOConfig,
        BeftGRPOTrainer,
        BeftKTOConfig,
        BeftKTOTrainer,
        BeftRewardConfig,
        BeftRewardTrainer,
        BeftRLOOConfig,
        BeftRLOOTrainer,
    )
    from .trainer import BeftSFTTrainer, BeftTrainer
    from .tuner import load_adapter
    from .weight_files import MergeError


__version__ = "0.2.0"

_MODULE_OF = {
    "BeftConfigMixin": "config",
    "BeftDPOConfig": "rl",
    "BeftDPOTrainer": "rl",
    "BeftGRPOConfig": "rl",
    "BeftGRPOTrainer": "rl",
    "BeftKTOConfig": "rl",
    "BeftKTOTrainer": "rl",
    "BeftRLOOConfig": "rl",
    "BeftRLOOTrainer": "rl",
    "BeftRewardConfig": "rl",
    "BeftRewardTrainer": "rl",
    "BeftSFTConfig": "config",
    "BeftSFTTrainer": "trainer",
    "BeftTrainer": "trainer",
    "BeftTrainerMixin": "mixin",
    "BeftTrainingArguments": "config",
    "BiasScores": "importance",
    "BiasSite": "layout",
    "BiasSites": "layout",
    "MergeError": "weight_files",
    "MergeReport": "merge",
    "UnsupportedLayoutError": "layout",
    "add_adapter": "mixing",
    "export_lora": "export.lora",
    "find_bias_sites": "layout",
    "load_adapter": "tuner",
    "merge_adapter": "merge",
    "swap_adapter": "mixing",
    "tune": "cli.tune",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # Names are imported when they are asked for: TRL takes seconds and a merge does without it.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
