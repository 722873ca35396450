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
    "bias_layers": "all", "bias_term": "auto",
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


def make_dpo(model, folder, **settings):
    return BeftDPOTrainer(
        model, args=BeftDPOConfig(str(folder), **(COMMON | settings)), train_dataset=pairs(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_kto(model, folder, **settings):
    return BeftKTOTrainer(
        model, args=BeftKTOConfig(str(folder), **(COMMON | settings)), train_dataset=marked(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_online(trainer, config, model, folder, **settings):
    sizes = {"num_generations": 2, "max_completion_length": 6}
    return trainer(
        model, short_answers, args=config(str(folder), **(COMMON | sizes | settings)), train_dataset=prompts(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_grpo(model, folder, **settings):
    return make_online(BeftGRPOTrainer, BeftGRPOConfig, model, folder, **({"beta": 0.1} | settings))


def make_rloo(model, folder, **settings):
    return make_online(BeftRLOOTrainer, BeftRLOOConfig, model, folder, **({"beta": 0.1} | settings))


def make_reward(model, folder, **settings):
    return BeftRewardTrainer(
        model, args=BeftRewardConfig(str(folder), **(COMMON | settings)), train_dataset=pairs(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


TRAINERS = {"DPO": make_dpo, "KTO": make_kto, "GRPO": make_grpo, "RLOO": make_rloo}
BATCH = {"input_ids": torch.tensor([[5, 6, 7]])}


GIVEN = {
    "DPO": (BeftDPOTrainer, BeftDPOConfig, pairs), "KTO": (BeftKTOTrainer, BeftKTOConfig, marked),
    "reward": (BeftRewardTrainer, BeftRewardConfig, pairs), "GRPO": (BeftGRPOTrainer, BeftGRPOConfig, prompts),
}  # fmt: skip


def make(kind, folder, model=None, rows=None, tokenizer=None, settings=None, **given):
    """A trainer with anything of it replaced."""
    trainer, config, own_rows = GIVEN[kind]
    if kind == "GRPO":
        given = {"reward_funcs": short_answers, **given}
        settings = {"num_generations": 2, "max_completion_length": 6, **(settings or {})}
    if model is None:
        model = make_reward_model() if kind == "reward" else make_llama()
    return trainer(
        model, args=config(str(folder), **COMMON | {"bias_term": "value"} | (settings or {})),
        train_dataset=own_rows() if rows is None else rows, processing_class=tokenizer or make_tokenizer(), **given,
    )  # fmt: skip


def make_reward_model():
    set_seed(0)
    config = make_llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)
