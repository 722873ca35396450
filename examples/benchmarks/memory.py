"""Estimated against measured memory: `beft check` and the real run, for each configuration.

python examples/benchmarks/memory.py > memory.jsonl

It needs models/SmolLM2-135M-Instruct, which python -m beft_trl.demo writes.
"""

import json
import os
import subprocess
import sys


RECIPE = "recipes/demo.yaml"
# Long rows in large batches, so that activations and logits weigh: every row is a conversation of 512 tokens.
LONG = ["--packing=true", "--packing_strategy=wrapped", "--max_length=512"]
BF16 = ["--dtype=bfloat16"]
CONFIGURATIONS = {
    "bf16, 2 x 56": (None, BF16),
    "fp32, 2 x 56": (None, []),
    "fp32, 4 x 512": (None, [*LONG, "--per_device_train_batch_size=4"]),
    "fp32, 4 x 512, checkpointing": (
        None, [*LONG, "--per_device_train_batch_size=4", "--gradient_checkpointing=true"]
    ),
    "bf16, 4 x 512": (None, [*BF16, *LONG, "--per_device_train_batch_size=4"]),
    "bf16, 8 x 512, checkpointing": (
        None, [*BF16, *LONG, "--per_device_train_batch_size=8", "--gradient_checkpointing=true"]
    ),
    "8-bit, 2 x 56": (None, [*BF16, "--load_in_8bit=true"]),
    "8-bit, 4 x 512": (None, [*BF16, "--load_in_8bit=true", *LONG, "--per_device_train_batch_size=4"]),
    "4-bit, 4 x 512": (None, [*BF16, "--load_in_4bit=true", *LONG, "--per_device_train_batch_size=4"]),
    "bf16, 2 x 512, DDP": ("ddp", [*BF16, *LONG]),
    "bf16, 2 x 512, ZeRO-2": ("zero2", [*BF16, *LONG]),
    "fp32, 2 x 512, ZeRO-3": ("zero3", LONG),
}  # fmt: skip
RUN = [
    "--max_steps=2",
    "--score_steps=1",
    "--answers=0",
    "--per_device_eval_batch_size=1",
    "--output_dir=outputs/memory",
]


def main() -> None:
    for name, (launch, settings) in CONFIGURATIONS.items():
        arguments = [RECIPE, *settings, *RUN, *(["--launch", launch] if launch else [])]
        beft = [sys.executable, "-m", "beft_trl.cli"]
        check = subprocess.run([*beft, "check", *arguments, "--json"], capture_output=True, text=True, check=True)
        estimate = json.loads(check.stdout)["memory"]
        run = subprocess.Popen([*beft, "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(run.pid, 0)  # the largest process of all that it started
        measured = usage.ru_maxrss * 1024
        line = {"configuration": name, "exit_code": os.waitstatus_to_exitcode(status), "measured": measured}
        print(json.dumps({**line, "ratio": round(estimate["total"] / measured, 3), **estimate}), flush=True)


if __name__ == "__main__":
    main()
