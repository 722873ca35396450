"""What a run takes up from a checkpoint: the same bits, its own run, all tensors; and the folder it writes to."""

import json
import os
import re
import shutil
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import losses, make_llama, make_opt, make_rows, of_term, saved, tensors, trainer_in
from processes import Python
from safetensors.torch import load_file, save_file
from transformers import OPTForCausalLM, TrainerCallback

from beft_trl import merge_adapter
from beft_trl.checkpoints import MANIFEST_FILE, mark_complete
from beft_trl.identity import FIXED, differences, identify_base, spread
from beft_trl.resume import refuse_foreign_pickles


TESTS = Path(__file__).parent
ADAPTER = "adapter_model.safetensors"


class Kill(TrainerCallback):
    """Ends the run as Ctrl-C does, after the save of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run_in(parent, folder="out", model=None, rows=None, kill_at=None, **settings):
    """The trainer of a run with a checkpoint every second step, at a rate that stays high."""
    defaults = {
        "bias_term": "value", "save_strategy": "steps", "save_steps": 2, "max_steps": 6,
        "lr_scheduler_type": "constant", "learning_rate": 1e-2,
    }  # fmt: skip
    callbacks = {"callbacks": [Kill(kill_at)]} if kill_at else {}
    return trainer_in(parent / folder, model or make_llama(), rows, callbacks, **(defaults | settings))


@pytest.fixture
def make_run(tmp_path):
    return partial(run_in, tmp_path)


def adapter(folder):
    return load_file(Path(folder) / ADAPTER)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "half an epoch": {"max_steps": -1, "num_train_epochs": 0.5},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "the end of an epoch": {"max_steps": 8},
}


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(name, marks=pytest.mark.matrix) if name in ("constant_with_warmup", "inverse_sqrt") else name
        for name in SCHEDULES
    ],
)
def test_a_resume_at_the_last_step_trains_nothing(make_run, tmp_path, schedule):
    settings = SCHEDULES[schedule]
    whole = make_run("whole", **settings)
    whole.train()
    whole.save_model()
    steps = whole.state.global_step
    with pytest.raises(KeyboardInterrupt):
        make_run("killed", kill_at=steps, **settings).train()
    resumed = make_run("killed", **settings)
    output = resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert output.global_step == resumed.state.global_step == resumed.resumed_at == steps
    assert same_bits(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == list(range(1, steps + 1))


def test_a_resume_at_the_last_step_still_loads_the_best_model(make_trainer, tmp_path):
    """The best is the earliest one here: the highest loss."""
    settings = {
        "bias_term": "value", "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
        "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip

    def run(folder, *callbacks):
        return make_trainer(
            make_llama(), trainer={"eval_dataset": make_rows(8, seed=1), "callbacks": list(callbacks)},
            output_dir=str(tmp_path / folder), **settings,
        )  # fmt: skip

    whole = run("whole")
    whole.train()
    assert whole.state.best_model_checkpoint.endswith("checkpoint-2")
    with pytest.raises(KeyboardInterrupt):
        run("killed", Kill(6)).train()
    resumed = run("killed")
    resumed.train(resume_from_checkpoint=True)
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


OTHERS = {
    "learning_rate": {"learning_rate": 1e-4},
    "seed": {"seed": 7},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "max_length": {"max_length": 16},
    "optim": {"optim": "sgd"},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "weight_decay": {"weight_decay": 0.1},
    "max_steps": {"max_steps": 8},
    "data": {"rows": make_rows(32, seed=3)},
    "rows": {"rows": make_rows(40)},
    "dtype": {"model": lambda: make_llama().bfloat16()},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KeyboardInterrupt):
        run_in(folder, kill_at=2).train()
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with the checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    run_in(folder).train()
    return folder / "out"


@pytest.mark.parametrize("name", OTHERS)
def test_a_resume_of_another_run_says_what_differs_and_stops(make_run, killed, tmp_path, name):
    shutil.copytree(killed, tmp_path / "out")
    other = {key: value() if callable(value) else value for key, value in OTHERS[name].items()}
    resumed = make_run(**other)
    before = {key: values.clone() for key, values in resumed.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"checkpoint-2\b.*\b{name}="):
        resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(values, before[key]) for key, values in resumed.model.state_dict().items())


def test_more_steps_are_taken_on_request(make_run):
    make_run(max_steps=4).train()
    more = make_run(max_steps=6, allow_changed_resume=True)
    more.train(resume_from_checkpoint=True)
    whole = make_run("whole", max_steps=6)
    whole.train()
    assert more.state.global_step == 6
    found, expected = more.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_another_base_is_never_resumed(make_run, finished, tmp_path, allowed):
    """Of the same shapes and the same name: only the numbers tell."""
    shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(ValueError, match="base_weights"):
        make_run(model=make_llama(seed=1), allow_changed_resume=allowed).train(True)


@pytest.mark.parametrize("allowed", [False, True])
def test_a_model_of_another_architecture_is_never_resumed(make_run, allowed):
    make_run(model=make_opt(), max_steps=2).train()
    with pytest.raises(ValueError, match="base_weights"):
        make_run(max_steps=2, allow_changed_resume=allowed).train(resume_from_checkpoint=True)


def test_a_base_with_an_adapter_merged_into_it_is_another_one(tmp_path):
    """Only biases differ, between the bytes of the files that are sampled."""
    base = make_opt(hidden_size=128, ffn_dim=512, word_embed_proj_dim=128, vocab_size=2048)
    saved(base, tmp_path, of_term(base))
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    known = [
        {"base_model": name, **identify_base(OPTForCausalLM.from_pretrained(tmp_path / name), str(tmp_path / name))}
        for name in ("base", "moved", "merged")
    ]
    assert len({each["base_files"] for each in known}) == 1
    assert not differences(known[0], known[1])
    assert {*differences(known[0], known[2])} & {*FIXED}


def test_a_base_that_was_moved_is_the_same(make_run, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    make_run(model=str(tmp_path / "base"), max_steps=2).train()
    (tmp_path / "base").rename(tmp_path / "moved")
    make_run(model=str(tmp_path / "moved"), max_steps=2).train(resume_from_checkpoint=True)


def test_the_newest_checkpoint_of_this_run_is_named(make_run, tmp_path, caplog):
    """A folder in which an older run went further than the one that is to be resumed."""
    make_run().train()
    with pytest.raises(KeyboardInterrupt):
        make_run(kill_at=2, learning_rate=1e-4, seed=7).train()
    assert "checkpoint-6 is of another run" in caplog.text and "learning_rate" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-6\b.*checkpoint-2\b"):
        make_run(learning_rate=1e-4, seed=7).train(resume_from_checkpoint=True)
    resumed = make_run(learning_rate=1e-4, seed=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    whole = make_run("whole", learning_rate=1e-4, seed=7)
    whole.train()
    found, expected = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def rewrite(checkpoint, change):
    """Changes the adapter of a checkpoint and marks it complete again."""
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    tensors = load_file(checkpoint / ADAPTER)
    change(tensors)
    save_file(tensors, checkpoint / ADAPTER)
    (checkpoint / MANIFEST_FILE).unlink()
    mark_complete(checkpoint, manifest["engine"], manifest["processes"], manifest["run"])


CHANGES = {
    "missing": lambda tensors: tensors.pop(sorted(tensors)[0]),
    "another name": lambda tensors: tensors.update(other=tensors.pop(sorted(tensors)[0])),
    "another shape": lambda tensors: tensors.update({sorted(tensors)[0]: torch.ones(1, 3)}),
    "one too many": lambda tensors: tensors.update(other=torch.ones(2)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_loads_whole_or_not_at_all(make_run, finished, tmp_path, kind):
    shutil.copytree(finished, tmp_path / "out")
    rewrite(tmp_path / "out" / "checkpoint-6", CHANGES[kind])
    with pytest.raises(ValueError, match=rf"{ADAPTER}.* of \d tensors"):
        make_run().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_its_run_is_taken_on_request_only(make_run, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        del manifest["run"]
        (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="allow_changed_resume=True"):
        make_run().train(resume_from_checkpoint=True)
    make_run(allow_changed_resume=True).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, 28_311_552, 2**31 + 7, 2**40 + 1])
def test_what_is_sampled_goes_from_the_first_to_the_last_of_any_number(count):
    """28,311,552 is the size of SmolLM2's embedding, which fp32 rounds up to an index that is not there."""
    index = spread(count, 64)
    assert index[0] == 0 and index[-1] == count - 1 and len(set(index)) == len(index) == min(count, 64)
    assert index == sorted(index)


