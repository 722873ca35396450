"""Held-out loss and accuracy of BEFT next to LoRA, prefix tuning, (IA)3 and full fine-tuning, with few examples.

python examples/benchmarks/quality.py --data-dir DATA      # all runs, appended to results/quality.jsonl
python examples/benchmarks/quality.py --report             # the tables of what is in the file

Every trained arm has four learning rates with the first seed, a variant three, and more while the best is the
largest or the smallest of them. The one with the lowest loss on the development rows is run with the other seeds,
and the table has its loss and accuracy on the test rows. Arms share rows, batches, epochs, schedule and trainer
(`trl.SFTTrainer`, or BEFT's subclass of it). A run that the file holds already is passed over.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import records
import torch
from datasets import Dataset
from peft import BeftConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from tasks import MODELS, QUIET, Task, add_arguments, load_task, parse, score_only_labelled_tokens
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from beft_trl import BeftSFTConfig, BeftSFTTrainer


TASKS = ["sst2-100", "routing-126", "alpaca-100"]
SETTINGS = {"num_train_epochs": 5, "per_device_train_batch_size": 8, "max_length": 128}


@dataclass(frozen=True)
class Arm:
    """What is trained: a bias term by `BeftSFTTrainer`, a PEFT adapter by `SFTTrainer`, or, with neither, everything.

    Without learning rates nothing is trained: the model is measured as it is.
    """

    learning_rates: tuple[float, ...] = ()
    bias_term: str | None = None
    adapter: Callable[[], PeftConfig] | None = None
    settings: dict = field(default_factory=dict)
    bias_layers: str = "all"
    relative: bool = False  # the rates are a `relative_learning_rate`, which needs no factor for the model


BIAS_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# By their scores query and key are small next to what they are added to: with only the value's rates they would lose.
LARGE_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RELATIVE_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
QUERY_AND_VALUE = ["q_proj", "v_proj"]
OUTPUT_PROJECTION = r".*\.self_attn\.(o_proj|out_proj)"
ARMS = {
    "zero-shot": Arm(),
    "BEFT auto": Arm(BIAS_RATES, bias_term="auto"),
    "BEFT value": Arm(BIAS_RATES, bias_term="value"),
    "BEFT query": Arm(LARGE_RATES, bias_term="query"),
    "BEFT key": Arm(LARGE_RATES, bias_term="key"),
    "BEFT all": Arm(BIAS_RATES, bias_term="all"),
    "BEFT value, relative": Arm(RELATIVE_RATES, bias_term="value", relative=True),
    "BEFT query, relative": Arm(RELATIVE_RATES, bias_term="query", relative=True),
    "BEFT all, relative": Arm(RELATIVE_RATES, bias_term="all", relative=True),
    "PEFT BEFT": Arm(BIAS_RATES, adapter=BeftConfig),
    "output bias": Arm(BIAS_RATES, adapter=lambda: BeftConfig(target_modules=OUTPUT_PROJECTION)),
    "LoRA r=1": Arm(LORA_RATES, adapter=lambda: LoraConfig(r=1, lora_alpha=2, target_modules=QUERY_AND_VALUE)),
    "LoRA r=8": Arm(LORA_RATES, adapter=lambda: LoraConfig(r=8, lora_alpha=16, target_modules=QUERY_AND_VALUE)),
    "prefix tuning": Arm(
        (3e-3, 1e-2, 3e-2, 1e-1), adapter=lambda: PrefixTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    ),
    "(IA)3": Arm((1e-3, 3e-3, 1e-2, 3e-2), adapter=IA3Config),
    "full": Arm((3e-6, 1e-5, 3e-5, 1e-4)),
}
QUICK_ARMS = ["zero-shot", "BEFT auto", "LoRA r=1", "prefix tuning", "full"]
# The defaults of BEFT next to the others at as many small steps, and at those that take as long: a step of two rows in
# the upper half of the layers, whose frozen half is cached, takes 0.55 of one of LoRA (cost.py).
SMALL_STEPS = {"max_steps": 400, "per_device_train_batch_size": 2}
AS_LONG = {**SMALL_STEPS, "max_steps": 220}
LONG = {
    "BEFT, small steps": Arm(
        (2e-2, 5e-2, 1e-1, 2e-1), bias_term="auto", settings=SMALL_STEPS, bias_layers="upper", relative=True
    ),
    "BEFT all layers, small steps": Arm(
        (2e-2, 5e-2, 1e-1, 2e-1), bias_term="auto", settings=SMALL_STEPS, relative=True
    ),
    "BEFT all terms, small steps": Arm(
        (1e-2, 2e-2, 5e-2, 1e-1), bias_term="all", settings=SMALL_STEPS, bias_layers="upper", relative=True
    ),
    **{
        f"{name}, {length}": replace(ARMS[name], settings=settings)
        for name in ("LoRA r=8", "(IA)3")
        for length, settings in {"small steps": SMALL_STEPS, "same time": AS_LONG}.items()
    },
}
# One setting of the value bias changed at a time: what the defaults rest on.
VARIANTS = {
    f"BEFT value, {name}": Arm(BIAS_RATES[:3], bias_term="value", settings=settings)
    for name, settings in {
        "constant": {"lr_scheduler_type": "constant"},
        "cosine": {"lr_scheduler_type": "cosine"},
        "warm-up of a tenth": {"warmup_steps": 0.1},
        "2 epochs": {"num_train_epochs": 2},
        "10 epochs": {"num_train_epochs": 10},
        "batch 4": {"per_device_train_batch_size": 4},
    }.items()
}


def main(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        for task_name in arguments.tasks:
            task = load_task(task_name, arguments.data_dir, seed)
            for model in arguments.models:
                for name in arguments.arms:
                    arm = (ARMS | LONG | VARIANTS)[name]
                    line = {"model": model, "task": task_name, "seed": seed, "arm": name}
                    while (rate := next_rate(arm, line, arguments)) is not None:
                        result = run(model, task, seed, arm, rate)
                        records.append(arguments.results, {**line, "learning_rate": rate, **result})
                        print(*line.values(), rate, f"{result['seconds']:.0f} s", flush=True)


def next_rate(arm: Arm, line: dict, arguments: argparse.Namespace) -> float | None:
    """The learning rate that the file of results lacks yet, for a model, task, seed and arm; none when it has all.

    With the first seed, each of the arm's, and those beyond while the best is at an end; then the best of them.
    """
    runs = [run for run in records.read(arguments.results) if {**line, "seed": run["seed"]}.items() <= run.items()]
    if any("dead" in run for run in runs):
        return None
    done = [run["learning_rate"] for run in runs if run["seed"] == line["seed"]]
    tuning = tuning_runs(runs)
    rates = sorted(run["learning_rate"] for run in tuning)
    factor = 1.0 if arm.relative else MODELS[line["model"]].rate_factor
    wanted = [rate * factor for rate in arm.learning_rates] or [0.0]
    if arguments.quick:
        wanted = wanted[:1]
    elif arm.learning_rates and set(wanted) <= set(rates):
        best = records.best_on_development(tuning)["learning_rate"]
        # Rates go 1, 3, 10, 30: the next is ten times the last but one.
        beyond = {rates[0]: rates[1] / 10, rates[-1]: rates[-2] * 10}
        wanted = [beyond.get(best, best) if line["seed"] == tuning[0]["seed"] else best]
    return next((rate for rate in wanted if rate not in done), None)


def tuning_runs(runs: list[dict]) -> list[dict]:
    """Of an arm's runs, those with the seed that came first, whose development rows choose the learning rate."""
    return [run for run in runs if run["seed"] == runs[0]["seed"]]


