"""`beft tune` from end to end: what it writes, what goes on, who shares it, and what it refuses."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from conftest import class_rows, full_batch, make_llama, make_tokenizer
from peft import PeftModel
from processes import Python, python
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM


optuna = pytest.importorskip("optuna")
from beft_trl import tune  # noqa: E402
from beft_trl.cli.recipe import parse_recipe  # noqa: E402
from beft_trl.cli.tuned_recipe import given_values  # noqa: E402


BEFT = Path(sys.executable).parent / "beft"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny Llama with a tokenizer, 32 rows to learn from and 12 to test on, and a recipe."""
    folder = tmp_path_factory.mktemp("tune")
    make_llama(num_hidden_layers=4).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    class_rows(32).to_json(folder / "rows.jsonl")
    class_rows(12, seed=1).to_json(folder / "test.jsonl")
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "rows.jsonl"),
        "test_file": str(folder / "test.jsonl"),
        "relative_learning_rate": 0.1,
        "score_steps": 2,
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def study_of(folder):
    return optuna.load_study(study_name="beft-tune", storage=f"sqlite:///{folder / 'study.db'}")


def found_in(folder):
    return json.loads((folder / "tuning.json").read_text())


def heartbeats(folder, query):
    """What the study's database answers, or nothing where it has no such table yet."""
    try:
        with closing(sqlite3.connect(folder / "study.db", timeout=60)) as connection, connection:
            return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_search_ends_with_an_adapter_and_its_recipe(beft, project, tmp_path):
    out = tmp_path / "tuned"
    run = beft("tune", project / "recipe.yaml", "--trials", "6", "--output", out, "--seed", "3")
    assert run.returncode == 0, run.stderr
    found = found_in(out)
    trials = found["trials"]
    assert len(trials) == 6

    # The first is the recipe, then a larger rate; the next are the other terms, by the scores of a pass over what the
    # trials learn.
    default, larger, *others = (trial["settings"] for trial in trials[:5])
    assert {key: default[key] for key in ("layers", "rate", "steps")} == {"layers": "upper", "rate": 0.1, "steps": 16}
    assert larger == {**default, "rate": pytest.approx(0.1 * 5**0.5)}
    assert {default["term"], *(each["term"] for each in others[:2])} == {"query", "key", "value"}
    assert others == [{**default, "term": term} for term in (*(each["term"] for each in others[:2]), "all")]
    assert trials[0]["state"] == "done" and found["default"] == 0
    low, high = 0.1 / 5, 0.1 * 5
    assert all(low <= trial["settings"]["rate"] <= high for trial in trials)
    for trial in trials:
        assert trial["state"] in ("done", "pruned") and trial["seconds"] > 0
        assert f"{trial['loss']:.4f}" in run.stdout

    # tuned.yaml is the recipe of the adapter.
    settings = yaml.safe_load((out / "tuned.yaml").read_text())
    assert settings["seed"] == 3 and settings["train_file"] == str(project / "rows.jsonl")
    run = beft("train", out / "tuned.yaml")
    assert run.returncode == 0, run.stderr
    if found["chosen"] != "soup":
        again = load_file(out / "retrained" / "adapter_model.safetensors")
        for name, values in load_file(out / "adapter_model.safetensors").items():
            torch.testing.assert_close(values, again[name], rtol=1e-3, atol=1e-5)

    # The adapter is one of plain PEFT, and the test figures are those of a computation on one padded batch.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "base"), out).eval()
    batch = full_batch(make_tokenizer(), rows_of(project / "test.jsonl"))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1).float().mean().item()
    assert found["test"] == pytest.approx({"loss": loss, "accuracy": right}, rel=1e-4)
    card = (out / "README.md").read_text()
    assert "## How the settings were chosen" in card and "| 0 | " in card and "(tuning.png)" in card
    assert card.index("## How the settings") < card.index("## How to load it")
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_finds_the_same_twice_and_the_test_file_has_no_part_in_it(project, tmp_path):
    """Six trials, so that the sampler has chosen some by the losses of those before."""
    common = ["--bias_term", "value", "--max_steps", "6"]
    class_rows(12, seed=5).to_json(tmp_path / "other.jsonl")
    found = []
    for number, file in enumerate((project / "test.jsonl", tmp_path / "other.jsonl")):
        out = tmp_path / str(number)
        tune(project / "recipe.yaml", trials=6, output=out, overrides=[*common, "--test_file", str(file)])
        found.append(found_in(out))
        for trial in found[-1]["trials"]:
            trial.pop("seconds")
    assert found[0]["trials"] == found[1]["trials"]
    assert found[0]["settings"] == found[1]["settings"] and found[0]["test"] != found[1]["test"]
    assert found[0]["verdict"] == found[1]["verdict"]