MANIFESTS = {
    "a number": b"3",
    "not UTF-8": b"\xff\xfe\x00{",
    "no files": b'{"engine": "single", "processes": 1, "files": {}}',
    "files as a list": b'{"engine": "single", "processes": 1, "files": ["optimizer.pt"]}',
    "files without sizes": b'{"engine": "single", "processes": 1, "files": {"optimizer.pt": 3}}',
    "no engine": b'{"processes": 1, "files": {"optimizer.pt": {"bytes": 1, "sha256": ""}}}',
    "deep": b"[" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_passed_over_for_the_older_good_one(make_run, finished, tmp_path, caplog, kind):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-6" / MANIFEST_FILE).write_bytes(MANIFESTS[kind])
    resumed = make_run()
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4: passed over" in caplog.text and f"{MANIFEST_FILE} is damaged" in caplog.text
    assert resumed.state.global_step == 6


def test_a_zero_checkpoint_of_another_user_is_not_unpickled(tmp_path, monkeypatch):
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "mp_rank_00_model_states.pt").write_bytes(b"")
    refuse_foreign_pickles(tmp_path, trusted=False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="trust_checkpoint"):
        refuse_foreign_pickles(tmp_path, trusted=False)
    refuse_foreign_pickles(tmp_path, trusted=True)


