"""Learning curves of BEFT as it is, next to LoRA and (IA)3 at the settings that are recommended for them.

python examples/benchmarks/defaults.py --data-dir DATA     # all runs, appended to results/defaults.jsonl
python examples/benchmarks/defaults.py --report            # the tables of what is in the file
python examples/benchmarks/defaults.py --data-dir DATA --tasks routing-100 --arms "BEFT, all layers"    # a variant

Nothing is tuned. BEFT has only its model, its rows and `max_length`; LoRA has r=16, alpha=32 and 2e-4, (IA)3 has 8e-3,
which are the values of TRL's and PEFT's own examples, and both have the three epochs of eight rows that are TRL's
defaults.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from statistics import fmean, median

import records
from peft import IA3Config, LoraConfig
from quality import measure
from tasks import MODELS, QUICK_MODEL, QUIET, Model, Task, add_arguments, load_task, parse, score_only_labelled_tokens
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from beft_trl import BeftSFTConfig, BeftSFTTrainer


TASKS = [f"{kind}-{rows}" for kind in ("routing", "letters", "sst2", "trec") for rows in (16, 32, 100)]
DEVELOPMENT = 26  # rows that routing and letters keep from those they are asked for
ADAPTERS = {
    "LoRA r=16": (2e-4, lambda: LoraConfig(r=16, lora_alpha=32)),
    "(IA)3": (8e-3, IA3Config),
}
# One default of BEFT changed at a time.
VARIANTS = {
    "BEFT, all layers": {"bias_layers": "all"},
    "BEFT, relative 0.02": {"relative_learning_rate": 0.02},
    "BEFT, relative 0.1": {"relative_learning_rate": 0.1},
    "BEFT, 200 steps": {"max_steps": 200},
    "BEFT, 800 steps": {"max_steps": 800},
    "BEFT, batch 8": {"per_device_train_batch_size": 8},
    "BEFT, 3e-3 in all layers": {"bias_layers": "all", "learning_rate": 3e-3},
}
ARMS = ["zero-shot", "BEFT", *ADAPTERS]


def main(arguments: argparse.Namespace) -> None:
    done = [tuple(line[name] for name in ("model", "task", "seed", "arm")) for line in records.read(arguments.results)]
    for seed in arguments.seeds:
        for name in arguments.tasks:
            kind, count = name.split("-")
            more = DEVELOPMENT if kind in ("routing", "letters") else 0
            task = load_task(f"{kind}-{int(count) + more}", arguments.data_dir, seed)
            for model in arguments.models:
                for arm in arguments.arms:
                    if (model, name, seed, arm) not in done:
                        result = run(model, task, seed, arm)
                        records.append(
                            arguments.results, {"model": model, "task": name, "seed": seed, "arm": arm, **result}
                        )
                        print(model, name, seed, arm, f"{result['seconds']:.0f} s", result["test"], flush=True)


def run(model: str, task: Task, seed: int, arm: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, task, seed, arm, folder)
        line: dict = {"seconds": 0.0, "steps": 0, "trainable": 0, "selected": None}
        if arm != "zero-shot":
            started = time.perf_counter()
            trainer.train()
            line = {
                "seconds": time.perf_counter() - started,
                "steps": trainer.state.global_step,
                "trainable": sum(each.numel() for each in trainer.model.parameters() if each.requires_grad),
                "selected": getattr(trainer, "selected_bias_term", None),
            }
        return {**line, "test": measure(trainer, trainer.eval_dataset, task)}


def trainer_of(model: str, task: Task, seed: int, arm: str, folder: str) -> SFTTrainer:
    config = {
        **QUIET, "output_dir": folder, "seed": seed, "logging_strategy": "no", "max_length": 256,
        "model_init_kwargs": {"dtype": MODELS.get(model, Model("bfloat16", ())).dtype},
    }  # fmt: skip
    data = {
        "train_dataset": task.train,
        "eval_dataset": task.test,
        "processing_class": AutoTokenizer.from_pretrained(model),
    }
    if arm.startswith("BEFT"):
        return BeftSFTTrainer(model, BeftSFTConfig(**config, **VARIANTS.get(arm, {})), **data)
    rate, adapter = ADAPTERS.get(arm, (1e-4, lambda: None))
    return SFTTrainer(model, SFTConfig(learning_rate=rate, **config), peft_config=adapter(), **data)


def curves(results) -> dict[tuple[str, str], dict[str, dict[int, list[dict]]]]:
    """By model and kind of task, for each arm the runs by their number of rows."""
    tables: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in records.read(results):
        kind, rows = line["task"].split("-")
        tables[line["model"], kind][line["arm"]][int(rows)].append(line)
    return tables


def report(results) -> None:
    for (model, kind), arms in curves(results).items():
        print(f"\n{model.rstrip('/').split('/')[-1]}, {kind}: accuracy, and NLL, of seeds\n")
        rows = sorted({count for by_rows in arms.values() for count in by_rows})
        print(f"| arm | trained | {' | '.join(f'{count} rows' for count in rows)} | steps | seconds |")
        print(f"|---|---:|{'---:|' * (len(rows) + 2)}")
        for arm, by_rows in arms.items():
            cells = []
            for count in rows:
                lines = by_rows.get(count, [])
                rights = [line["test"]["accuracy"] for line in lines if line["test"]["accuracy"] is not None]
                losses = [line["test"]["nll"] for line in lines]
                told = [f"{fmean(rights):.3f}"] if rights else []
                told += [f"({records.spread(losses, 3)})"] if losses else []
                cells.append(" ".join(told))
            last = by_rows[max(by_rows)]
            measured = [line["seconds"] for line in last if line["seconds"] is not None]  # not of interrupted runs
            seconds = f"{median(measured):.0f}" if measured else ""
            print(f"| {arm} | {last[0]['trainable']:,} | {' | '.join(cells)} | {last[0]['steps']} | {seconds} |")


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "defaults.jsonl")
    add_arguments(parser, TASKS)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=[*ARMS, *VARIANTS])
    parsed = parse(parser)
    if parsed.quick:
        parsed.models, parsed.tasks = [QUICK_MODEL], ["routing-16"]
    score_only_labelled_tokens()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
