"""What the benchmarks share: raw results as JSON lines with versions and machine, process memory, tables."""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

import torch

from beft_trl import BiasScores
from beft_trl.importance import SCORE_OF_METHOD


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("beft_trl", "peft", "torch", "transformers", "trl")


def append(results: Path, line: dict) -> None:
    line = {
        **line,
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {
            "processor": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def make_parser(documentation: str, file: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, default=RESULTS / file)
    parser.add_argument("--report", action="store_true", help="print the tables and run nothing")
    return parser


def scores_of(scores: BiasScores) -> dict[str, dict[str, float]]:
    """Each score of each term that can be trained."""
    return {
        name: {term: scores.terms[term].score(name) for term in scores.ranking} for name in SCORE_OF_METHOD.values()
    }


def best_on_development(runs: list[dict]) -> dict:
    return min(runs, key=lambda run: run["development"]["nll"])


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
