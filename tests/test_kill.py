"""`kill -9` of a run, each followed by a resume: at file events, and at random moments, half of them inside a save.

The rate stays high to the last step, so that a step too many would show. CI kills at three file events; at forty, and
twice and twenty times at random moments, in about seven minutes on two cores: pytest -m matrix tests/test_kill.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from processes import python
from safetensors.torch import load_file

from beft_trl.checkpoints import MANIFEST_FILE, last_complete_checkpoint


TESTS = Path(__file__).parent
PROGRAM = textwrap.dedent(
    """
    import os
    import sys
    sys.path.insert(0, sys.argv[1])
    from conftest import make_llama, make_rows, make_tokenizer
    from transformers import TrainerCallback
    from beft_trl import BeftSFTConfig, BeftSFTTrainer

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with open(sys.argv[3] + ".new", "w") as file:
                file.write(str(state.global_step))
            os.replace(sys.argv[3] + ".new", sys.argv[3])

        on_step_end = on_train_begin

    config = BeftSFTConfig(
        sys.argv[2], score_steps=2, bias_layers="all", max_steps=int(sys.argv[4]),
        save_strategy="steps", save_steps=3, logging_steps=1,
        use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4, disable_tqdm=True,
        gradient_checkpointing=False, save_total_limit=3, lr_scheduler_type="constant",
    )
    trainer = BeftSFTTrainer(
        make_llama(), config, train_dataset=make_rows(), processing_class=make_tokenizer(), callbacks=[Progress()]
    )
    trainer.train(resume_from_checkpoint=sys.argv[5] == "resume")
    trainer.save_model()
    """
)


def start(out, steps, resume):
    """Returns once training has begun; the step it has reached stands in the file `progress` next to the output."""
    progress = out.parent / "progress"
    progress.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, TESTS, out, progress, str(steps), "resume" if resume else "anew"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not progress.exists():
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.005)
    return process


def step_reached(out):
    return int((out.parent / "progress").read_text())


def unfinished(out):
    return [path for path in out.glob("checkpoint-*") if not (path / MANIFEST_FILE).exists()]


@pytest.mark.matrix
@pytest.mark.parametrize(("kills", "steps"), [(2, 60), (20, 900)], ids=["two", "twenty"])
def test_every_resume_continues_and_the_end_is_that_of_a_run_never_killed(tmp_path, kills, steps):
    whole, killed = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    for out in (whole, killed):
        out.parent.mkdir()
    assert start(whole, steps, resume=False).wait() == 0

    moments = random.Random(0)
    in_a_save, last_step = 0, -1
    for kill in range(kills):
        process = start(killed, steps, resume=last_complete_checkpoint(killed) is not None)
        assert last_step < steps, "the run ended before all kills: give it more steps"
        resumed_at = step_reached(killed)
        assert resumed_at >= last_step  # never before a checkpoint that was complete
        # A moment is a step and a part of one, so that a fast machine leaves steps for the kills to come.
        last_moment = resumed_at + (steps - resumed_at) // (kills - kill + 1)
        moment = moments.randint(resumed_at, last_moment)
        while step_reached(killed) < moment and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        if kill % 2:
            before = {path.name for path in killed.glob("checkpoint-*")}
            deadline = time.monotonic() + 5
            while not {path.name for path in unfinished(killed)} - before and time.monotonic() < deadline:
                pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        in_a_save += bool(unfinished(killed))
        last = last_complete_checkpoint(killed)
        last_step = int(Path(last).name.split("-")[1]) if last else -1
        print(f"kill {kill}: resumed at {resumed_at}, last complete {last_step}, unfinished {unfinished(killed)}")
    assert in_a_save >= max(1, kills // 4)
    final = start(killed, steps, resume=True)
    assert final.wait() == 0, final.stderr.read()[-2000:]

    expected, found = (load_file(out / "adapter_model.safetensors") for out in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(expected[name].numpy().tobytes() == found[name].numpy().tobytes() for name in expected)
    histories = [
        json.loads((out / f"checkpoint-{steps - steps % 3}" / "trainer_state.json").read_text())["log_history"]
        for out in (whole, killed)
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps - steps % 3


DRIVER = textwrap.dedent(
    """
    import json, os, signal, sys
    sys.path.insert(0, sys.argv[1])
    from conftest import make_llama, make_rows, make_tokenizer
    from beft_trl import BeftSFTConfig, BeftSFTTrainer
    from beft_trl.checkpoints import last_complete_checkpoint

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    folder, kills = sys.argv[2], int(sys.argv[3])

    def run(out, kill_at=None, count_to=None):
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in EVENTS and out in str(arguments[0]):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        config = BeftSFTConfig(
            out, bias_term="value", max_steps=6, save_strategy="steps", save_steps=2, logging_steps=1, use_cpu=True,
            bf16=False, report_to="none", per_device_train_batch_size=4, disable_tqdm=True,
            gradient_checkpointing=False, save_total_limit=2, lr_scheduler_type="constant",
        )
        trainer = BeftSFTTrainer(make_llama(), config, train_dataset=make_rows(), processing_class=make_tokenizer())
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(out) is not None)
        trainer.save_model()
        if count_to:
            with open(count_to, "w") as file:
                file.write(str(seen))

    def child(*call):
        pid = os.fork()
        if pid == 0:
            sys.stdout = open(os.devnull, "w")
            run(*call)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert child(f"{folder}/whole", None, f"{folder}/count") == 0
    events = int(open(f"{folder}/count").read())
    codes = []
    for number in range(kills):
        out = f"{folder}/killed-{number}"
        at = 1 + number * (events - 1) // (kills - 1)
        codes.append((at, child(out, at), child(out)))
    print(json.dumps({"events": events, "codes": codes}))
    """
)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.matrix)])
def test_a_kill_at_any_file_event_ends_in_the_bits_of_a_run_never_killed(tmp_path, kills):
    """From the first file that the run opens to the last one of its final save. Forked: imports are done once."""
    driver = python("-c", DRIVER, TESTS, tmp_path, str(kills))
    assert driver.returncode == 0, driver.stderr[-2000:]
    done = json.loads(driver.stdout.splitlines()[-1])
    assert len({at for at, _, _ in done["codes"]}) == kills
    assert [(killed, ended) for _, killed, ended in done["codes"]] == [(-signal.SIGKILL, 0)] * kills
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    same = 0
    for number in range(kills):
        found = load_file(tmp_path / f"killed-{number}" / "adapter_model.safetensors")
        same += all(found[name].numpy().tobytes() == values.numpy().tobytes() for name, values in expected.items())
    print(f"{same} of {kills} same bits, of {done['events']} file events")
    assert same == kills
