"""The `beft` command through its entry point."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import build
from test_merge import of_term, saved


BEFT = Path(sys.executable).parent / "beft"


def beft(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [BEFT, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, **options
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    model = build("llama")
    saved(model, folder, of_term(model))
    return folder


def test_merge_says_what_it_did_and_how_near_the_logits_are(llama, tmp_path):
    run = beft("merge", "--adapter", llama / "adapter", "--output", tmp_path / "merged")
    assert run.returncode == 0, run.stderr
    assert "0 tensors changed, 8 added" in run.stdout
    assert "attention_bias=True in the config" in run.stdout
    assert "Largest difference of a logit to base plus adapter: " in run.stdout
    assert (tmp_path / "merged" / "config.json").is_file()


def test_an_error_is_one_paragraph_without_a_traceback(llama, tmp_path):
    run = beft("merge", "--adapter", tmp_path, "--output", tmp_path / "merged")
    assert run.returncode == 1
    assert run.stdout == ""
    assert "Error:" in run.stderr and "holds no adapter_config.json" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "merged").exists()
    run = beft("--debug", "merge", "--adapter", tmp_path, "--output", tmp_path / "merged")
    assert run.returncode == 1 and "Traceback" in run.stderr


def test_wrong_usage_is_two_and_help_names_every_option():
    assert beft("merge", "--nothing").returncode == 2
    run = beft("merge", "--help")
    assert run.returncode == 0
    for option in ("--adapter", "--output", "--base", "--output-projection", "--link", "--no-verify"):
        assert option in run.stdout
