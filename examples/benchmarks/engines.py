"""Step time, memory and checkpoints of every engine and precision on the demo model, side by side.

    python examples/benchmarks/engines.py                # about half an hour on two CPU cores
    python examples/benchmarks/engines.py --only single zero3

Every cell is the user's own launch line on `recipes/demo.yaml` with a given term and four rows a step. Ratios are to
bf16 on one process, in the same run: the seconds of a shared machine say little. Memory is the highest sum of the
processes' resident sets, in which libraries that they share count for each.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from beft_trl import BeftSFTConfig, BeftSFTTrainer
from beft_trl.engines import ENGINES, PRECISIONS


REPOSITORY = Path(__file__).parents[2]
FLAGS = {
    "fp32": ["--dtype", "float32", "--bf16", "false"],
    "bf16": ["--dtype", "bfloat16", "--bf16", "true"],
    "8bit": ["--dtype", "float32", "--bf16", "false", "--load_in_8bit"],
    "4bit": ["--dtype", "float32", "--bf16", "false", "--load_in_4bit", "--bnb_4bit_quant_storage", "float32"],
}


def measure_cell(engine: str, precision: str, steps: int) -> dict:
    on_cpu = not torch.cuda.is_available()
    config = f"{engine}_cpu" if on_cpu and engine in ("single", "ddp") else engine
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"recipes/accelerate_configs/{config}.yaml", "--main_process_port", "0"]
        command += ["examples/sft_opt.py", "--config", "recipes/demo.yaml", *FLAGS[precision]]
        command += ["--bias_term", "value", "--answers", "0", "--max_steps", str(steps)]
        command += ["--per_device_train_batch_size", "4" if engine == "single" else "2", "--logging_steps", "1"]
        command += ["--save_strategy", "steps", "--save_steps", str(steps), "--output_dir", f"{folder}/out"]
        command += ["--use_cpu", "true"] if on_cpu else []
        peak = 0
        with open(f"{folder}/log", "w+", encoding="utf-8") as log:
            process = psutil.Popen(command, stdout=log, stderr=log, cwd=REPOSITORY)
            while process.poll() is None:
                peak = max(peak, memory_of(process))
                time.sleep(0.2)
            log.seek(0)
            text = log.read()
        if process.returncode:
            return {"error": text[-400:]}
        checkpoint = Path(folder, "out", f"checkpoint-{steps}")
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        return {
            "seconds": float(re.search(r"scoring, ([\d.]+) training", text)[1]) / steps,
            "peak": peak,
            "checkpoint": bytes_of(checkpoint),
            "loss": next(entry["loss"] for entry in history if "loss" in entry),
        }


def bytes_of(checkpoint: Path) -> int:
    """Without the tokenizer, which is the same in every kind of checkpoint."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and "tokenizer" not in path.name]
    return sum(path.stat().st_size for path in files)


def memory_of(process: psutil.Process) -> int:
    total = 0
    for child in process.children(recursive=True):
        try:
            if "sft_opt.py" in " ".join(child.cmdline()):
                total += child.memory_info().rss
        except psutil.Error:
            continue
    return total


def measure_checkpoint(kind: str) -> dict:
    """Seconds and bytes of one checkpoint of BEFT, LoRA r=8 on query and value, or the whole model."""
    rows = load_dataset("json", data_files=str(REPOSITORY / "examples/data/support_train.jsonl"), split="train")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
        settings |= {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}, "disable_tqdm": True}
        model = str(REPOSITORY / "models/SmolLM2-135M-Instruct")
        if kind == "BEFT":
            trainer = BeftSFTTrainer(
                model, BeftSFTConfig(folder, bias_term="value", bias_layers="all", **settings), train_dataset=rows
            )
        else:
            lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if kind == "LoRA r=8" else None
            trainer = SFTTrainer(model, SFTConfig(folder, **settings), train_dataset=rows, peft_config=lora)
        trainer.train()
        started = time.perf_counter()
        trainer._save_checkpoint(trainer.model, None)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "bytes": bytes_of(Path(folder) / "checkpoint-1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    base = measure_cell("single", "bf16", args.steps)
    print("| base weights | engine | step, of single bf16 | peak memory, all processes | checkpoint | first loss |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for precision, engine in itertools.product(PRECISIONS, args.only):
        cell = measure_cell(engine, precision, args.steps)
        if "error" in cell:
            print(f"| {precision} | {engine} | failed: {cell['error']!r} |", flush=True)
            continue
        print(
            f"| {PRECISIONS[precision]} | {ENGINES[engine]} | {cell['seconds'] / base['seconds']:.2f} "
            f"| {cell['peak'] / 2**30:.2f} GiB | {cell['checkpoint'] / 1000:.0f} kB | {cell['loss']:.3f} |",
            flush=True,
        )
    print(f"\nSingle-process bf16: {base['seconds']:.2f} s a step, {base['peak'] / 2**30:.2f} GiB.\n")
    print("| one checkpoint | seconds | bytes |\n|---|---:|---:|")
    for kind in ("BEFT", "LoRA r=8", "whole model"):
        saved = measure_checkpoint(kind)
        print(f"| {kind} | {saved['seconds']:.2f} | {saved['bytes']:,} |", flush=True)


if __name__ == "__main__":
    main()
