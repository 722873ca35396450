"""What a launch configuration starts, read without starting it; test_distributed.py starts them."""

import json

import pytest

from beft_trl import engines
from beft_trl.cli.launch import SHIPPED, launch_command, launched_engine


def write(folder, **settings):
    file = folder / "launch.yaml"
    file.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", "num_processes": 2, **settings}))
    return str(file)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_configuration_starts_the_engine_of_its_name(file):
    expected = file.stem.removesuffix("_cpu").removesuffix("_two_nodes")
    assert launched_engine(file.stem)[0] == expected


@pytest.mark.parametrize(
    ("zero", "engine"),
    [
        ({"stage": 1}, "zero1"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero2"),
        ({"stage": 3, "offload_param": {"device": "none"}}, "zero3"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "zero3_offload"),
    ],
)
def test_a_file_of_deepspeed_tells_its_engine(tmp_path, zero, engine):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    settings = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    file = write(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=settings)
    assert launched_engine(file) == (engine, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributed_type": "FSDP"}, "FSDP.*--launch zero3"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 0}}, "zero_stage 0 .*--launch ddp"),
    ],
)
def test_an_engine_that_is_not_among_the_cells_is_refused_before_it_is_launched(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        launch_command(write(tmp_path, **settings), ["train", "recipe.yaml"])


def test_without_deepspeed_its_launcher_is_not_started(monkeypatch):
    monkeypatch.setattr(engines, "is_deepspeed_available", lambda: False)
    with pytest.raises(ImportError, match=r"ZeRO-2.*'beft-trl\[deepspeed\]'"):
        launch_command("zero2", ["train", "recipe.yaml"])
    assert launch_command("ddp", ["train", "recipe.yaml"])[-2:] == ["train", "recipe.yaml"]


NONE = {
    "empty": "",
    "a list": "[]",
    "a word": "text",
    "no YAML": "a: [",
    "no kind": "num_processes: 2\n",
    "a key that is none": "distributed_type: MULTI_GPU\nnum_processes: 2\nno_such: 1\n",
    "an unknown kind": "distributed_type: BOGUS\nnum_processes: 2\n",
    "a kind that BEFT does not run on": "distributed_type: XLA\nnum_processes: 2\n",
    "another place": "compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'\n",
    "no number of processes": "distributed_type: MULTI_GPU\n",
    "no processes": "distributed_type: MULTI_GPU\nnum_processes: 0\n",
    "processes as a word": "distributed_type: MULTI_GPU\nnum_processes: two\n",
    "no machines": "distributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 0\n",
    "a precision that is none": "distributed_type: 'NO'\nmixed_precision: fp7\n",
    "DeepSpeed without settings": "distributed_type: DEEPSPEED\nnum_processes: 2\n",
    "DeepSpeed as text": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: text\n",
    "a stage that is none": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 7}\n",
    "a stage as a word": "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: two}\n",
    "a missing file of DeepSpeed's": (
        "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {deepspeed_config_file: absent.json}\n"
    ),
}


@pytest.mark.parametrize("kind", NONE)
def test_a_launch_file_with_which_nothing_starts_is_named(tmp_path, kind):
    file = tmp_path / "launch.yaml"
    file.write_text(NONE[kind])
    for read in (launched_engine, lambda name: launch_command(name, ["train", "recipe.yaml"])):
        with pytest.raises(ValueError, match="launch.yaml"):
            read(str(file))


def test_a_kind_of_no_without_quotes_is_one_process(tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: NO\nmixed_precision: no\nnum_processes: 1\n")
    assert launched_engine(str(file)) == ("single", 1)
