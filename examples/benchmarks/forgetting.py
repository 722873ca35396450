"""What a model loses of what it knew while it learns a task: BEFT next to LoRA, (IA)3 and full fine-tuning.

python examples/benchmarks/forgetting.py --data-dir DATA     # all runs, appended to results/forgetting.jsonl
python examples/benchmarks/forgetting.py --report            # the tables of what is in the file

Along each run of 400 steps of two rows it measures the task's test rows, and the loss on two kinds of rows that no
run trains on: Alpaca's answers to instructions, and sentences of film reviews as plain text. Runs are compared where
they first reach an accuracy, and at their end. A run that the file holds already is passed over.
"""

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import records
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftConfig
from quality import QUERY_AND_VALUE, measure
from tasks import QUIET, Task, add_arguments, load_task, parse, score_only_labelled_tokens, sst2_parts
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from beft_trl import BeftSFTConfig, BeftSFTTrainer


TASKS = ["routing-126", "trec-100"]
MARKS = (0, 50, 100, 200, 400)  # optimizer steps
KEPT = ("alpaca", "text")
ROWS = 40  # of each
ENOUGH = 0.8  # an accuracy that the runs are compared at


@dataclass(frozen=True)
class Arm:
    """BEFT without a rate, with a setting changed; with one, a PEFT adapter, or everything."""

    rate: float | None = None
    adapter: Callable[[], PeftConfig] | None = None
    settings: dict = field(default_factory=dict)


# Rates were not chosen for runs of this length: LoRA's and that of everything are those of SST-2 (quality.py).
ARMS = {
    "BEFT": Arm(),
    "LoRA r=8": Arm(1e-3, lambda: LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_AND_VALUE)),
    "(IA)3": Arm(1e-2, IA3Config),
    "full": Arm(1e-5),
}
# What could keep more, one setting of BEFT changed at a time.
VARIANTS = {
    **{f"BEFT, weight decay {decay}": Arm(settings={"weight_decay": decay}) for decay in (0.1, 0.3, 1.0)},
    "BEFT, relative 0.02": Arm(settings={"relative_learning_rate": 0.02}),
}


class Marks(TrainerCallback):
    """Measures a run at its marks."""

    def __init__(self, trainer: SFTTrainer, task: Task):
        self.trainer, self.task = trainer, task
        self.found: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        # A scoring pass is a run of its own, before the first step.
        if state.global_step in MARKS and getattr(self.trainer, "bias_scores", True) is not None:
            parts = self.trainer.eval_dataset.items()
            self.found.append(
                {
                    "step": state.global_step,
                    **{
                        name: measure(self.trainer, rows, self.task if name == "task" else PLAIN)
                        for name, rows in parts
                    },
                }
            )
            self.trainer.model.train()


PLAIN = Task("plain", *[Dataset.from_list([])] * 3)


def main(arguments: argparse.Namespace) -> None:
    done = [tuple(line[name] for name in ("model", "task", "seed", "arm")) for line in records.read(arguments.results)]
    for seed in arguments.seeds:
        for name in arguments.tasks:
            task = load_task(name, arguments.data_dir, seed)
            for model in arguments.models:
                for arm in arguments.arms:
                    if (model, name, seed, arm) not in done:
                        found = run(model, task, seed, (ARMS | VARIANTS)[arm], arguments)
                        line = {"model": model, "task": name, "seed": seed, "arm": arm, "marks": found}
                        records.append(arguments.results, line)
                        print(model, name, seed, arm, found[-1], flush=True)


def run(model: str, task: Task, seed: int, arm: Arm, arguments: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            **QUIET, "output_dir": folder, "seed": seed, "max_steps": MARKS[1] if arguments.quick else MARKS[-1],
            "per_device_train_batch_size": 2, "max_length": 256, "logging_strategy": "no",
            "model_init_kwargs": {"dtype": "float32"},
        }  # fmt: skip
        data = {
            "train_dataset": task.train,
            "eval_dataset": {"task": task.test, **kept_rows(arguments)},
            "processing_class": AutoTokenizer.from_pretrained(model),
        }
        if arm.rate is None:
            trainer = BeftSFTTrainer(model, BeftSFTConfig(**config, **arm.settings), **data)
        else:
            adapter = arm.adapter and arm.adapter()
            trainer = SFTTrainer(model, SFTConfig(learning_rate=arm.rate, **config), peft_config=adapter, **data)
        marks = Marks(trainer, task)
        trainer.add_callback(marks)
        trainer.train()
        return marks.found


def kept_rows(arguments: argparse.Namespace) -> dict[str, Dataset]:
    """Rows that no task here trains on; their answers, or all of a sentence but its first word, are scored."""
    if arguments.quick:
        rows = [{"prompt": "The", "completion": " parcel is here."}]
        return dict.fromkeys(KEPT, Dataset.from_list(rows))
    alpaca = load_task("alpaca-1", arguments.data_dir, 0).test.select(range(ROWS))
    sentences = [row["sentence"].strip() for row in sst2_parts(1, arguments.data_dir, 0)[2]]
    long = [words for words in map(str.split, sentences) if len(words) > 15]
    text = [
        {"prompt": words[0], "completion": " " + " ".join(words[1:])} for words in random.Random(0).sample(long, ROWS)
    ]
    return {"alpaca": alpaca, "text": Dataset.from_list(text)}


def report(results: Path) -> None:
    tables = defaultdict(lambda: defaultdict(list))
    for line in records.read(results):
        tables[line["model"], line["task"]][line["arm"]].append(line["marks"])
    for (model, task), arms in tables.items():
        print(f"\n{Path(model).name}, {task}: what is lost, in nats a token, mean and spread of seeds\n")
        print(f"| arm | step | accuracy | NLL | {' | '.join(KEPT)} |\n|---|---:|---:|---:|{'---:|' * len(KEPT)}")
        for arm, runs in arms.items():
            enough = [
                next((mark for mark in marks if (mark["task"]["accuracy"] or 0) >= ENOUGH), None) for marks in runs
            ]
            for name, picked in {f"first at {ENOUGH}": enough, "end": [marks[-1] for marks in runs]}.items():
                if None in picked:
                    print(f"| {arm}, {name} | not reached |{' |' * (2 + len(KEPT))}")
                    continue
                steps = ", ".join(str(mark["step"]) for mark in picked)
                right, loss = (
                    records.spread([mark["task"][each] for mark in picked], 3) for each in ("accuracy", "nll")
                )
                lost = [
                    records.spread(
                        [mark[part]["nll"] - marks[0][part]["nll"] for mark, marks in zip(picked, runs, strict=True)],
                        3,
                    )
                    for part in KEPT
                ]
                print(f"| {arm}, {name} | {steps} | {right} | {loss} | {' | '.join(lost)} |")


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "forgetting.jsonl")
    add_arguments(parser, TASKS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *VARIANTS])
    parsed = parse(parser)
    score_only_labelled_tokens()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
