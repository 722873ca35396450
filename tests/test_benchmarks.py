"""The benchmark suite stays alive: each script's `--quick`, in turn, on a model that the first one makes."""

import json
import subprocess
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def quick(script: str, project: Path) -> tuple[str, list[dict]]:
    results = project / f"{script}.jsonl"
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick"]
    if script != "pretrain_opt":
        command += ["--results", str(results)]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = results.read_text().splitlines() if results.exists() else []
    return run.stdout, [json.loads(line) for line in lines]


def test_suite(tmp_path):
    quick("pretrain_opt", tmp_path)

    report, (line,) = quick("selection", tmp_path)
    assert "value" in line["choices"][0]["scores"]["importance"]
    assert "refused" in line["oracle"]["key"] and line["oracle"]["value"]["nll"] > 0
    assert "| opt-quick | routing-46 | 1 |" in report and "| opt-quick | activation | run | fisher |" in report

    report, lines = quick("quality", tmp_path)
    by_arm = {line["arm"]: line for line in lines}
    assert by_arm["BEFT auto"]["trainable"] == 6 * 256
    assert by_arm["LoRA r=1"]["trainable"] == 6 * 2 * 2 * 256
    assert by_arm["full"]["test"]["nll"] < by_arm["zero-shot"]["test"]["nll"]
    assert all(f"| {arm} |" in report for arm in by_arm)

    report, lines = quick("cost", tmp_path)
    assert all(line["machine"] and line["versions"] and line["peak_bytes"] > 0 for line in lines)
    assert next(line for line in lines if line["arm"] == "BEFT")["scoring_seconds"] > 0
    assert "| PEFT BEFT |" in report and "| 1000 steps |" in report
