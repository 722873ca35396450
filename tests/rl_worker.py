"""Trains on pairs, rewards or marks under whatever launched it: for `test_rl_engines.py`.

accelerate launch --config_file ... tests/rl_worker.py KIND FOLDER ROWS_FOR_EACH_PROCESS
"""

import json
import sys
from pathlib import Path

from rl_trainers import make
from transformers import AutoTokenizer

from beft_trl.cli.run import leave


kind, folder, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
settings = {
    "per_device_train_batch_size": batch, "use_cpu": False, "max_grad_norm": 0.0,
    "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(folder / "base")
trainer = make(kind, folder / "out", str(folder / "base"), tokenizer=tokenizer, settings=settings)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "losses.json").write_text(json.dumps(losses))
leave(trainer)
