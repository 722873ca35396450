"""The `beft` command through its entry point."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from architectures import build
from conftest import of_term, saved
from processes import Python, python
from safetensors.torch import load_file

import beft_trl
from beft_trl.checkpoints import last_complete_checkpoint


BEFT = Path(sys.executable).parent / "beft"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = build("llama")
    saved(model, folder, of_term(model))
    return folder


def test_merge_says_what_it_did_and_how_near_the_logits_are(beft, llama, tmp_path):
    run = beft("merge", "--adapter", llama / "adapter", "--output", tmp_path / "merged")
    assert run.returncode == 0, run.stderr
    assert "0 tensors changed, 8 added" in run.stdout
    assert "attention_bias=True in the config" in run.stdout
    assert "Largest difference of a logit to base plus adapter: " in run.stdout
    assert (tmp_path / "merged" / "config.json").is_file()


def test_what_goes_on_is_told_on_a_terminal_only(beft, llama, monkeypatch):
    assert beft("info", llama / "adapter").stderr == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert beft("info", llama / "adapter").stderr == f"Reading {llama / 'adapter'} ...\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert beft("info", llama / "adapter").stderr == ""


def test_an_error_is_one_paragraph_without_a_traceback(beft, llama, tmp_path):
    command = [BEFT, "merge", "--adapter", tmp_path, "--output", tmp_path / "merged"]
    run = python(*command)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("Error:")
    assert "holds no adapter_config.json" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="adapter_config.json"):
        beft("--debug", *command[1:])


def test_wrong_usage_is_two_and_help_names_every_option(beft):
    assert beft("merge", "--nothing").returncode == 2
    run = beft("score", "recipe.yaml", "--steps", "5,ten")
    assert run.returncode == 2 and "'5,ten' is no list of whole numbers" in run.stderr
    run = beft("merge", "--help")
    assert run.returncode == 0
    for option in ("--adapter", "--output", "--base", "--output-projection", "--link", "--no-verify"):
        assert option in run.stdout


def test_train_score_info_and_merge_are_one_way(beft, project, tmp_path):
    run = beft(
        "score", project / "recipe.yaml", "--steps", "1,2", "--score_method", "fisher", "--output", tmp_path / "scores"
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"By importance: \w+ > \w+ > \w+", run.stdout)
    scores = json.loads((tmp_path / "scores" / "beft_scores.json").read_text())
    assert (scores["steps"], scores["method"]) == (2, "fisher")
    assert (tmp_path / "scores" / "beft_scores.png").read_bytes().startswith(b"\x89PNG")

    out = tmp_path / "out"
    run = beft("train", project / "recipe.yaml", "--output_dir", out)
    assert run.returncode == 0, run.stderr
    trained = json.loads((out / "beft_scores.json").read_text())
    assert trained["terms"] == scores["terms"]  # a pass that came second scores as one that comes first
    for command in (f"beft info {out}", f"beft merge --adapter {out}", f"transformers chat {out}-merged"):
        assert command in run.stdout

    run = beft("info", out)
    assert run.returncode == 0, run.stderr
    for name, delta in load_file(out / "adapter_model.safetensors").items():
        module = name.removeprefix("base_model.model.").removesuffix(".beft_bias")
        assert re.search(rf"{re.escape(module)} .* {delta.norm():.3e} ", run.stdout)
    assert f"Trains the {trained['selected']} bias in 2 modules" in run.stdout
    assert f"beft_trl {beft_trl.__version__}" in run.stdout and f"torch {version('torch')}" in run.stdout

    run = beft("merge", "--adapter", out, "--output", tmp_path / "merged")
    assert run.returncode == 0, run.stderr
    run = beft("info", tmp_path / "merged")
    assert run.returncode == 1 and "holds no adapter_config.json" in run.stderr


def test_streamed_held_out_rows_are_measured_and_answered(beft, project, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes((project / "rows.jsonl").read_bytes())
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    del recipe["train_file"], recipe["num_train_epochs"]
    rows = {"dataset_name": str(tmp_path), "dataset_streaming": True, "max_steps": 2, "answers": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **rows, "output_dir": str(tmp_path / "out")}))
    run = beft("train", tmp_path / "recipe.yaml", "--bias_term", "value")
    assert run.returncode == 0, run.stderr
    assert "Held-out loss" in run.stdout and "Held-out accuracy" in run.stdout


def test_an_unknown_launch_configuration_is_refused(beft, project):
    run = beft("train", project / "recipe.yaml", "--launch", "zero9")
    assert run.returncode == 1
    assert "There is no launch configuration 'zero9'" in " ".join(run.stderr.split())


@pytest.mark.parametrize(
    ("command", "recipe", "message"),
    [
        ("train", None, "No such file"),
        ("check", "- a\n- [", "The recipe is not YAML"),
        ("score", "max_steps: many", "invalid int value: 'many'"),
        ("train", "bias_trem: value", "bias_trem (did you mean bias_term?)"),
        ("score", "train_file: empty.jsonl", "empty"),
        ("train", "train_file: columns.jsonl", "The columns of train_dataset explain no format: found a, b"),
        ("score", "output_dir: /dev/null/out", "cannot be written"),
    ],
)
def test_bad_recipes_are_one_paragraph(beft, project, tmp_path, monkeypatch, command, recipe, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "columns.jsonl").write_text('{"a": "w1", "b": "w2"}\n')
    if recipe is not None:
        whole = (project / "recipe.yaml").read_text().replace(str(project / "out"), "out")
        kept = [line for line in whole.splitlines() if line.split(":")[0] != recipe.split(":")[0]]
        (tmp_path / "recipe.yaml").write_text("\n".join([*kept, recipe]))
    monkeypatch.chdir(tmp_path)
    run = beft(command, "recipe.yaml")
    assert run.returncode == 1
    said = run.stdout if command == "check" else run.stderr
    assert message in " ".join(said.split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_rows_and_paths_that_a_terminal_cannot_print_are_printed_all_the_same(project, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 你", "completion": " w2 ☃"}\n' * 8, encoding="utf-8")
    command = [BEFT, "check", project / "recipe.yaml", "--train_file", tmp_path / "rows.jsonl"]
    for encoding in ("cp1252", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        run = python(*command, "--output_dir", tmp_path / "ü你", env=environment)
        assert run.returncode == 0 and "The run can start." in run.stdout, run.stderr


def test_names_with_square_brackets_are_printed_as_they_are(beft, project, tmp_path):
    out = tmp_path / "[b]run[/i]"
    shutil.copytree(project / "base", tmp_path / "[b]base[/i]")
    for command in (
        ["check", project / "recipe.yaml", "--output_dir", out, "--model_name_or_path", tmp_path / "[b]base[/i]"],
        ["train", project / "recipe.yaml", "--output_dir", out, "--bias_term", "value"],
        ["info", out],
        ["merge", "--adapter", out, "--output", tmp_path / "[b]merged[/i]"],
        ["score", project / "recipe.yaml", "--output", tmp_path / "[b]scores[/i]"],
    ):
        run = beft(*command, columns=1000)
        assert run.returncode == 0, run.stderr
        printed = "".join(run.stdout.split())  # a title is broken where its table ends
        assert "[b]" in printed and "[/i]" in printed
    run = beft("info", tmp_path / "[b]absent[/i]")
    assert run.returncode == 1 and "[b]absent[/i]" in run.stderr


def test_warnings_of_names_that_the_libraries_rename_are_kept_from_the_user(project, tmp_path):
    """A start of its own, since the libraries warn while they are imported, too."""
    run = subprocess.run(
        [BEFT, "train", project / "recipe.yaml", "--output_dir", tmp_path, "--bias_term", "value"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "FutureWarning" not in run.stderr


def test_an_interrupted_run_ends_in_130_and_leaves_no_adapter(project, tmp_path):
    out = tmp_path / "out"
    arguments = ["--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", out]
    with Python(BEFT, "train", project / "recipe.yaml", *arguments) as run:
        run.until(lambda: last_complete_checkpoint(out))
        os.kill(run.pid, signal.SIGINT)
        assert run.wait() == 130
        assert "Traceback" not in run.stderr
    assert not (out / "adapter_model.safetensors").exists()
    assert last_complete_checkpoint(out) is not None


@pytest.mark.parametrize("command", ["check", "score", "train", "info", "merge"])
def test_help_fits_a_screen(beft, command):
    run = beft(command, "--help", columns=80)
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert lines and len(lines) <= 24, lines