def run(model: str, task: Task, seed: int, arm: Arm, rate: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = trainer_of(model, task, seed, arm, rate, folder)
        except ValueError as error:
            if "has no effect" not in str(error):
                raise
            return {"seconds": 0.0, "dead": str(error)}  # a key bias without rotary positions
        line = {"trainable": 0, "file_bytes": 0, "seconds": 0.0, "peak_bytes": 0, "selected": None}
        if rate:
            records.restart_peak()
            started = time.perf_counter()
            trainer.train()
            line["seconds"] = time.perf_counter() - started
            line["peak_bytes"] = records.peak_bytes()
            trainer.save_model()
            line["file_bytes"] = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            line["trainable"] = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
            line["selected"] = getattr(trainer, "selected_bias_term", None)
        parts = {part: measure(trainer, rows, task) for part, rows in trainer.eval_dataset.items()}
        return {**line, **parts}


def trainer_of(model: str, task: Task, seed: int, arm: Arm, rate: float, folder: str) -> SFTTrainer:
    # Updates of full fine-tuning at these rates are lost in bf16 weights; adapters and deltas are fp32 next to them.
    dtype = MODELS[model].dtype if arm.bias_term or arm.adapter else "float32"
    config = {
        **QUIET, "output_dir": folder, "seed": seed, "learning_rate": rate or 1e-3, "logging_strategy": "no",
        "model_init_kwargs": {"dtype": dtype}, **SETTINGS, **arm.settings,
    }  # fmt: skip
    data = {
        "train_dataset": task.train,
        "eval_dataset": {"development": task.development, "test": task.test},
        "processing_class": AutoTokenizer.from_pretrained(model),
    }
    if arm.bias_term:
        if arm.relative:
            config["relative_learning_rate"] = config.pop("learning_rate")
        return BeftSFTTrainer(
            model, BeftSFTConfig(bias_term=arm.bias_term, bias_layers=arm.bias_layers, **config), **data
        )
    return SFTTrainer(model, SFTConfig(**config), peft_config=arm.adapter and arm.adapter(), **data)


@torch.inference_mode()
def measure(trainer: Trainer, rows: Dataset, task: Task) -> dict:
    """Mean loss over the completions' tokens, and the share of rows whose answer outranks the task's other answers.

    Answers are ranked by their first token, in which they must differ.
    """
    trainer.model.eval()
    tokenizer, device = trainer.processing_class, trainer.accelerator.device
    firsts = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in task.choices]
    if len(set(firsts)) < len(firsts):
        raise ValueError(f"Two answers of {task.name} begin with the same token: {task.choices}.")
    answers = torch.tensor(firsts, device=device)
    loss, tokens, right = 0.0, 0, 0
    by_length = sorted(rows.with_format(None), key=lambda row: len(row["input_ids"]))
    for batch in DataLoader(by_length, batch_size=16, collate_fn=trainer.data_collator):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        columns = (labels != -100).any(0).nonzero().flatten()  # the vocabulary is large, and answers are short
        labels = labels[:, columns]
        logits = trainer.model(**batch, use_cache=False, logits_to_keep=columns).logits.float()
        kept = labels != -100
        loss += functional.cross_entropy(logits[kept], labels[kept], reduction="sum").item()
        tokens += int(kept.sum())
        if firsts:
            position = kept.int().argmax(1)
            row = torch.arange(len(labels), device=device)
            answered = answers[logits[row, position][:, answers].argmax(1)]
            right += int((answered == labels[row, position]).sum())
    return {"nll": loss / tokens, "accuracy": right / len(rows) if firsts else None}


