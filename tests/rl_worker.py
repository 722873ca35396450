"""Trains on pairs, rewards or marks of a folder, under whatever launched it: for `test_rl_engines.py`.

accelerate launch --config_file ... tests/rl_worker.py KIND FOLDER ROWS_FOR_EACH_PROCESS
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer

from beft_trl import (
    BeftDPOConfig,
    BeftDPOTrainer,
    BeftGRPOConfig,
    BeftGRPOTrainer,
    BeftKTOConfig,
    BeftKTOTrainer,
    BeftRewardConfig,
    BeftRewardTrainer,
)
from beft_trl.cli.run import leave


def other_words(completions, **columns):
    """A reward that differs within a group."""
    return [float(len(set(text.split()))) for text in completions]


TRAINERS = {
    "dpo": (BeftDPOTrainer, BeftDPOConfig),
    "kto": (BeftKTOTrainer, BeftKTOConfig),
    "reward": (BeftRewardTrainer, BeftRewardConfig),
    "grpo": (BeftGRPOTrainer, BeftGRPOConfig),
}

kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
trainer_class, config_class = TRAINERS[kind]
online = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1} if kind == "grpo" else {}
config = config_class(
    str(folder / "out"), max_steps=4, per_device_train_batch_size=batch, bias_term="value", bias_layers="all",
    score_steps=2, learning_rate=1e-2, relative_learning_rate=None, bf16=False, gradient_checkpointing=False,
    logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
    model_init_kwargs={"dtype": "float32"}, **online,
)  # fmt: skip
trainer = trainer_class(
    str(folder / "base"),
    args=config,
    train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
    processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    **({"reward_funcs": other_words} if kind == "grpo" else {}),
)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps(losses))
leave(trainer)
