"""The plugin in the real Axolotl, which has an environment of its own: skipped where it is not installed."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama, make_rows, make_tokenizer
from datasets import Dataset, load_dataset
from peft import PeftModel
from processes import Python, python
from safetensors.torch import load_file


pytest.importorskip("axolotl")

from beft_trl.checkpoints import MANIFEST_FILE
from beft_trl.config import SETTINGS, enough_steps


REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "recipes" / "axolotl").glob("*.yaml"))
LAUNCH_CONFIGS = REPOSITORY / "recipes" / "accelerate_configs"
AXOLOTL = Path(sys.executable).parent / "axolotl"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny Llama with its tokenizer, and tokenized rows, so that both stacks feed the same tokens."""
    folder = tmp_path_factory.mktemp("axolotl")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    rows = []
    for row in make_rows(48):
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"] + [1]
        tokens = prompt + completion
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels})
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    return folder


def settings(world, output, **changes):
    values = {
        "base_model": str(world / "base"),
        "plugins": ["beft_trl.axolotl.BeftPlugin"],
        "adapter": "beft",
        "beft_score_steps": 2,
        "datasets": [{"path": str(world / "rows.jsonl"), "ds_type": "json", "type": None}],
        "shuffle_merged_datasets": False,
        "dataset_prepared_path": str(output / "prepared"),
        "output_dir": str(output / "out"),
        "sequence_len": 64,
        "sample_packing": False,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 3e-3,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 1,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


def axolotl(output, command, *arguments, text="", launcher=("--launcher", "python"), **config):
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    launcher = () if command == "merge-beft" else launcher
    return python(AXOLOTL, command, output / "config.yaml", *launcher, *arguments, cwd=output, text=text)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    run = axolotl(output, "train", **settings(world, output))
    assert run.returncode == 0, run.stderr[-3000:]
    return output


def test_it_selects_and_trains_as_the_trl_path_does(world, trained, tmp_path):
    from beft_trl import BeftSFTConfig, BeftSFTTrainer

    config = BeftSFTConfig(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=8, score_steps=2, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", max_length=64, learning_rate=3e-3,
    )  # fmt: skip
    rows = load_dataset("json", data_files=str(world / "rows.jsonl"), split="train")
    trainer = BeftSFTTrainer(str(world / "base"), config, train_dataset=rows)
    trainer.train()
    trainer.save_model()

    found = json.loads((trained / "out" / "beft_scores.json").read_text())
    expected = trainer.bias_scores.to_dict()
    assert found["ranking"] == expected["ranking"]
    for term in expected["ranking"]:
        for score in ("importance", "magnitude", "fisher"):
            assert found["terms"][term][score] == pytest.approx(expected["terms"][term][score], rel=1e-3)
    deltas = load_file(trained / "out" / "adapter_model.safetensors")
    of_trl = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert deltas.keys() == of_trl.keys()
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32 and delta.any()
        torch.testing.assert_close(delta, of_trl[name], rtol=0, atol=1e-3)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files <= {path.name for path in (trained / "out").iterdir()}

    # Each path goes on with what the other has written.
    adapted = PeftModel.from_pretrained(
        type(trainer.model.get_base_model()).from_pretrained(world / "base"), trained / "out"
    )
    going_on = BeftSFTTrainer(
        adapted, BeftSFTConfig(**{**vars_of(config), "output_dir": str(tmp_path / "on")}), train_dataset=rows,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    going_on.train()
    assert going_on.selected_bias_term == found["selected"]


def vars_of(config):
    names = ("max_steps", "per_device_train_batch_size", "use_cpu", "bf16", "gradient_checkpointing", "report_to")
    return {name: getattr(config, name) for name in names} | {"save_strategy": "no"}


def test_a_checkpoint_resumes_to_the_same_bits(world, trained, tmp_path):
    assert (trained / "out" / "checkpoint-3" / "beft_checkpoint.json").is_file()
    checkpoint = str(trained / "out" / "checkpoint-3")
    run = axolotl(tmp_path, "train", **settings(world, tmp_path, resume_from_checkpoint=checkpoint))
    assert run.returncode == 0, run.stderr[-3000:]
    whole = load_file(trained / "out" / "adapter_model.safetensors")
    for name, delta in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert torch.equal(delta, whole[name])


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("ddp", "zero1", "zero2"))]
)
def test_two_processes_under_axolotls_launcher_train_as_one(world, trained, tmp_path, engine):
    changes = {"micro_batch_size": 4}
    if engine != "ddp":
        changes["deepspeed"] = str(REPOSITORY / "recipes" / "axolotl" / "deepspeed" / f"{engine}.json")
    processes = ["--launcher", "accelerate", "--", "--config_file", str(LAUNCH_CONFIGS / "ddp_cpu.yaml")]
    processes += ["--main_process_port", "0"]
    run = axolotl(tmp_path, "train", launcher=processes, **settings(world, tmp_path, **changes))
    assert run.returncode == 0, run.stderr[-3000:]
    found, expected = (json.loads((folder / "out" / "beft_scores.json").read_text()) for folder in (tmp_path, trained))
    assert found["ranking"] == expected["ranking"]
    for term in expected["ranking"]:
        for score in ("importance", "magnitude", "fisher"):
            assert found["terms"][term][score] == pytest.approx(expected["terms"][term][score], rel=1e-2)
    deltas, of_one = (load_file(folder / "out" / "adapter_model.safetensors") for folder in (tmp_path, trained))
    assert deltas.keys() == of_one.keys()
    for name, delta in deltas.items():
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, of_one[name], rtol=0, atol=1e-3)
    manifest = json.loads((tmp_path / "out" / "checkpoint-6" / "beft_checkpoint.json").read_text())
    assert (manifest["engine"], manifest["processes"]) == (engine, 2)