def best_runs(results: Path) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """By model and task, for each arm the run of each seed at the rate that the first one's development rows chose."""
    runs = defaultdict(list)
    for line in records.read(results):
        if "dead" not in line:
            runs[line["model"], line["task"], line["arm"]].append(line)
    tables = defaultdict(dict)
    for (model, task, arm), of_arm in runs.items():
        best = records.best_on_development(tuning_runs(of_arm))["learning_rate"]
        tables[model, task][arm] = [line for line in of_arm if line["learning_rate"] == best]
    return tables


def report(results: Path) -> None:
    for (model, task), arms in best_runs(results).items():
        print(f"\n{Path(model).name}, {task}:\n")
        print("| arm | learning rates | test NLL | accuracy | trained | file | seconds | peak GiB |")
        print("|---|---|---:|---:|---:|---:|---:|---:|")
        for arm, lines in arms.items():
            rates = ", ".join(f"{line['learning_rate']:g}" for line in lines)
            nll = records.spread([line["test"]["nll"] for line in lines], 4)
            rights = [line["test"]["accuracy"] for line in lines]
            accuracy = "" if None in rights else records.spread(rights, 3)
            trained, size, peak = (lines[0][name] for name in ("trainable", "file_bytes", "peak_bytes"))
            print(
                f"| {arm} | {rates} | {nll} | {accuracy} | "
                f"{trained:,} | {size:,} | {median(line['seconds'] for line in lines):.0f} | {peak / 2**30:.2f} |"
            )


if __name__ == "__main__":
    parser = records.make_parser(__doc__, "quality.jsonl")
    add_arguments(parser, TASKS)
    parser.add_argument("--arms", nargs="+", default=[*ARMS, *VARIANTS], choices=[*ARMS, *LONG, *VARIANTS])
    parsed = parse(parser)
    if parsed.quick:
        parsed.arms = QUICK_ARMS
    score_only_labelled_tokens()
    if not parsed.report:
        main(parsed)
    report(parsed.results)
