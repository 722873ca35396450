"""What rewards teach one bias, next to LoRA r=8 with as many answers: accuracy and mean reward over the steps.

python examples/benchmarks/grpo.py              # all runs, appended to results/grpo.jsonl
python examples/benchmarks/grpo.py --report     # the table of what is in the file

Task, prompts and reward are those of examples/grpo.py, and the settings are its recipe's but for the learning rates.
A run that the file holds already is passed over.
"""

import argparse
import runpy
import tempfile
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from statistics import fmean

import records
import yaml
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from beft_trl import BeftGRPOConfig, BeftGRPOTrainer


EXAMPLES = Path(__file__).parents[1]
RECIPE = yaml.safe_load((EXAMPLES.parent / "recipes" / "rl" / "grpo.yaml").read_text(encoding="utf-8"))
RATES = {"BEFT": [None, 0.02], "LoRA r=8": [3e-4, 1e-3]}  # relative and absolute; `None`: the recipe's
SEEDS = [0, 1, 2]
PARTS = 4  # of LoRA's batch
EVERY, LAST = 10, 10  # steps between two looks at the held-out messages, and those of which rewards are compared


def main(arguments: argparse.Namespace) -> None:
    done = [key(line) for line in records.read(arguments.results)]
    for seed in arguments.seeds:
        for arm in arguments.arms:
            for rate in arguments.rates or RATES[arm]:
                line = {"arm": arm, "learning_rate": rate, "seed": seed, "steps": arguments.steps}
                if key(line) not in done:
                    line |= run(arguments.model, arm, rate, seed, arguments.steps)
                    records.append(arguments.results, line)
                    print(*key(line), line["accuracy"], f"{line['seconds']:.0f} s", flush=True)


def key(line: dict) -> tuple:
    return line["arm"], line["learning_rate"], line["seed"], line["steps"]


def run(model: str, arm: str, rate: float | None, seed: int, steps: int | None) -> dict:
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    train, test = (
        load_dataset("json", data_files=RECIPE[f"{part}_file"], split="train") for part in ("train", "test")
    )
    shown, rest = example["split"](train)
    held_out = example["prompts"](test, shown)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lora = arm != "BEFT"
    config = GRPOConfig if lora else BeftGRPOConfig
    settings = {each.name: RECIPE[each.name] for each in fields(config) if each.name in RECIPE}
    settings |= {"seed": seed, "disable_tqdm": True, "model_init_kwargs": {"dtype": RECIPE["dtype"]}}
    answers = settings["per_device_train_batch_size"]
    if rate:
        settings["learning_rate" if lora else "relative_learning_rate"] = rate
    if lora:
        # All answers of a step at once would be 15 GB of activations, since LoRA's gradients pass every layer.
        settings |= {"per_device_train_batch_size": answers // PARTS, "gradient_accumulation_steps": PARTS}
    settings |= {"max_steps": steps} if steps else {}
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "reward_funcs": example["right_team"],
            "args": config(**settings | {"output_dir": folder, "use_cpu": True}),
            "train_dataset": example["prompts"](rest, shown),
            "processing_class": tokenizer,
        }
        if lora:
            adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            trainer = GRPOTrainer(model, peft_config=adapter, **given)
        else:
            trainer = BeftGRPOTrainer(model, **given)
        look = Look(lambda: example["accuracy"](trainer.model, tokenizer, held_out))
        look.accuracy[0] = look.measure()
        trainer.add_callback(look)
        started, computed = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, computed = time.perf_counter() - started, time.process_time() - computed
    return {
        "seconds": round(seconds - look.seconds, 1),
        "cpu_seconds": round(computed - look.cpu_seconds, 1),
        "answers": answers * trainer.state.global_step,
        "trainable": sum(each.numel() for each in trainer.model.parameters() if each.requires_grad),
        "accuracy": look.accuracy,
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
    }


class Look(TrainerCallback):
    """Notes the held-out accuracy by step, and what it takes."""

    def __init__(self, measure):
        self.measure, self.accuracy = measure, {}
        self.seconds = self.cpu_seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0 or state.global_step == state.max_steps:
            started, computed = time.perf_counter(), time.process_time()
            self.accuracy[state.global_step] = self.measure()
            print(f"Step {state.global_step}: held-out accuracy {self.accuracy[state.global_step]:.3f}", flush=True)
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - computed


def runs_of(results: Path) -> dict[str, list[dict]]:
    """The runs of each arm and rate, one for a seed, by what a table calls them."""
    lines = defaultdict(list)
    for line in records.read(results):
        lines[f"{line['arm']}, {line['learning_rate'] or RECIPE['relative_learning_rate']}"].append(line)
    return lines


def last_reward(lines: list[dict]) -> float:
    return fmean(fmean(line["rewards"][-LAST:]) for line in lines)


def report(results: Path) -> None:
    print("| arm, learning rate | seeds | answers | accuracy before | after | last ten rewards | CPU seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for arm, lines in runs_of(results).items():
        before, after = ([list(line["accuracy"].values())[at] for line in lines] for at in (0, -1))
        cells = [
            arm, len(lines), f"{lines[0]['answers']:,}",
            f"{fmean(before):.3f}", records.spread(after, 3), f"{last_reward(lines):.3f}",
            f"{fmean(line['cpu_seconds'] for line in lines):,.0f}",
        ]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "grpo.jsonl")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of those of the arms: relative ones for BEFT")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parsed = parser.parse_args()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