HOLDER = textwrap.dedent(
    """
    import sys, time
    from beft_trl.checkpoints import output_lock
    with output_lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(600)
    """
)


def test_two_runs_do_not_write_to_one_folder_and_the_lock_dies_with_its_process(make_run, tmp_path):
    out = tmp_path / "out"
    with Python("-c", HOLDER, out) as holder:
        holder.until(lambda: holder.stdout == "held\n")
        with pytest.raises(RuntimeError, match=re.escape(str(out))):
            make_run().train()
        assert not list(out.glob("checkpoint-*"))
        holder.kill()
    make_run().train()


def test_a_kill_during_the_final_save_leaves_a_folder_that_a_run_takes(make_run, tmp_path, monkeypatch):
    """Killed before each of its files is put in place: restart and resume both go on."""
    whole = make_run("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "trained")
    whole.save_model()
    expected = adapter(tmp_path / "whole")
    killed, replace = tmp_path / "killed", Path.replace
    whole.args.output_dir = str(killed)
    for name in sorted(path.name for path in (tmp_path / "whole").glob("[!_]*") if path.is_file()):

        def replace_until(path, target, name=name):
            if Path(target).name == name and Path(target).parent == killed:
                raise KeyboardInterrupt
            return replace(path, target)

        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(tmp_path / "trained", killed)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", replace_until)
            whole.save_model()
        again = make_run("killed")
        again.train(resume_from_checkpoint=True)
        again.save_model()
        assert same_bits(adapter(killed), expected)
        make_run("killed", max_steps=2).train()


def test_a_relative_learning_rate_resumes(make_trainer, tmp_path):
    settings = {"relative_learning_rate": 0.03, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(**settings)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-3"
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(values, tensors(whole.model)[name]) for name, values in tensors(resumed.model).items())
    for allowed in (False, True):  # the optimizer's groups would be others
        with pytest.raises(ValueError, match="relative_learning_rate"):
            other = make_trainer(output_dir=str(tmp_path / "other"), allow_changed_resume=allowed)
            other.train(resume_from_checkpoint=checkpoint)


def test_a_resume_with_other_layers_is_refused(make_trainer):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    make_trainer(bias_layers="upper", **settings).train()
    for allowed in (False, True):
        with pytest.raises(ValueError, match="bias_layers asks for 0-1. Resume with bias_layers='1'"):
            other = make_trainer(bias_layers="all", allow_changed_resume=allowed, **settings)
            other.train(resume_from_checkpoint=True)
    same = make_trainer(bias_layers="1", **settings)
    same.train(resume_from_checkpoint=True)
    assert same.resumed_at == 4


def test_resume_continues_with_the_recorded_selection_and_does_not_score(make_trainer):
    whole = make_trainer(make_llama(), save_strategy="steps", save_steps=3, max_steps=6)
    whole.train()
    expected = tensors(whole.model)

    model, calls = make_llama(), []
    model.register_forward_pre_hook(lambda *call: calls.append(call))
    resumed = make_trainer(model, save_strategy="steps", save_steps=3, max_steps=6)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert len(calls) == 3  # the steps that were left
    assert resumed.selected_bias_term == whole.selected_bias_term
    assert resumed.bias_scores == whole.bias_scores
    found = tensors(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(resumed) == losses(whole)