def test_a_search_goes_on_where_it_was_interrupted(beft, project, tmp_path):
    out = tmp_path / "tuned"
    command = [BEFT, "tune", project / "recipe.yaml", "--output", out, "--bias_term", "value"]
    with Python(*command, "--trials", "500") as process:
        process.until(lambda: "Trial 1:" in process.stdout)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130, process.stderr
        assert "Traceback" not in process.stderr
        assert "Best so far" in process.stdout
    known = found_in(out)
    assert known["trials"][0]["state"] == "done" and "test" not in known
    assert (out / "tuned.yaml").is_file() and not (out / "adapter_config.json").exists()

    done = {trial.number: trial.values for trial in study_of(out).trials if trial.state.is_finished()}
    finished = sum(trial["state"] in ("done", "pruned") for trial in known["trials"])
    run = beft(*command[1:], "--trials", str(finished + 1))
    assert run.returncode == 0, run.stderr
    trials = study_of(out).trials
    assert {number: trials[number].values for number in done} == done  # none of them ran again
    states = [trial["state"] for trial in found_in(out)["trials"]]
    assert sum(state in ("done", "pruned") for state in states) == finished + 1
    assert (out / "adapter_config.json").is_file()

    run = beft(*command[1:], "--seed", "7")
    assert run.returncode == 1
    assert "is one of other trials: seed differ" in " ".join(run.stderr.split())


def test_a_default_that_a_dead_process_was_at_is_begun_again(project, tmp_path):
    """Its trial runs on in the database until its heartbeats are too old."""
    out = tmp_path / "tuned"
    given = ["--bias_term", "value", "--max_steps", "60"]
    with Python(BEFT, "tune", project / "recipe.yaml", "--output", out, *given, "--trials", "2") as process:
        process.until(lambda: (out / "study.db").exists() and heartbeats(out, "SELECT * FROM trial_heartbeats"))
        process.kill()
    assert [trial.state.name for trial in study_of(out).trials] == ["RUNNING", "WAITING"]
    heartbeats(out, "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")
    tuned = tune(project / "recipe.yaml", trials=2, output=out, overrides=given)
    states = [record.state for record in tuned.choice.records]
    assert states[0] == "stopped" and sum(state in ("done", "pruned") for state in states) in (2, 3)
    assert tuned.choice.default.number > 0


FAULTS = """
import sys, torch
from trl import SFTTrainer
from beft_trl import tune

compute = SFTTrainer.compute_loss

class OutOfMemory(torch.OutOfMemoryError):
    pass

def faulty(trainer, *given, **kwargs):
    loss = compute(trainer, *given, **kwargs)
    term, step, last = trainer.selected_bias_term, trainer.state.global_step, trainer.accelerator.num_processes - 1
    if term == "key" and step == 1 and trainer.accelerator.process_index == last:
        return loss * float("nan")
    if term == "value" and step == 1 and not last:
        raise OutOfMemory("CUDA out of memory.")
    return loss

SFTTrainer.compute_loss = faulty
tuned = tune(sys.argv[1], trials=5, output=sys.argv[2], overrides=sys.argv[3:])
"""


def _failed(project, tmp_path, processes, batch):
    """The trials of a search in which the key bias gives a loss that is not finite, in the last process."""
    (tmp_path / "faults.py").write_text(FAULTS)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    options = ["--max_steps", "6", "--per_device_train_batch_size", batch]
    options += ["--ddp_backend", "gloo"] if processes > 1 else []
    run = python(*launch, tmp_path / "faults.py", project / "recipe.yaml", tmp_path / "out", *options)
    assert run.returncode == 0, run.stderr[-3000:]
    trials = found_in(tmp_path / "out")["trials"]
    assert trials[0]["state"] == "done" and trials[0]["settings"]["term"] == "query"
    of_key = [trial for trial in trials if trial["settings"]["term"] == "key"]
    assert of_key and {trial["state"] for trial in of_key} == {"not finite"}
    assert sum(trial["state"] in ("done", "pruned") for trial in trials) >= 2  # the search went on
    assert len(trials) == 5  # and tried none of them again
    return trials


def test_a_trial_that_fails_is_named_and_the_search_goes_on(project, tmp_path):
    trials = _failed(project, tmp_path, 1, "4")
    of_value = [trial for trial in trials if trial["settings"]["term"] == "value"]
    assert of_value and {trial["state"] for trial in of_value} == {"out of memory"}


@pytest.mark.matrix
def test_a_loss_that_one_of_two_processes_finds_not_finite_ends_the_trial_in_both(project, tmp_path):
    _failed(project, tmp_path, 2, "2")


def test_folds_stop_what_is_behind_after_some_of_them(project, tmp_path):
    overrides = ["--bias_term", "value", "--max_steps", "8"]
    tune(project / "recipe.yaml", trials=6, folds=4, output=tmp_path / "out", overrides=overrides)
    trials = study_of(tmp_path / "out").trials
    looks = {
        state: [len(trial.intermediate_values) for trial in trials if trial.state.name == state]
        for state in ("COMPLETE", "PRUNED")
    }
    assert trials[0].state.name == "COMPLETE" and set(looks["COMPLETE"]) == {4}
    assert looks["PRUNED"] and max(looks["PRUNED"]) < 4


