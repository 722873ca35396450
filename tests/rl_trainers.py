"""Trainers of preference, reward and reinforcement learning on tiny models, with their rows."""

import torch
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from transformers import (
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    set_seed,
)

from beft_trl import (
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


COMMON = {
    "max_steps": 4, "score_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
    "bias_layers": "all", "bias_term": "value",
    "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2,
    "relative_learning_rate": None, "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip


def pairs():
    rows = [{**row, "chosen": row["completion"], "rejected": " w50 w51"} for row in make_rows(32)]
    return Dataset.from_list(rows).remove_columns("completion")


def marked():
    return Dataset.from_list([{**row, "label": number % 2 == 0} for number, row in enumerate(make_rows(32))])


def prompts():
    return make_rows(16).remove_columns("completion")


def short_answers(completions, **columns):
    """A reward that differs within each group."""
    return [float(len(set(text.split()))) for text in completions]


GIVEN = {
    "DPO": (BeftDPOTrainer, BeftDPOConfig, pairs), "KTO": (BeftKTOTrainer, BeftKTOConfig, marked),
    "reward": (BeftRewardTrainer, BeftRewardConfig, pairs), "GRPO": (BeftGRPOTrainer, BeftGRPOConfig, prompts),
    "RLOO": (BeftRLOOTrainer, BeftRLOOConfig, prompts),
}  # fmt: skip
CAUSAL = [kind for kind in GIVEN if kind != "reward"]
LEARN_FROM_REWARDS = ("GRPO", "RLOO")
ONLINE = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}


def make(kind, folder, model=None, rows=None, tokenizer=None, settings=None, **given):
    """A trainer with anything of it replaced."""
    trainer, config, own_rows = GIVEN[kind]
    online = kind in LEARN_FROM_REWARDS
    if online:
        given = {"reward_funcs": short_answers, **given}
    if model is None:
        model = make_reward_model() if kind == "reward" else make_llama()
    return trainer(
        model, args=config(str(folder), **COMMON | (ONLINE if online else {}) | (settings or {})),
        train_dataset=own_rows() if rows is None else rows, processing_class=tokenizer or make_tokenizer(), **given,
    )  # fmt: skip


def make_reward_model():
    set_seed(0)
    config = make_llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


BATCH = {"input_ids": torch.tensor([[5, 6, 7]])}
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
