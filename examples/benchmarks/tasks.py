"""The benchmarks' models, and their low-data tasks as prompt-completion rows drawn by seed."""

import argparse
import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from trl.trainer import utils

from beft_trl.engines import slow_16_bits


@dataclass(frozen=True)
class Model:
    """How a model is used: dtype, what a change of its biases can be measured from, a factor to all learning rates.

    A small model that was pretrained for minutes takes larger steps than one that was pretrained for weeks.
    """

    dtype: str
    anchors: tuple[str, ...]
    rate_factor: float = 1.0


# Faster than fp32 on a GPU or a CPU with AVX512, and many times slower on other CPUs.
FAST_BF16 = not slow_16_bits(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
SEEDS = [0, 1, 2]
FULL_MODELS = ["models/opt-small", "models/SmolLM2-135M-Instruct"]
QUICK_MODEL, QUICK_TASK = "models/opt-quick", "routing-46"
MODELS = {
    "models/opt-small": Model("float32", ("bias", "activation"), rate_factor=4.0),
    "models/SmolLM2-135M-Instruct": Model("bfloat16" if FAST_BF16 else "float32", ("activation",)),
    QUICK_MODEL: Model("float32", ("bias", "activation")),
}

# Rows that the pretraining of the small OPT does not use: tasks draw from these.
SST2_ROWS, ALPACA_ROWS = 6_000, 600
TREC = ("description", "entity", "person", "number", "place", "abbreviation")
MESSAGES = Path(__file__).parents[1] / "data"
# Of a configuration: a run that writes and tells nothing, in the dtype of its weights.
QUIET = {
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Task:
    """Rows of a task: to learn from, to choose settings on, and to report on. The three do not overlap.

    `choices` are the completions among which the answer lies, or empty where it is free text.
    """

    name: str
    train: Dataset
    development: Dataset
    test: Dataset
    choices: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser, tasks: list[str]) -> None:
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--models", nargs="+", default=FULL_MODELS)
    parser.add_argument("--tasks", nargs="+", default=tasks)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="a small task on models/opt-quick, to see that it works")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.tasks, arguments.seeds = [QUICK_MODEL], [QUICK_TASK], [0]
    return arguments


def score_only_labelled_tokens() -> None:
    """Has TRL compute logits only where a label is on a CPU too, as it does on a GPU: the same loss in half the time.

    TRL asks this function whether the device is a GPU, and scores all positions elsewhere, prompts and padding too.
    """
    if not hasattr(utils, "_use_triton"):
        raise AttributeError("trl.trainer.utils has no _use_triton any more: see what its fused LM head does now.")
    utils._use_triton = lambda device: True


def load_task(name: str, data_dir: Path | None, seed: int) -> Task:
    """A task by name, such as `"sst2-100"`, `"alpaca-300"` or `"routing-126"`: kind and number of training rows."""
    kind, count = name.split("-")
    kinds = {"sst2": _sst2, "trec": _trec, "alpaca": _alpaca, "routing": _routing, "letters": _letters}
    return kinds[kind](name, int(count), data_dir, seed)


def pretraining_sst2(data_dir: Path) -> list[tuple[str, str]]:
    return [(row["sentence"].strip(), row["label"]) for row in _sst2_rows(data_dir)[SST2_ROWS:]]


def pretraining_alpaca(data_dir: Path) -> list[dict]:
    return _alpaca_rows(data_dir)[ALPACA_ROWS:]


def alpaca_prompt(row: dict) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row["input"]))) + "\n\nAnswer:"


def sst2_parts(count: int, data_dir: Path, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of SST-2 (`sentence`, `label`) to learn from, to choose settings on, and the whole validation set."""
    drawn = random.Random(seed).sample(_sst2_rows(data_dir)[:SST2_ROWS], count + 200)
    with (data_dir / "sst2_validation.tsv").open(encoding="utf-8") as file:
        validation = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return drawn[:count], drawn[count:], validation


def _sst2(name: str, count: int, data_dir: Path, seed: int) -> Task:
    train, development, validation = sst2_parts(count, data_dir, seed)
    rows = [
        [
            {
                "prompt": f"Review: {row['sentence'].strip()}\nSentiment:",
                "completion": " positive" if row["label"] == "1" else " negative",
            }
            for row in part
        ]
        for part in (train, development, random.Random(0).sample(validation, 300))
    ]
    return Task(name, *map(Dataset.from_list, rows), choices=(" positive", " negative"))


def _alpaca(name: str, count: int, data_dir: Path, seed: int) -> Task:
    held_out = _alpaca_rows(data_dir)[:200]
    drawn = random.Random(seed).sample(_alpaca_rows(data_dir)[200:ALPACA_ROWS], count + 100)
    rows = [
        [{"prompt": alpaca_prompt(row), "completion": " " + row["output"]} for row in part]
        for part in (drawn[:count], drawn[count:], held_out)
    ]
    return Task(name, *map(Dataset.from_list, rows))


def _routing(name: str, count: int, data_dir: Path, seed: int) -> Task:
    def rows(file: str) -> list[dict]:
        lines = (MESSAGES / file).read_text(encoding="utf-8").splitlines()
        return [
            {
                "prompt": "\n".join(message["content"] for message in row["prompt"]) + "\nTeam:",
                "completion": f" {row['completion'][-1]['content']}",
            }
            for row in map(json.loads, lines)
        ]

    test, train = rows("support_test.jsonl"), rows("support_train.jsonl")
    random.Random(seed).shuffle(train)
    choices = tuple(sorted({row["completion"] for row in train}))
    parts = train[: count - 26], train[count - 26 : count], test
    return Task(name, *map(Dataset.from_list, parts), choices=choices)


def _trec(name: str, count: int, data_dir: Path, seed: int) -> Task:
    def rows(file: str) -> list[dict]:
        with (data_dir / file).open(encoding="utf-8") as lines:
            return [
                {"prompt": f"Question: {text.strip()}\nThe answer is a:", "completion": f" {TREC[int(label)]}"}
                for label, text in csv.reader(lines)
            ]

    drawn = random.Random(seed).sample(rows("trec_train.csv"), count + 100)
    parts = drawn[:count], drawn[count:], random.Random(0).sample(rows("trec_test.csv"), 200)
    return Task(name, *map(Dataset.from_list, parts), choices=tuple(f" {answer}" for answer in TREC))


def _letters(name: str, count: int, data_dir: Path, seed: int) -> Task:
    """German and French letters to the offices of a town, written for this project."""

    def rows(file: str) -> list[dict]:
        lines = (Path(__file__).parent / "data" / file).read_text(encoding="utf-8").splitlines()
        return [
            {"prompt": f"{row['text']}\nAmt:", "completion": f" {row['office']}"} for row in map(json.loads, lines)
        ]

    test, train = rows("letters_test.jsonl"), rows("letters_train.jsonl")
    random.Random(seed).shuffle(train)
    choices = tuple(sorted({row["completion"] for row in train}))
    parts = train[: count - 26], train[count - 26 : count], test
    return Task(name, *map(Dataset.from_list, parts), choices=choices)


def _sst2_rows(data_dir: Path) -> list[dict]:
    with (data_dir / "sst2_train.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    random.Random(0).shuffle(rows)  # neighbours are phrases of one sentence
    return rows


def _alpaca_rows(data_dir: Path) -> list[dict]:
    return json.loads((data_dir / "alpaca_en_demo.json").read_text(encoding="utf-8"))