@pytest.mark.parametrize("given", [["--save_strategy", "no", "--seed", "3"], ["--save_strategy=no", "--seed=3"]])
def test_words_of_the_command_line_stay_words_in_a_recipe(project, tmp_path, given):
    """Those that YAML reads as true and false, and numbers that it reads as text."""
    more = ["--use_cpu", "true", "--weight_decay", "1e-3", "--bf16", "False", "--model_revision", "null"]
    values = given_values(str(project / "recipe.yaml"), [*given, *more])
    assert values["save_strategy"] == "no" and values["seed"] == 3 and values["use_cpu"] is True
    assert values["weight_decay"] == 1e-3 and values["bf16"] == "False" and values["model_revision"] == "null"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    parsed = parse_recipe(["--config", str(tmp_path / "again.yaml")]).training
    assert (parsed.save_strategy, parsed.seed, parsed.use_cpu, parsed.bf16) == ("no", 3, True, False)


@pytest.mark.matrix
def test_processes_share_a_study(beft, project, tmp_path):
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    common = ["--trials", "6", "--storage", storage, "--bias_term", "value", "--folds", "2", "--max_steps", "4"]
    command = [BEFT, "tune", project / "recipe.yaml", "--output", tmp_path / "a", *common]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert next(line for line in process.stdout if line.startswith("Trial "))  # the study is there
    run = beft("tune", project / "recipe.yaml", "--output", tmp_path / "b", *common)
    assert run.returncode == 0, run.stderr
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    trials = optuna.load_study(study_name="beft-tune", storage=storage).trials
    states = [trial.state.name for trial in trials]
    assert set(states) <= {"COMPLETE", "PRUNED"} and 6 <= len(trials) <= 7
    assert len({tuple(trial.params.values()) for trial in trials[2:]}) == len(trials) - 2  # nothing twice
    kept = [{int(file.stem) for file in (tmp_path / name / "trials").glob("*.safetensors")} for name in "ab"]
    assert not kept[0] & kept[1]
    assert kept[0] | kept[1] == {trial.number for trial in trials if trial.state.name == "COMPLETE"}
    for trial in trials:
        if trial.state.name == "COMPLETE":
            assert [len(fold) for fold in trial.user_attrs["rows"]] == [16, 16]


@pytest.mark.matrix
def test_two_processes_of_one_run_find_what_one_does(project, tmp_path):
    """On the same global batch: DDP's first process has the study, and each judges its share of the rows."""
    common = ["--trials", "2", "--bias_term", "value", "--max_steps", "4"]
    one = tune(project / "recipe.yaml", trials=2, output=tmp_path / "one", overrides=common[2:])
    run = subprocess.run(
        [BEFT, "tune", project / "recipe.yaml", "--launch", "ddp_cpu", "--output", tmp_path / "two", *common]
        + ["--per_device_train_batch_size", "2"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Trial 0:") == 1
    ones, twos = (found_in(tmp_path / name) for name in ("one", "two"))
    for one_trial, together in zip(ones["trials"], twos["trials"], strict=True):
        assert one_trial["settings"] == together["settings"] and one_trial["state"] == together["state"]
        assert together["loss"] == pytest.approx(one_trial["loss"], rel=1e-3)
    assert twos["test"] == pytest.approx(ones["test"], rel=1e-3)
    assert one.figures == ones["test"]


def test_time_that_is_over_leaves_the_default(project, tmp_path):
    started = time.monotonic()
    tuned = tune(project / "recipe.yaml", trials=500, minutes=0.001, output=tmp_path / "tuned")
    assert time.monotonic() - started < 60
    assert tuned.choice.kind == "default"
    assert [record.number for record in tuned.choice.records if record.state == "done"] == [0]
    assert (tmp_path / "tuned" / "adapter_config.json").is_file()


WRONG = {
    "zero": (["--launch", "zero2"], "one process or under DDP, and this is ZeRO-2"),
    "packing": (["--packing", "true"], "packing=True puts rows together"),
    "resume": (["--resume_from_checkpoint", "x"], "A search goes on by itself"),
    "folds": (["--folds", "20"], "32 rows are too few for 20 parts"),
    "storage": (["--storage", "nothing://here"], "cannot be opened as a database"),
    "minutes": (["--minutes", "-1"], "minutes=-1.0 cannot be"),
    "adapter": (["--output", "taken"], "holds an adapter that no search wrote"),
    "recipe": (["--bias_termm", "value"], "bias_termm (did you mean bias_term?)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_searched_is_refused(beft, project, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken", "adapter_config.json").write_text("{}")
    arguments, message = WRONG[case]
    out = [] if case == "adapter" else ["--output", tmp_path / "out"]
    run = beft("tune", project / "recipe.yaml", *out, *arguments)
    assert run.returncode == 1
    assert message in " ".join(run.stderr.split())
    assert not (tmp_path / "out" / "study.db").exists()
    assert not list(tmp_path.glob("out/*"))


def test_a_trainer_that_trained_or_has_its_own_functions_is_refused(make_trainer):
    trainer = make_trainer(bias_term="value")
    trainer.train()
    with pytest.raises(ValueError, match="trained"):
        tune(trainer)
    trainer = make_trainer(trainer={"compute_metrics": lambda predictions: {}})
    with pytest.raises(ValueError, match="compute_metrics"):
        tune(trainer)
