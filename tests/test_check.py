"""`beft check`: what it finds out about a run, and that it refuses what the run would refuse."""

import json
import shutil

import pytest
import yaml
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from transformers import LlamaConfig

from beft_trl.demo import DEMO_FILES


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
    """Llama-2-7B, of which there is only the configuration."""
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
