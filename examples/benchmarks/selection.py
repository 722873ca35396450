"""Does the score choose the term that training proves best?

python examples/benchmarks/selection.py --data-dir DATA      # all cells, appended to results/selection.jsonl
python examples/benchmarks/selection.py --report             # the tables of what is in the file

A cell is a model, a task and a seed. The oracle trains each term by itself, and all together, to the end, and ranks
them by the loss on the task's test rows. Against it stand the choices of the three scores, from every anchor that the
model has, after 2, 5, 10 and 20 steps and after a scoring pass as long as the run, which is the paper's procedure. A
cell that the file holds already is passed over, so that the command can be stopped and started again.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import records
from tasks import MODELS, QUICK_TASK, QUIET, Task, add_arguments, load_task, parse, score_only_labelled_tokens
from transformers import AutoTokenizer

from beft_trl import BeftSFTConfig, BeftSFTTrainer


# Epochs of each task, for runs of 38 to 40 steps: what differs between the tasks is their rows.
EPOCHS = {
    "sst2-32": 10,
    "sst2-100": 3,
    "sst2-300": 1,
    "alpaca-100": 3,
    "alpaca-300": 1,
    "routing-126": 3,
    QUICK_TASK: 1,
}
TASKS = [task for task in EPOCHS if task != QUICK_TASK]
BATCH, SCORE_STEPS = 8, (2, 5, 10, 20)
TERMS = ("query", "key", "value", "all")
SCORES = ("importance", "magnitude", "fisher")


def main(arguments: argparse.Namespace) -> None:
    done = {(line["model"], line["task"], line["seed"]) for line in records.read(arguments.results)}
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for model in arguments.models:
                if (model, task, seed) not in done:
                    started = time.monotonic()
                    line = cell(model, load_task(task, arguments.data_dir, seed), seed)
                    line["seconds"] = round(time.monotonic() - started, 1)
                    records.append(arguments.results, line)
                    print(f"{model} {task} {seed}: {line['seconds']} s", flush=True)


def cell(model: str, task: Task, seed: int) -> dict:
    epochs, choices = EPOCHS[task.name], []
    for anchor in MODELS[model].anchors:
        with trainer_of(model, task, seed, "auto", score_anchor=anchor) as trainer:
            run_steps = -(-len(trainer.train_dataset) // BATCH) * epochs
            for steps in sorted({min(steps, run_steps) for steps in (*SCORE_STEPS, run_steps)}):
                started = time.monotonic()
                scores = trainer.score(steps)
                choices.append(
                    {
                        "anchor": anchor,
                        "steps": steps,
                        "whole_run": steps == run_steps,
                        "seconds": round(time.monotonic() - started, 2),
                        "scores": records.scores_of(scores),
                    }
                )
    oracle = {}
    for term in TERMS:
        try:
            with trainer_of(model, task, seed, term) as trainer:
                started = time.monotonic()
                trainer.train()
                seconds = time.monotonic() - started
                oracle[term] = {"nll": trainer.evaluate()["eval_loss"], "seconds": round(seconds, 2)}
        except ValueError as error:  # a dead term
            oracle[term] = {"refused": str(error)}
    return {
        "model": model, "task": task.name, "seed": seed, "choices": choices, "oracle": oracle,
        "settings": {"epochs": epochs, "batch": BATCH, "learning_rate": learning_rate(model)},
    }  # fmt: skip


def learning_rate(model: str) -> float:
    return 3e-3 * MODELS[model].rate_factor


@contextmanager
def trainer_of(model: str, task: Task, seed: int, bias_term: str, **settings) -> Iterator[BeftSFTTrainer]:
    with tempfile.TemporaryDirectory() as folder:
        config = BeftSFTConfig(
            folder, bias_term=bias_term, seed=seed, num_train_epochs=EPOCHS[task.name], max_length=128,
            learning_rate=learning_rate(model), bias_layers="all",
            per_device_train_batch_size=BATCH, per_device_eval_batch_size=16,
            model_init_kwargs={"dtype": MODELS[model].dtype}, **QUIET, **settings,
        )  # fmt: skip
        yield BeftSFTTrainer(
            model, config, train_dataset=task.train, eval_dataset=task.test,
            processing_class=AutoTokenizer.from_pretrained(model),
        )  # fmt: skip


def report(results: Path) -> None:
    lines = records.read(results)
    print("Loss on the test rows of each term trained by itself, mean over seeds:\n")
    print("| model | task | seeds | query | key | value | all |\n|---|---|---:|---:|---:|---:|---:|")
    cells = defaultdict(list)
    for line in lines:
        cells[line["model"], line["task"]].append(line)
    for (model, task), group in cells.items():
        values = [
            "dead"
            if "nll" not in group[0]["oracle"][term]
            else f"{fmean(each['oracle'][term]['nll'] for each in group):.4f}"
            for term in TERMS
        ]
        print(f"| {Path(model).name} | {task} | {len(group)} | {' | '.join(values)} |")

    judged = judgements(lines)
    for title, cell_of in {
        "Cells in which the best term is found, and mean score of the first over the second": lambda judgements: (
            f"{sum(one.first for one in judgements)} of {len(judgements)}, "
            f"{fmean(one.margin for one in judgements):.3g}"
        ),
        "Cells in which the whole order is found": lambda judgements: f"{sum(one.order for one in judgements)}",
        "Mean regret, in nats": lambda judgements: f"{fmean(one.regret for one in judgements):.4f}",
        "Mean seconds of the scoring pass, of those of training the best term": lambda judgements: (
            f"{fmean(one.cost for one in judgements):.2f}"
        ),
    }.items():
        columns = list(dict.fromkeys(key[3] for key in judged))
        print(f"\n{title}:\n\n| model | anchor | score | {' | '.join(map(str, columns))} |")
        print(f"|---|---|---|{'---:|' * len(columns)}")
        for model, anchor, score in dict.fromkeys(key[:3] for key in judged):
            cells = " | ".join(cell_of(judged[model, anchor, score, steps]) for steps in columns)
            print(f"| {Path(model).name} | {anchor} | {score} | {cells} |")


class Judgement(NamedTuple):
    """Of a choice: top right, order right, regret in nats, first score over second, seconds over the training's."""

    first: bool
    order: bool
    regret: float
    margin: float
    cost: float


def judgements(lines: list[dict]) -> dict[tuple, list[Judgement]]:
    """By model, anchor, score and steps, one of each cell."""
    judged = defaultdict(list)
    for line in lines:
        for choice in line["choices"]:
            for score in SCORES:
                steps = "whole run" if choice["whole_run"] else choice["steps"]
                judged[line["model"], choice["anchor"], score, steps].append(judge(line, choice, score))
    return judged


def judge(line: dict, choice: dict, score: str) -> Judgement:
    losses = {term: run["nll"] for term, run in line["oracle"].items() if term != "all" and "nll" in run}
    values = choice["scores"][score]
    chosen = sorted(values, key=lambda term: -values[term])
    right = sorted(losses, key=lambda term: losses[term])
    return Judgement(
        first=chosen[0] == right[0],
        order=chosen == right,
        regret=losses[chosen[0]] - losses[right[0]],
        margin=values[chosen[0]] / values[chosen[1]] if values[chosen[1]] else float("inf"),
        cost=choice["seconds"] / line["oracle"][right[0]]["seconds"],
    )


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "selection.jsonl")
    add_arguments(parser, TASKS)
    parsed = parse(parser)
    score_only_labelled_tokens()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
