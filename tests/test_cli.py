"""The `beft` command through its entry point."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from architectures import build
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from safetensors.torch import load_file
from test_merge import of_term, saved
from transformers import LlamaConfig

import beft_trl
from beft_trl.checkpoints import last_complete_checkpoint
from beft_trl.cli import main
from beft_trl.demo import DEMO_FILES


BEFT = Path(sys.executable).parent / "beft"


@pytest.fixture
def beft(monkeypatch, capsys):
    """A function that runs the command in this process: its imports alone take seconds in one of its own."""

    def run(*arguments, columns=200) -> subprocess.CompletedProcess:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
        monkeypatch.setattr(sys, "argv", ["beft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capsys.readouterr())

    return run


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
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("Error:")
    assert "holds no adapter_config.json" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        beft("--debug", *command[1:])


def test_wrong_usage_is_two_and_help_names_every_option(beft):
    assert beft("merge", "--nothing").returncode == 2
    run = beft("score", "recipe.yaml", "--steps", "5,ten")
    assert run.returncode == 2 and "'5,ten' is no list of whole numbers" in run.stderr
    run = beft("merge", "--help")
    assert run.returncode == 0
    for option in ("--adapter", "--output", "--base", "--output-projection", "--link", "--no-verify"):
        assert option in run.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny Llama with a tokenizer, 48 rows, and a recipe, which the tests override."""
    folder = tmp_path_factory.mktemp("project")
    make_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    make_rows(48).to_json(folder / "rows.jsonl")
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "rows.jsonl"),
        "bias_layers": "all",
        "score_steps": 2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_check_finds_what_the_run_will_do(beft, project, tmp_path):
    run = beft("check", project / "recipe.yaml", "--json", "--max_length", "8", "--output_dir", tmp_path / "new")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["problems"] == []
    assert not (tmp_path / "new").exists()

    model, tokenizer = make_llama(), make_tokenizer()
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    attention = model.model.layers[0].self_attn
    sizes = {
        "query": attention.q_proj.out_features,
        "key": attention.k_proj.out_features,
        "value": attention.v_proj.out_features,
    }
    assert [(site["term"], site["size"]) for site in found["sites"]] == list(sizes.items()) * 2
    assert found["candidates"] == 2 * sum(sizes.values())
    assert (found["steps"], found["score_steps"]) == (2 * 48 // 8, 2)

    lengths, prompts = [], []
    for row in make_rows(48):
        prompts.append(len(tokenizer(row["prompt"])["input_ids"]))
        lengths.append(prompts[-1] + len(tokenizer(row["completion"])["input_ids"]) + 1)
    supervised = [max(0, min(length, 8) - prompt) for length, prompt in zip(lengths, prompts, strict=True)]
    kept = [min(length, 8) for length, each in zip(lengths, supervised, strict=True) if each]
    labels = found["labels"]
    assert labels["truncated"] == sum(length > 8 for length in lengths)
    assert labels["unsupervised"] == supervised.count(0)
    assert labels["longest"] == max(kept)
    assert labels["tokens_per_step"] == pytest.approx(8 * sum(kept) / len(kept))
    assert labels["supervised_share"] == pytest.approx(sum(supervised) / sum(kept))
    for row, shown in zip(make_rows(48), labels["shown"], strict=False):
        assert [counted for _, counted in shown] == [False, True]
        assert shown[0][0].split() == row["prompt"].split()
        assert f"{row['completion'].strip()} </s>".startswith(shown[1][0].strip())

    given = ["--bias_term", "value", "--relative_learning_rate", "0.03", "--bias_layers", "upper"]
    run = beft("check", project / "recipe.yaml", *given)
    assert "in each layer 0.03 of the RMS" in run.stdout and "12 optimizer steps." in run.stdout
    run = beft("check", project / "recipe.yaml", "--learning_rate", "0.01")
    assert "Learning rate: 0.01, in all layers." in run.stdout

    evaluated = ["--test_file", project / "rows.jsonl", "--eval_strategy", "epoch"]
    run = beft("check", project / "recipe.yaml", *evaluated)
    assert "The run can start." in run.stdout and "«" in run.stdout
    assert "12 optimizer steps, and before them 2 x 2 of scoring, 25.0% of all" in run.stdout


def test_check_says_what_the_frozen_layers_take_or_why_they_are_computed_again(beft, project):
    check = ["check", project / "recipe.yaml", "--bias_layers", "upper"]
    run = beft(*check, "--json", "--num_train_epochs", "20")
    found = json.loads(run.stdout)
    tokenizer = make_tokenizer()
    tokens = sum(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in make_rows(48))
    assert (found["frozen_states"], found["frozen_computed"]) == (tokens * 32 * 4, None)
    assert "once for each row" in beft(*check).stdout
    said = "no frozen layers below"
    assert said in json.loads(beft("check", project / "recipe.yaml", "--json").stdout)["frozen_computed"]
    assert "ZeRO-3" in beft(*check, "--launch", "zero3").stdout
    refused = beft("check", project / "recipe.yaml", "--cache_frozen_layers", "true")
    assert refused.returncode == 1 and said in refused.stdout


def test_check_names_every_problem_at_once(beft, project, tmp_path):
    make_opt().save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    (tmp_path / "file").write_text("")
    run = beft(
        "check", project / "recipe.yaml", "--launch", "zero3", "--load_in_4bit", "--model_name_or_path",
        tmp_path / "opt", "--bias_term", "key", "--train_file", tmp_path / "absent.jsonl", "--output_dir",
        tmp_path / "file" / "out",
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stdout.count("Problem:") == 4
    assert "bnb_4bit_quant_storage" in run.stdout
    assert "cannot be written" in run.stdout
    assert "bias_term='key' has no effect on this model" in run.stdout
    assert "absent.jsonl does not exist" in run.stdout
    assert "The run cannot start." in run.stdout and "Traceback" not in run.stderr


def test_check_refuses_a_model_that_does_not_fit_without_its_weights(beft, project, tmp_path):
    """Llama-2-7B from its configuration alone."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    settings = ["--model_name_or_path", tmp_path, "--per_device_train_batch_size", "64", "--packing", "true"]
    run = beft("check", project / "recipe.yaml", *settings, "--max_length", "64", "--json")
    found = json.loads(run.stdout)
    assert found["parameters"] == 6_738_415_616
    assert found["memory"]["weights"] == pytest.approx(4 * 6_738_415_616, rel=1e-3)
    assert run.returncode == 1 and "has no model.safetensors" in found["problems"][0]
    fits = found["memory"]["total"] < found["device_memory"]
    assert len(found["problems"]) == 2 - fits
    assert fits or "The run needs about" in found["problems"][1]


def test_a_dry_run_loads_the_weights_and_leaves_nothing(beft, project, tmp_path):
    settings = ["--output_dir", tmp_path / "out", "--warmup_steps", "4"]  # of which the first has a rate of zero
    run = beft("check", project / "recipe.yaml", "--dry-run", *settings)
    assert run.returncode == 0, run.stdout
    assert "one scoring step and one training step were done" in run.stdout
    assert not (tmp_path / "out").exists()
    broken = tmp_path / "broken"
    shutil.copytree(project / "base", broken)
    model = make_llama()
    model.lm_head.weight.data.fill_(float("nan"))  # which no look at names and sizes shows
    model.save_pretrained(broken)
    run = beft("check", project / "recipe.yaml", "--dry-run", "--model_name_or_path", broken)
    assert run.returncode == 1 and "The dry run of one scoring step" in run.stdout


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
    assert f"beft_trl {beft_trl.__version__}" in run.stdout and f"torch {torch.__version__}" in run.stdout

    run = beft("merge", "--adapter", out, "--output", tmp_path / "merged")
    assert run.returncode == 0, run.stderr
    run = beft("info", tmp_path / "merged")
    assert run.returncode == 1 and "holds no adapter_config.json" in run.stderr


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


def test_the_demo_before_its_model_is_one_problem_that_says_how_to_make_it(beft, tmp_path, monkeypatch):
    shutil.copytree(DEMO_FILES, tmp_path / "demo")
    monkeypatch.chdir(tmp_path / "demo")
    for command in ("check", "train", "score"):
        run = beft(command, "recipes/demo.yaml", "--use_cpu", "true")
        said = run.stdout + run.stderr
        assert run.returncode == 1 and said.count("python -m beft_trl.demo") == 1 and "huggingface" not in said
        assert said.count("Problem:") == (command == "check")


@pytest.mark.parametrize("model", ["nobody/nothing", "./absent", "absent", "folder"])
def test_a_model_that_is_not_there_is_one_problem_with_its_name(beft, project, tmp_path, monkeypatch, model):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    run = beft("check", project / "recipe.yaml", "--model_name_or_path", model)
    assert run.returncode == 1 and run.stdout.count("Problem:") == 1 and f"'{model}'" in run.stdout
    run = beft("train", project / "recipe.yaml", "--model_name_or_path", model)
    assert run.returncode == 1 and f"'{model}'" in run.stderr


def test_rows_and_paths_that_a_terminal_cannot_print_are_printed_all_the_same(project, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 你", "completion": " w2 ☃"}\n' * 8, encoding="utf-8")
    command = [BEFT, "check", project / "recipe.yaml", "--train_file", tmp_path / "rows.jsonl"]
    for encoding in ("cp1252", "ascii"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        whole = [*command, "--output_dir", tmp_path / "ü你"]
        run = subprocess.run(whole, capture_output=True, env=environment, check=False)
        assert run.returncode == 0 and b"The run can start." in run.stdout, run.stderr


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
    run = subprocess.run(
        [BEFT, "train", project / "recipe.yaml", "--output_dir", tmp_path, "--bias_term", "value"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "FutureWarning" not in run.stderr


UNFIT = {
    "a rate of nothing": "learning_rate: 0",
    "a schedule without its settings": "lr_scheduler_type: cosine_with_min_lr",
    "fewer rows than a batch": "{dataloader_drop_last: true, per_device_train_batch_size: 100}",
    "an anchor that is not there": "score_anchor: bias",
    "answers without prompts": "{answers: 2, test_file: turns.jsonl}",
    "a metric that no evaluation gives": (
        "{test_file: rows.jsonl, eval_strategy: epoch, save_strategy: epoch, load_best_model_at_end: true, "
        "metric_for_best_model: accuracy}"
    ),
    "held-out rows of no format": "{test_file: columns.jsonl, eval_strategy: epoch}",
    "a null cell": "train_file: null.jsonl",
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_check_refuses_train_refuses_with_the_same_words(beft, project, tmp_path, monkeypatch, kind):
    make_rows(8).to_json(tmp_path / "rows.jsonl")
    turns = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    (tmp_path / "turns.jsonl").write_text(json.dumps(turns) + "\n")
    (tmp_path / "columns.jsonl").write_text('{"a": "w1"}\n')
    (tmp_path / "null.jsonl").write_text(
        '{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1", "completion": null}\n'
    )
    recipe = yaml.safe_load((project / "recipe.yaml").read_text()) | {"output_dir": "out"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | yaml.safe_load(UNFIT[kind])))
    monkeypatch.chdir(tmp_path)
    checked, trained = beft("check", "recipe.yaml", columns=2000), beft("train", "recipe.yaml", columns=2000)
    assert (checked.returncode, trained.returncode) == (1, 1)
    assert checked.stdout.count("Problem:") == 1
    problem = checked.stdout.split("Problem: ")[1].split("\nThe run cannot")[0]
    assert " ".join(problem.split()) in " ".join(trained.stderr.split())
    assert not list((tmp_path / "out").glob("*"))


def test_an_interrupted_run_ends_in_130_and_leaves_no_adapter(project, tmp_path):
    out = tmp_path / "out"
    arguments = ["--max_steps", "100000", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", out]
    run = subprocess.Popen(
        [BEFT, "train", project / "recipe.yaml", *map(str, arguments)], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while last_complete_checkpoint(out) is None:
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert not (out / "adapter_model.safetensors").exists()
    assert last_complete_checkpoint(out) is not None


@pytest.mark.parametrize("command", ["check", "score", "train", "info", "merge"])
def test_help_fits_a_screen(beft, command):
    run = beft(command, "--help", columns=80)
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert lines and len(lines) <= 24, lines
