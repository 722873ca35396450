"""Step time, peak memory and checkpoints of BEFT next to its floor, PEFT's BEFT, LoRA and full fine-tuning.

python examples/benchmarks/cost.py             # all shapes, appended to results/cost.jsonl
python examples/benchmarks/cost.py --report    # the tables of what is in the file

Rows are random tokens, of which the last quarter counts for the loss: time and memory do not depend on their values.
Each run is a process of its own, the arms take turns, and the tables give ratios, since seconds on a shared machine
say little: on a CPU they are those of the process itself. The arms run in `trl.SFTTrainer`, but for two: `floor` and
`bare loop` are loops over the batches, of a frozen forward and backward pass and of PEFT's BEFT. All have TRL's loss,
only on the labelled tokens, as on a GPU.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import records
import torch
from datasets import Dataset
from peft import BeftConfig, LoraConfig, get_peft_model
from tasks import FULL_MODELS, MODELS, QUICK_MODEL, QUIET, score_only_labelled_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from beft_trl import BeftSFTConfig, BeftSFTTrainer


ADAPTERS = {
    "PEFT BEFT": lambda: BeftConfig(target_modules=["v_proj"]),
    "LoRA r=8, q and v": lambda: LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    "LoRA r=16, all linear": lambda: LoraConfig(r=16, target_modules="all-linear"),
}
BARE = ("floor", "bare loop")
# What differs from the other arms, which train all layers, so that none is frozen, and checkpoint no activations.
SPANS = {
    "BEFT upper": {"bias_layers": "upper", "cache_frozen_layers": False},
    "BEFT upper, first epoch": {"bias_layers": "upper"},
    "BEFT upper, later epochs": {"bias_layers": "upper"},
    "BEFT checkpointed": {"gradient_checkpointing": True},
    "BEFT upper, checkpointed": {
        "bias_layers": "upper", "cache_frozen_layers": False, "gradient_checkpointing": True,
    },
}  # fmt: skip
LATER = "later epochs"  # how the arms end whose rows come back
ARMS = (
    *("floor", "bare loop", "PEFT BEFT", "BEFT", "BEFT all", *SPANS),
    *("LoRA r=8, q and v", "LoRA r=16, all linear", "full"),
)
# How time and memory grow is shown for fewer arms.
QUICK_ARMS = ("floor", "PEFT BEFT", "BEFT", "BEFT all", "BEFT upper, checkpointed")
GROWING = ("PEFT BEFT", "BEFT", "LoRA r=8, q and v", "full")
BATCH, LENGTH = 4, 128
DEPTH = {"models/opt-small": 6, "models/SmolLM2-135M-Instruct": 30, QUICK_MODEL: 2}
WARMING_UP = 3  # steps
# glibc gives large tensors fresh pages in every step until a process's heap has grown, as it does in a scoring pass.
# For no other reason an arm that had one before its run was a tenth faster.
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
SCORE_STEPS = {100: 3, 1000: 5}  # by default, in a run of so many steps; these runs are shorter


def first_shape(model: str) -> dict:
    return {"batch": BATCH, "length": LENGTH, "layers": DEPTH[model]}


def shapes(model: str) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Arms and shapes: the first is compared in full, the others in how the arms grow."""
    first = first_shape(model)
    yield ARMS, first
    for change in ({"batch": BATCH // 2}, {"batch": BATCH * 2}, {"length": LENGTH // 2}, {"length": LENGTH * 2}):
        yield GROWING, first | change
    yield GROWING, first | {"layers": DEPTH[model] // 2}


def main(arguments: argparse.Namespace) -> None:
    done = {key(line) for line in records.read(arguments.results)}
    for model in arguments.models:
        chosen = [(arguments.arms, first_shape(model))] if arguments.arms else shapes(model)
        for arms, shape in chosen:
            for turn, arm in itertools.product(range(arguments.turns if shape == first_shape(model) else 1), arms):
                cell = {"model": model, "arm": arm, **shape, "turn": turn}
                if key(cell) in done:
                    continue
                asked = {**cell, "steps": arguments.steps}
                line = cell | (measure(asked) if arguments.quick else measure_apart(asked))
                records.append(arguments.results, line)
                print(*key(line), f"{median(line['step_seconds']):.3f} s a step", flush=True)


def key(line: dict) -> tuple:
    return tuple(line[name] for name in ("model", "arm", "batch", "length", "layers", "turn"))


def measure_apart(cell: dict) -> dict:
    """In a process of its own, so that its peak memory is that of this run."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **KEEP_PAGES})
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure(cell: dict) -> dict:
    set_seed(0)
    # fp32 on a CPU: not all of them compute in 16 bits at the same pace.
    dtype = MODELS[cell["model"]].dtype if torch.cuda.is_available() else "float32"
    model = AutoModelForCausalLM.from_pretrained(cell["model"], num_hidden_layers=cell["layers"], dtype=dtype)
    rows = random_rows(cell, model.config.vocab_size)
    measured = measure_loop(cell, model, rows) if cell["arm"] in BARE else measure_trainer(cell, model, rows)
    measured["step_seconds"] = measured["step_seconds"][WARMING_UP:]
    return {**measured, "peak_bytes": records.peak_bytes()}


def random_rows(cell: dict, vocabulary: int) -> Dataset:
    steps = 1 if cell["arm"].endswith(LATER) else cell["steps"]
    ids = torch.randint(3, vocabulary, (cell["batch"] * steps, cell["length"]))
    labels = ids.clone()
    labels[:, : -cell["length"] // 4] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def measure_loop(cell: dict, model, rows: Dataset) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add_fused_lm_head(model)
    if cell["arm"] == "floor":
        # The gradient of the first layer's input passes through every layer, and no weight has one.
        model = model.to(device).train().requires_grad_(False)
        model.enable_input_require_grads()
        optimizer = None
    else:
        model = get_peft_model(model.to(device), ADAPTERS["PEFT BEFT"]()).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    collate, watch = DataCollatorForLanguageModeling(pad_token_id=0), Stopwatch()
    watch.on_train_begin()
    for start in range(0, len(rows), cell["batch"]):
        batch = collate([rows[index] for index in range(start, start + cell["batch"])])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        model(**batch, use_cache=False, fused_lm_head=True).loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        watch.on_step_end()
    return {"step_seconds": watch.steps}


def measure_trainer(cell: dict, model, rows: Dataset) -> dict:
    watch, arm = Stopwatch(), cell["arm"]
    with tempfile.TemporaryDirectory() as folder:
        config = {
            **QUIET, "output_dir": folder, "max_steps": cell["steps"], "per_device_train_batch_size": cell["batch"],
            "learning_rate": 1e-4, "max_length": None, "save_strategy": "steps", "save_steps": cell["steps"],
            "logging_strategy": "no",
        }  # fmt: skip
        data = {
            "train_dataset": rows,
            "processing_class": AutoTokenizer.from_pretrained(cell["model"]),
            "callbacks": [watch],
        }
        if arm.startswith("BEFT"):
            term = "all" if arm == "BEFT all" else "auto"
            config |= {"bias_layers": "all", **SPANS.get(arm, {})}
            trainer = BeftSFTTrainer(model, BeftSFTConfig(bias_term=term, score_steps=2, **config), **data)
        else:
            adapter = ADAPTERS[arm]() if arm in ADAPTERS else None
            trainer = SFTTrainer(model, SFTConfig(**config), peft_config=adapter, **data)
        measured = {}
        if arm == "BEFT":
            measured["scoring_seconds"] = {
                str(steps): seconds_to_score(trainer, steps) for steps in SCORE_STEPS.values()
            }
        trainer.train()
        checkpoint = Path(folder, f"checkpoint-{cell['steps']}")
        measured["checkpoint_bytes"] = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return {**measured, "step_seconds": watch.steps, "checkpoint_seconds": watch.saving}


def seconds_to_score(trainer: BeftSFTTrainer, steps: int) -> float:
    started = now()
    trainer.score(steps)
    return now() - started


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.steps, self.last, self.saving = [], None, None

    def on_train_begin(self, *args, **kwargs):
        # The scoring pass calls no callback of the user's, so it lies before this.
        self.last = now()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(now() - self.last)
        self.last += self.steps[-1]

    def on_save(self, *args, **kwargs):
        self.saving = now() - self.last


def now() -> float:
    """Seconds of the clock on a GPU; on a CPU those of this process in all its threads, without what others take."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def by_shape(results: Path) -> dict[tuple, dict[str, list[dict]]]:
    """By model, batch, length and layers, the runs of each arm."""
    runs = defaultdict(lambda: defaultdict(list))
    for line in records.read(results):
        runs[line["model"], line["batch"], line["length"], line["layers"]][line["arm"]].append(line)
    return runs


def report(results: Path) -> None:
    runs = by_shape(results)
    for model in dict.fromkeys(shape[0] for shape in runs):
        first = (model, *first_shape(model).values())
        report_arms(model, runs[first])
        report_scoring(runs[first])
        others = {shape[1:]: arms for shape, arms in runs.items() if shape[0] == model and shape != first}
        if others:
            report_growth(runs[first], others)


def seconds(lines: list[dict]) -> float:
    return median(step for line in lines for step in line["step_seconds"])


def peak(lines: list[dict]) -> float:
    return median(line["peak_bytes"] for line in lines)


def report_arms(model: str, arms: dict[str, list[dict]]) -> None:
    print(f"\n{Path(model).name}, {BATCH} x {LENGTH} tokens:\n")
    print("| arm | seconds a step | of floor | of PEFT BEFT | peak GiB | checkpoint bytes | seconds to save |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for arm, lines in arms.items():
        step = seconds(lines)
        others = [arms.get(other) for other in ("floor", "PEFT BEFT")]
        of = " | ".join(f"{step / seconds(other):.3f}" if other else "" for other in others)
        saving = " | "
        if "checkpoint_bytes" in lines[0]:
            saving = f"{lines[0]['checkpoint_bytes']:,} | {median(line['checkpoint_seconds'] for line in lines):.2f}"
        print(f"| {arm} | {step:.3f} | {of} | {peak(lines) / 2**30:.2f} | {saving} |")


def report_scoring(arms: dict[str, list[dict]]) -> None:
    measured = [line["scoring_seconds"] for line in arms.get("BEFT", ()) if "scoring_seconds" in line]
    if not measured or "BEFT all" not in arms:
        return
    print("\n| run | scoring steps | seconds | share of the run | the paper's run of all biases, times the pass |")
    print("|---:|---:|---:|---:|---:|")
    for steps, score_steps in SCORE_STEPS.items():
        scoring = median(each[str(score_steps)] for each in measured)
        share, times = scoring / (steps * seconds(arms["BEFT"])), steps * seconds(arms["BEFT all"]) / scoring
        print(f"| {steps} steps | {score_steps} | {scoring:.2f} | {share:.1%} | {times:.0f} |")


def report_growth(first: dict[str, list[dict]], others: dict[tuple, dict[str, list[dict]]]) -> None:
    print("\nSeconds a step and peak memory, relative to the same arm above:\n")
    print(f"| batch x length, layers | {' | '.join(GROWING)} |\n|---|{'---:|' * len(GROWING)}")
    for (batch, length, layers), arms in others.items():
        ratios = (
            f"{seconds(arms[arm]) / seconds(first[arm]):.2f}, {peak(arms[arm]) / peak(first[arm]):.2f}"
            for arm in GROWING
        )
        print(f"| {batch} x {length}, {layers} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "cost.jsonl")
    parser.add_argument("--models", nargs="+", default=FULL_MODELS)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these, at the first shape")
    parser.add_argument("--quick", action="store_true", help="one shape of models/opt-quick, to see that it works")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # one run, in this process
    parsed = parser.parse_args()
    score_only_labelled_tokens()
    if parsed.cell:
        print(json.dumps(measure(json.loads(parsed.cell))))
        sys.exit()
    if parsed.quick:
        parsed.models, parsed.arms, parsed.steps, parsed.turns = [QUICK_MODEL], QUICK_ARMS, 5, 1
    if not parsed.report:
        main(parsed)
    report(parsed.results)
