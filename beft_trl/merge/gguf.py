"""GGUF files for llama.cpp, written by its own converter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from ..weight_files import MergeError


FOLDER_VARIABLE = "LLAMA_CPP"
MODEL_SCRIPT, LORA_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"


def find_converter(llama_cpp: str | Path | None = None) -> Path:
    """The folder of llama.cpp's source, whose converter can run here.

    Args:
        llama_cpp (`str` or `Path`, *optional*): the folder. Default: that of the environment variable `LLAMA_CPP`.

    Raises:
        MergeError: if it is not given, has no converter, or the converter lacks a package.
    """
    given = str(llama_cpp or os.environ.get(FOLDER_VARIABLE, ""))
    folder = Path(given)
    if not given or not all((folder / script).is_file() for script in (MODEL_SCRIPT, LORA_SCRIPT)):
        where = f"{folder} has no {MODEL_SCRIPT} and {LORA_SCRIPT}" if given else "no folder of llama.cpp is given"
        raise MergeError(
            f"A GGUF is written by llama.cpp's own converter, and {where}. Get its source (git clone --depth 1 "
            f"https://github.com/ggml-org/llama.cpp) and name the folder: --llama-cpp llama.cpp, or {FOLDER_VARIABLE} "
            "in the environment."
        )
    # It imports this one before it looks whether the tokenizer needs it.
    if importlib.util.find_spec("sentencepiece") is None:
        raise MergeError(
            "llama.cpp's converter imports sentencepiece, which is not installed: pip install sentencepiece"
        )
    return folder


def convert_model(converter: Path, checkpoint: Path, output: Path, outtype: str) -> None:
    """Writes a checkpoint with its tokenizer as a GGUF.

    Args:
        converter (`Path`): what `find_converter` gave.
        checkpoint (`Path`): folder of the model.
        output (`Path`): the file.
        outtype (`str`): of the matrices: `"f32"`, `"f16"`, `"bf16"`, or another that the converter knows. Biases are
            fp32 in any.

    Raises:
        MergeError: with the converter's last words, if it fails.
    """
    _run(converter / MODEL_SCRIPT, [str(checkpoint), "--outfile", str(output), "--outtype", outtype], output)


def convert_lora(converter: Path, lora: Path, base: Path, output: Path) -> None:
    """Writes a LoRA of PEFT as a GGUF in fp32, for `llama-server --lora`.

    Args:
        converter (`Path`): what `find_converter` gave.
        lora (`Path`): folder of the LoRA.
        base (`Path`): folder of the base model, of which only the configuration is read.
        output (`Path`): the file.

    Raises:
        MergeError: with the converter's last words, if it fails.
    """
    _run(
        converter / LORA_SCRIPT, [str(lora), "--base", str(base), "--outfile", str(output), "--outtype", "f32"], output
    )


def _run(script: Path, arguments: list[str], output: Path) -> None:
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not output.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        words = said[-1] if said else f"exit code {done.returncode}"
        raise MergeError(
            f"{script} did not write a GGUF: {words}. If it does not know the model or its tokenizer, a newer "
            "llama.cpp may."
        )