def test_an_adapter_is_trained_further_under_lora_model_dir(world, trained, tmp_path):
    config = settings(world, tmp_path, lora_model_dir=str(trained / "out"), learning_rate=1e-4)
    run = axolotl(tmp_path, "train", **config)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Scoring" not in run.stderr
    before = load_file(trained / "out" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, delta in after.items():
        assert 0 < (delta - before[name]).abs().max() <= 7e-4


@pytest.mark.parametrize(("bits", "packing"), [(8, True), pytest.param(4, False, marks=pytest.mark.matrix)])
def test_a_quantised_base_really_is(world, tmp_path, bits, packing):
    config = settings(world, tmp_path, **{f"load_in_{bits}bit": True}, sample_packing=packing, bf16=True)
    if packing:
        # With more processes, each epoch's packing starts as many of them anew.
        config |= {"sequence_len": 32, "micro_batch_size": 1, "dataset_num_proc": 1}
    run = axolotl(tmp_path, "train", **config)
    assert run.returncode == 0, run.stderr[-3000:]
    scores = json.loads((tmp_path / "out" / "beft_scores.json").read_text())
    assert scores["quantization"][f"load_in_{bits}bit"] is True
    assert {delta.dtype for delta in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_a_base_that_stays_in_full_precision_under_load_in_8bit_stops_the_run(world):
    from transformers import AutoModelForCausalLM

    from beft_trl.axolotl import BeftPlugin

    class Settings(dict):
        __getattr__ = dict.get

    model = AutoModelForCausalLM.from_pretrained(world / "base")
    with pytest.raises(RuntimeError, match=r"load_in_8bit.*q_proj.*\bLinear\b"):
        BeftPlugin().post_model_build(Settings(adapter="beft", load_in_8bit=True), model)


def test_axolotl_calls_what_the_plugin_replaces():
    """By these names: under another one the plugin's own would be set, and never called."""
    from axolotl.loaders.model import ModelLoader
    from axolotl.utils import environment

    assert callable(environment.check_cuda_p2p_support)
    assert "check_cuda_p2p_support()" in inspect.getsource(environment.check_cuda_p2p_ib_support)
    assert "self._set_quantization_config()" in inspect.getsource(ModelLoader)


def test_merge_and_inference(world, trained, tmp_path):
    run = axolotl(tmp_path, "merge-beft", "--output", str(tmp_path / "merged"), **settings(world, trained))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Largest difference of a logit" in run.stdout
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    config = settings(world, trained, lora_model_dir=str(trained / "out"))
    run = axolotl(tmp_path, "inference", text="w1 w2 w3\n", **config)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "w1 w2 w3" in run.stdout


@pytest.mark.matrix
def test_evaluation_with_the_adapter(world, trained, tmp_path):
    rows = {"val_set_size": 0.25, "dataset_prepared_path": str(tmp_path / "prepared")}
    losses = {}
    for name, changes in {"base": {"adapter": ...}, "adapter": {"lora_model_dir": str(trained / "out")}}.items():
        if name == "base":
            changes |= {"plugins": ..., "beft_score_steps": ...}
        run = axolotl(tmp_path / name, "evaluate", **settings(world, tmp_path / name, **rows, **changes))
        assert run.returncode == 0, run.stderr[-3000:]
        losses[name] = float(re.findall(r"eval_loss'?: '?([\d.]+)", run.stdout + run.stderr)[-1])
    assert losses["adapter"] < losses["base"]


def test_the_package_without_the_plugin_never_imports_axolotl():
    files = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "beft_trl").rglob("*.py")]
    modules = [".".join(file.with_suffix("").parts) for file in files if file.stem not in ("axolotl", "__main__")]
    if importlib.util.find_spec("optuna") is None:  # an extra of its own, which this environment is made without
        modules = [name for name in modules if ".tun" not in name]
    program = f"import sys, {', '.join(modules)}; assert 'axolotl' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def validate(config):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(config)
    prepare_plugins(config)
    return validate_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters .*adapter: beft"),
        ({"rl": "dpo"}, r"\brl .*adapter: beft"),
        ({"fsdp_config": {"offload_params": True}}, "fsdp_config .*adapter: beft"),
        ({"beft_bias_trem": "value"}, "beft_bias_trem.*beft_bias_term"),
        ({"beft_bias_term": "middle"}, "beft_bias_term"),
        ({"beft_score_steps": 0}, "beft_score_steps"),
        (
            {"adapter": "lora", "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True},
            "beft.* adapter",
        ),
    ],
)
def test_conflicts_and_bad_values_are_refused(world, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        validate(settings(world, tmp_path, **changes))


def test_the_keys_are_typed_and_described_in_the_schema():
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault

    prepare_plugins(DictDefault(plugins=["beft_trl.axolotl.BeftPlugin"]))
    fields = merge_input_args()[1].model_fields
    for name in SETTINGS:
        assert fields[f"beft_{name}"].json_schema_extra["description"]


def test_without_a_length_it_takes_enough_steps_at_relative_rates(world, tmp_path):
    relative = {"beft_relative_learning_rate": 0.05, "beft_bias_layers": [0, 1], "beft_bias_term": "value"}
    config = settings(world, tmp_path, max_steps=..., save_steps=2, **relative)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    with Python(AXOLOTL, "train", tmp_path / "config.yaml", "--launcher", "python", cwd=tmp_path) as run:
        run.until((checkpoint / MANIFEST_FILE).exists)  # which is written last, and says how long the run would be
    steps = json.loads((checkpoint / "trainer_state.json").read_text())["max_steps"]
    assert enough_steps(48) <= steps < enough_steps(48) + 48 / 8
    record = json.loads((checkpoint / "beft_scores.json").read_text())
    assert len(set(record["learning_rates"].values())) == 2 and record["layers"] == [0, 1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_axolotl_takes_the_recipes(recipe):
    config = yaml.safe_load(recipe.read_text())
    assert validate(config).adapter == "beft"
    for key in ("deepspeed",):
        if key in config:
            json.loads((REPOSITORY / config[key]).read_text())
