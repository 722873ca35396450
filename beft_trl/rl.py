"""Preference, reward and reinforcement learning with one bias: TRL's trainers, with [`BeftTrainerMixin`] before them.

The reference model of all of them is the frozen base with the biases switched off: there is no second copy of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from .arguments import check_datasets, check_settings, name_of, path_of, refuse_encoder, refuse_endless
from .compat.rollouts import send_only_biases
from .config import RELATIVE_LEARNING_RATE, BeftConfigMixin, RelativeRatesMixin
from .data.labels import datasets_of, position_limit
from .data.preferences import check_marks, check_pairs, check_preferences
from .data.rows import prepare_rows, warn_of_unread
from .deltas import whole_biases
from .layout import find_bias_sites
from .mixin import BeftTrainerMixin
from .rewards import checked_rewards


logger = get_logger(__name__)

PAIRS = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))
PATIENCE = 10  # steps without a reward that differs before a run says so


@dataclass
class BeftDPOConfig(RelativeRatesMixin, DPOConfig):
    """`trl.DPOConfig` with the settings of [`BeftConfigMixin`] and [`RelativeRatesMixin`]."""


@dataclass
class BeftKTOConfig(RelativeRatesMixin, KTOConfig):
    """`trl.KTOConfig` with the settings of [`BeftConfigMixin`] and [`RelativeRatesMixin`]."""


@dataclass
class BeftRewardConfig(BeftConfigMixin, RewardConfig):
    """`trl.RewardConfig` with the settings of [`BeftConfigMixin`].

    Args:
        learning_rate: TRL's 1e-4, of the reward head, which is trained whole.
        relative_learning_rate: of the biases, 0.05. `None`: they learn at `learning_rate`, too.
    """

    relative_learning_rate: float | None = field(
        default=RELATIVE_LEARNING_RATE,
        metadata=BeftConfigMixin.__dataclass_fields__["relative_learning_rate"].metadata,
    )


@dataclass
class OnlineMixin(RelativeRatesMixin):
    """[`RelativeRatesMixin`] for trainers that learn from completions of their own.

    Args:
        bias_term: `"value"`. A scoring pass (`"auto"`) generates and rewards completions twice `score_steps` times.
        cache_frozen_layers: `False`, since no completion comes back.
    """

    bias_term: str = field(default="value", metadata=BeftConfigMixin.__dataclass_fields__["bias_term"].metadata)
    cache_frozen_layers: bool | None = field(
        default=False, metadata=BeftConfigMixin.__dataclass_fields__["cache_frozen_layers"].metadata
    )


@dataclass
class BeftGRPOConfig(OnlineMixin, GRPOConfig):
    """`trl.GRPOConfig` with the settings of [`BeftConfigMixin`], [`RelativeRatesMixin`] and [`OnlineMixin`]."""


@dataclass
class BeftRLOOConfig(OnlineMixin, RLOOConfig):
    """`trl.RLOOConfig` with the settings of [`BeftConfigMixin`], [`RelativeRatesMixin`] and [`OnlineMixin`]."""


class _FromRows(BeftTrainerMixin):
    """Looks at its rows before anything is loaded."""

    _formats: Sequence[Sequence[str]]  # the columns of each format that it takes
    _checks: Sequence[Callable[[Any, str], None]] = ()  # of the rows to learn from
    _reads_every_column = False

    def _check_given(self, given: dict[str, Any], skeleton: Any) -> None:
        check_settings(given["args"], given.get("optimizer_cls_and_kwargs"))
        if not isinstance(self, RewardTrainer):
            refuse_encoder(skeleton)
        refuse_endless(given.get("processing_class"))
        check_datasets(given, self._checked)
        for check in self._checks:
            check(given.get("train_dataset"), "train_dataset")

    def _checked(self, rows: Any, name: str) -> Any:
        rows = check_preferences(rows, name, self._formats)
        if not self._reads_every_column:
            warn_of_unread(rows, name)
        return prepare_rows(rows)


class _FromPairs(_FromRows):
    """Learns from pairs of a chosen and a rejected answer."""

    _formats = PAIRS
    _checks = (check_pairs,)

    def why_no_gradient(self) -> str:
        return (
            "Usually the chosen and the rejected answers are the same once they are cut off: look at max_length and "
            "the rows."
        )


class _FromRewards(_FromRows):
    """Learns from rewards of its own completions."""

    use_vllm: bool
    vllm_generation: Any
    _formats = (("prompt",),)
    _reads_every_column = True  # reward functions are given them

    def __init__(self, *positional: Any, **kwargs: Any):
        self._seen = _Seen()
        super().__init__(*positional, **kwargs)
        for name, rows in datasets_of(self):
            self._refuse_long_prompts(rows, name)
        self.add_callback(_RewardsDiffer(self))
        if self.use_vllm:
            send_only_biases(self.vllm_generation, self._trained_biases)

    def _check_given(self, given: dict[str, Any], skeleton: Any) -> None:
        super()._check_given(given, skeleton)
        given["reward_funcs"] = checked_rewards(given.get("reward_funcs"))
        args = given["args"]
        if getattr(args, "cast_lm_head_to_fp32", False) and getattr(skeleton.config, "tie_word_embeddings", False):
            # This goes when TRL (1.16) looks for the embeddings inside the adapter.
            raise ValueError(
                "cast_lm_head_to_fp32=True is for a head of its own: this model's is tied to its embeddings, which "
                "TRL does not find under an adapter. Leave it out, or load the whole model in fp32, "
                'model_init_kwargs={"dtype": "float32"}.'
            )
        if args.use_vllm:
            self._refuse_base_without_biases(given["model"], skeleton)

    def _refuse_long_prompts(self, rows: Any, name: str) -> None:
        """Refuses prompts after which an answer would run out of positions, where generating ends in an IndexError."""
        positions = position_limit(self.model.get_base_model())
        if positions is None or not isinstance(rows, Dataset):
            return
        tokenizer: Any = self.processing_class
        answer = self.args.max_completion_length
        template: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        template |= self.args.chat_template_kwargs or {}
        for row, prompt in enumerate(rows["prompt"], 1):
            given = tokenizer(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **template)
            tokens = len(given["input_ids"])
            if tokens + answer > positions:
                raise ValueError(
                    f"The prompt in row {row} of the {name} dataset has {tokens} tokens, and max_completion_length="
                    f"{answer} may follow it: {tokens + answer} in all, and the model has {positions} positions. "
                    "Lower max_completion_length, or leave long prompts out."
                )

    def _refuse_base_without_biases(self, model: Any, skeleton: Any) -> None:
        bare = next((site.module for site in find_bias_sites(skeleton) if not site.has_bias), None)
        if bare is not None:
            name = path_of(model)
            raise ValueError(
                f"use_vllm=True sends vLLM the trained biases, and it has no room for them: {bare} has no bias. Write "
                f"the base with biases of zero, beft merge --base {name} --output {name_of(model)}-biases, and train "
                "that (and start the server with it)."
            )

    def _trained_biases(self) -> Iterator[tuple[str, Tensor]]:
        for path, bias in whole_biases(self.model, self.trained_sites).items():
            yield f"{path}.bias", bias.to(self.accelerator.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **kwargs: Any):
        if model.training:
            self._seen.look_at(inputs)
        return super().compute_loss(model, inputs, *others, **kwargs)

    def why_no_gradient(self) -> str:
        return self._seen.why_nothing_was_learnt()


class _Seen:
    """Whether the completions of a run had tokens that count, and rewards that differ within the group of a prompt."""

    def __init__(self) -> None:
        self.tokens = self.differing = False

    def look_at(self, inputs: dict[str, Any]) -> None:
        # One look at the device for each step until there is something, which is short next to generating.
        self.tokens = self.tokens or bool(inputs["completion_mask"].any())
        self.differing = self.differing or bool(inputs["advantages"].any())

    @property
    def enough(self) -> bool:
        return self.tokens and self.differing

    def in_any_process(self, accelerator: Any) -> "_Seen":
        """The same of all processes. Each of them calls it."""
        found = _Seen()
        mine = torch.tensor([[self.tokens, self.differing]], device=accelerator.device)
        found.tokens, found.differing = accelerator.gather(mine).any(0).tolist()
        return found

    def why_nothing_was_learnt(self) -> str:
        if not self.tokens:
            return (
                "No token of a completion counted: with mask_truncated_completions=True, all were cut off. Raise "
                "max_completion_length."
            )
        if not self.differing:
            return (
                "The rewards never differed among the completions of a prompt, so that none was better than another; "
                "None and NaN do not count. Give a reward for part of the way (length, format), more "
                "num_generations, a higher temperature, or prompts that the base solves now and then."
            )
        return "The rewards differed: look at beta, epsilon and the reward functions."


class _RewardsDiffer(TrainerCallback):
    """Says when the rewards of a run teach nothing: the loss does not show it."""

    def __init__(self, trainer: _FromRewards):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._seen = _Seen()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step - self.trainer.resumed_at == PATIENCE:
            seen = self.trainer._seen.in_any_process(self.trainer.accelerator)
            if not seen.enough:
                logger.warning(f"Nothing was learnt in {PATIENCE} steps. {seen.why_nothing_was_learnt()}")

    def on_train_end(self, args, state, control, **kwargs):
        seen = self.trainer._seen.in_any_process(self.trainer.accelerator)
        # What a run learnt before it was resumed was not seen.
        if state.global_step and not self.trainer.resumed_at and not seen.enough:
            raise RuntimeError(f"The run learnt nothing. {seen.why_nothing_was_learnt()}")


class BeftDPOTrainer(_FromPairs, DPOTrainer):
    """`trl.DPOTrainer` that trains one attention bias term. Takes what `DPOTrainer` takes, except a `peft_config`."""

    _config_class = BeftDPOConfig


class BeftKTOTrainer(_FromRows, KTOTrainer):
    """`trl.KTOTrainer` that trains one attention bias term. Takes what `KTOTrainer` takes, except a `peft_config`."""

    _config_class = BeftKTOConfig
    _formats = (("prompt", "completion", "label"), PAIRS[0])
    _checks = (check_marks,)


class BeftRewardTrainer(_FromPairs, RewardTrainer):
    """`trl.RewardTrainer` that trains one attention bias term, and the reward head, which is saved next to it.

    Takes what `RewardTrainer` takes, except a `peft_config`.
    """

    _config_class = BeftRewardConfig


class BeftGRPOTrainer(_FromRewards, GRPOTrainer):
    """`trl.GRPOTrainer` that trains one attention bias term.

    Takes what `GRPOTrainer` takes, except a `peft_config`. `train()` raises a `RuntimeError` if no reward differed.

    ```python
    trainer = BeftGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=reward,
        args=BeftGRPOConfig(output_dir="out"),
        train_dataset=prompts,
    )
    ```
    """

    _config_class = BeftGRPOConfig


class BeftRLOOTrainer(_FromRewards, RLOOTrainer):
    """`trl.RLOOTrainer` that trains one attention bias term. As [`BeftGRPOTrainer`], by REINFORCE leave-one-out."""

    _config_class = BeftRLOOConfig
