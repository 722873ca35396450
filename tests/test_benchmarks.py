"""The benchmark suite stays alive: CI starts the scripts, and pytest -m matrix runs the `--quick` of each, in turn."""

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from trl.trainer import utils


BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"
NO_OPTIONS = ("hostile", "memory", "pictures", "records", "tasks")  # or other ones
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.stem not in NO_OPTIONS)


@pytest.fixture
def quick(tmp_path, monkeypatch, capsys):
    """A function that runs a script with `--quick` in this process and gives what it printed, and its raw results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # which the scripts exchange: put back afterwards

    def run(script: str) -> tuple[str, list[dict]]:
        results = [] if script in ("pretrain_opt", "adapters") else ["--results", f"{script}.jsonl"]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--quick", *results])
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
        lines = Path(results[1]).read_text().splitlines() if results else []
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_how_it_is_used(script, monkeypatch, capsys):
    """With all that it imports, so that a name that the package lost shows in CI."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}")


@pytest.mark.matrix
def test_suite(quick):
    quick("pretrain_opt")

    report, (line,) = quick("selection")
    assert "value" in line["choices"][0]["scores"]["importance"]
    assert "refused" in line["oracle"]["key"] and line["oracle"]["value"]["nll"] > 0
    assert "| opt-quick | routing-46 | 1 |" in report and "| opt-quick | activation | fisher | " in report

    report, lines = quick("quality")
    by_arm = {line["arm"]: line for line in lines}
    assert by_arm["BEFT auto"]["trainable"] == 6 * 256
    assert by_arm["LoRA r=1"]["trainable"] == 6 * 2 * 2 * 256
    assert by_arm["full"]["test"]["nll"] < by_arm["zero-shot"]["test"]["nll"]
    assert all(f"| {arm} |" in report for arm in by_arm)

    report, lines = quick("defaults")
    by_arm = {line["arm"]: line for line in lines}
    assert by_arm["BEFT"]["steps"] >= 16 / 2 and by_arm["BEFT"]["trainable"] == 3 * 256  # of three upper layers
    assert by_arm["BEFT"]["test"]["nll"] < by_arm["zero-shot"]["test"]["nll"]
    assert all(f"| {arm} |" in report for arm in by_arm)

    report, lines = quick("forgetting")
    assert [line["arm"] for line in lines] == ["BEFT", "LoRA r=8", "(IA)3", "full"]
    for line in lines:
        first, last = line["marks"]
        assert (first["step"], last["step"]) == (0, 50) and last["task"]["nll"] < first["task"]["nll"]
        # No arm has changed anything before its first step.
        assert all(first[rows]["nll"] == pytest.approx(lines[0]["marks"][0][rows]["nll"]) for rows in ("task", "text"))
        assert f"| {line['arm']}, end | 50 |" in report

    report, lines = quick("cost")
    assert all(line["machine"] and line["versions"] and line["peak_bytes"] > 0 for line in lines)
    assert next(line for line in lines if line["arm"] == "BEFT")["scoring_seconds"]["5"] > 0
    assert "| PEFT BEFT |" in report and "| 1000 steps |" in report

    report, _ = quick("adapters")
    assert all(f"| {count} | 16 | {kind} |" in report for count in (1, 4) for kind in ("BEFT", "LoRA"))


@pytest.mark.matrix
def test_the_searches(quick):
    pytest.importorskip("optuna")
    quick("pretrain_opt")
    report, lines = quick("tuning")
    by_arm = {line["arm"]: line for line in lines}
    assert by_arm.keys() == {"default", "tune", "tune, nothing kept", "LoRA", "(IA)3"}
    assert all(f"| {arm} |" in report for arm in by_arm)
    assert len(by_arm["tune"]["trials"]) == len(by_arm["LoRA"]["trials"]) == 3
    for searched, kept in zip(by_arm["tune"]["trials"], by_arm["tune, nothing kept"]["trials"], strict=True):
        assert searched[:4] == kept[:4] and searched[-1] == pytest.approx(kept[-1], rel=1e-3)


@pytest.mark.parametrize(
    ("losses", "seed", "expected"),
    [
        ({}, 0, 1e-3),
        ({1e-3: 4, 3e-3: 3, 1e-2: 2}, 0, 3e-2),
        ({1e-3: 4, 3e-3: 3, 1e-2: 2, 3e-2: 1}, 0, 1e-1),  # the largest is the best: one larger
        ({1e-3: 1, 3e-3: 2, 1e-2: 3, 3e-2: 4}, 0, 3e-4),
        ({1e-3: 4, 3e-3: 3, 1e-2: 2, 3e-2: 1, 1e-1: 2}, 0, None),
        ({1e-3: 4, 3e-3: 3, 1e-2: 2, 3e-2: 1, 1e-1: 2}, 1, 3e-2),
    ],
)
def test_learning_rates_of_an_arm_go_on_beyond_the_best_at_an_end(tmp_path, monkeypatch, losses, seed, expected):
    monkeypatch.syspath_prepend(BENCHMARKS)
    quality = importlib.import_module("quality")
    line = {"model": "models/SmolLM2-135M-Instruct", "task": "sst2-100", "seed": 0, "arm": "BEFT value"}
    runs = [{**line, "learning_rate": rate, "development": {"nll": loss}} for rate, loss in losses.items()]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    arguments = argparse.Namespace(results=tmp_path / "runs.jsonl", quick=False)
    rate = quality.next_rate(quality.ARMS[line["arm"]], {**line, "seed": seed}, arguments)
    assert rate == (expected and pytest.approx(expected))
