import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file

from beft_trl.checkpoints import MANIFEST_FILE, damage, last_complete_checkpoint, mark_complete


TESTS = Path(__file__).parent


@pytest.fixture
def run(make_trainer):
    """A finished run with the checkpoints 2, 4 and 6, and a function that makes its trainer again."""

    def make(**settings):
        return make_trainer(
            make_llama(),
            **{"bias_term": "value", "save_strategy": "steps", "save_steps": 2, "max_steps": 6} | settings,
        )

    trainer = make()
    trainer.train()
    return trainer, make


def test_a_checkpoint_holds_the_run_and_never_the_base(run):
    folder = Path(run[0].args.output_dir) / "checkpoint-4"
    assert damage(folder) is None
    listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    needed = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "beft_scores.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    assert needed <= set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    deltas = sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert deltas == 2 * 16 * 4
    optimizer = torch.load(folder / "optimizer.pt")["state"]
    assert sum(state["exp_avg"].nbytes for state in optimizer.values()) == deltas


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "truncated": (lambda folder: truncate(folder / "optimizer.pt"), "optimizer.pt has .* bytes of"),
    "missing": (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "flipped": (
        lambda folder: (folder / "beft_scores.json").write_bytes(b" " * (folder / "beft_scores.json").stat().st_size),
        "beft_scores.json has changed since it was written",
    ),
    "manifest": (lambda folder: truncate(folder / MANIFEST_FILE), f"{MANIFEST_FILE} is damaged"),
    "list": (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), f"{MANIFEST_FILE} is damaged"),
    "unmarked": (lambda folder: (folder / MANIFEST_FILE).unlink(), "not written to the end"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_both(run, kind, caplog):
    trainer, make = run
    expected = load_file(Path(trainer.args.output_dir) / "checkpoint-6" / "adapter_model.safetensors")
    spoil, reason = DAMAGES[kind]
    spoil(Path(trainer.args.output_dir) / "checkpoint-6")
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4: passed over" in caplog.text
    assert re.search(f"checkpoint-6, since .*{reason}", caplog.text)
    found = load_file(Path(trainer.args.output_dir) / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)  # written anew, bit for bit
    assert damage(Path(trainer.args.output_dir) / "checkpoint-6") is None


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(run):
    trainer, make = run
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    truncate(checkpoint / "trainer_state.json")
    with pytest.raises(ValueError, match="checkpoint-4 cannot be resumed: trainer_state.json has"):
        make().train(resume_from_checkpoint=str(checkpoint))


def change_adapter(folder, value):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * value for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def change_state(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": -1}))


def change_to_a_folder(folder):
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").mkdir()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: change_adapter(folder, float("nan")), "not finite"),
        (lambda folder: change_adapter(folder, float("inf")), "not finite"),
        (change_state, "global_step is -1"),
        (change_to_a_folder, "optimizer.pt is a folder"),
    ],
)
def test_what_no_run_writes_is_refused_under_a_manifest_that_fits_it(run, spoil, named):
    trainer, make = run
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    written = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).unlink()
    spoil(checkpoint)
    mark_complete(checkpoint, written["engine"], written["processes"], written["run"])
    with pytest.raises(ValueError, match=named):
        make().train(resume_from_checkpoint=str(checkpoint))


def test_without_a_complete_checkpoint_nothing_is_resumed(run):
    trainer, make = run
    for step in (2, 4, 6):
        (Path(trainer.args.output_dir) / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make().train(resume_from_checkpoint=True)


def test_another_engine_or_number_of_processes_is_refused(run):
    trainer, make = run
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-6"
    recorded = json.loads((checkpoint / MANIFEST_FILE).read_text())["run"]
    for engine, processes in (("zero2", 1), ("single", 2)):
        (checkpoint / MANIFEST_FILE).unlink()
        mark_complete(checkpoint, engine, processes, recorded)
        with pytest.raises(ValueError, match=rf"written by {engine} on {processes} .*this run is single on 1"):
            make().train(resume_from_checkpoint=True)


def test_old_checkpoints_go_only_when_the_new_one_is_complete(make_trainer, monkeypatch):
    seen = []

    def mark(checkpoint, *args):
        seen.append(sorted(path.name for path in Path(checkpoint).parent.glob("checkpoint-*")))
        mark_complete(checkpoint, *args)

    monkeypatch.setattr("beft_trl.saving.mark_complete", mark)
    trainer = make_trainer(
        make_llama(), bias_term="value", save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=1
    )
    trainer.train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-6"]


PROGRAM = textwrap.dedent(
    """
    import resource, signal, sys
    sys.path.insert(0, {tests!r})
    from conftest import make_llama, make_rows, make_tokenizer
    from transformers import TrainerCallback
    from beft_trl import BeftSFTConfig, BeftSFTTrainer

    class FillTheDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # no file may grow beyond this from here on
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    config = BeftSFTConfig(
        sys.argv[1], bias_term="value", max_steps=6, save_strategy="steps", save_steps=2, use_cpu=True, bf16=False,
        report_to="none", per_device_train_batch_size=4, disable_tqdm=True, logging_strategy="no",
    )
    trainer = BeftSFTTrainer(
        make_llama(), config, train_dataset=make_rows(), processing_class=make_tokenizer(), callbacks=[FillTheDisk()]
    )
    trainer.train()
    """
)


def test_a_full_disk_gives_one_error_and_leaves_the_previous_checkpoint(tmp_path):
    """Writes really fail: the process may not write a file beyond 1,000 bytes any more."""
    out = tmp_path / "out"
    program = PROGRAM.format(tests=str(TESTS))
    run = subprocess.run([sys.executable, "-c", program, out], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: ")
    assert "checkpoint-4 could not be written" in last
    assert "checkpoint-2 is complete: free some space and resume from it" in last
    assert not (out / "checkpoint-4").exists()
    assert last_complete_checkpoint(out) == str(out / "checkpoint-2")


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(make_trainer, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="output_dir .*file/out cannot be written"):
        make_trainer("no/such/model", output_dir=str(blocked / "out"))
