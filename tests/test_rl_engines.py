"""Preference, reward and reinforcement learning through the launch line, on two processes and under DeepSpeed.

Not in CI, 12 tests in about six minutes on two cores: pytest -m matrix tests/test_rl_engines.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.matrix

REPOSITORY = Path(__file__).parents[1]
ENGINES = {"single": "single_cpu", "ddp": "ddp_cpu", "zero2": "zero2", "zero3": "zero3"}


def trained(folder, kind, engine):
    """Losses and saved tensors of a run whose global batch is 8 rows."""
    folder.mkdir()
    make_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    config = REPOSITORY / "recipes" / "accelerate_configs" / f"{ENGINES[engine]}.yaml"
    worker = [REPOSITORY / "tests" / "rl_worker.py", kind, folder, "8" if engine == "single" else "4"]
    run = subprocess.run([*launcher, config, *worker], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["DPO", "KTO", "reward"])
def test_an_engine_trains_as_one_process(tmp_path, kind, engine):
    losses, tensors = trained(tmp_path / "one", kind, "single")
    found_losses, found = trained(tmp_path / engine, kind, engine)
    assert found.keys() == tensors.keys()
    torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=0, atol=1e-4)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_an_engine_learns_from_its_own_completions(tmp_path, engine):
    """Processes draw their own completions, so that one process says nothing of the values."""
    losses, tensors = trained(tmp_path / engine, "GRPO", engine)
    assert len(losses) == 4
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in tensors.values())
