"""Bias-efficient fine-tuning with TRL: scores the query, key and value bias of a language model, trains the best."""

from .config import BeftConfigMixin, BeftSFTConfig
from .importance import BiasScores
from .layout import BiasSite, UnsupportedLayoutError, find_bias_sites
from .merge import MergeError, MergeReport, merge_adapter
from .trainer import BeftSFTTrainer, BeftTrainerMixin
from .tuner import load_adapter


__version__ = "0.1.0"

__all__ = [
    "BeftConfigMixin",
    "BeftSFTConfig",
    "BeftSFTTrainer",
    "BeftTrainerMixin",
    "BiasScores",
    "BiasSite",
    "MergeError",
    "MergeReport",
    "UnsupportedLayoutError",
    "find_bias_sites",
    "load_adapter",
    "merge_adapter",
]
