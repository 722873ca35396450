"""Every engine and precision through the user's own launch line, against one process on the same global batch.

CI runs a few cells. All of them, 59 tests in about 20 minutes on two cores: pytest -m "matrix or not matrix"
tests/test_distributed.py
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architectures import build
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from peft import BeftConfig, get_peft_model
from processes import python
from safetensors.torch import load_file

from beft_trl.engines import ENGINES, PRECISIONS


pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

REPOSITORY = Path(__file__).parents[1]
MODELS = {
    "opt": make_opt,
    "llama": lambda: make_llama(hidden_size=64, intermediate_size=128, tie_word_embeddings=True),
    "bloom": lambda: build("bloom"),  # one fused matrix for query, key and value
}
FLAGS = {
    "fp32": ["--dtype", "float32", "--bf16", "false"],
    "bf16": ["--dtype", "bfloat16", "--bf16", "true"],
    "8bit": ["--dtype", "float32", "--bf16", "false", "--load_in_8bit"],
    "4bit": ["--dtype", "float32", "--bf16", "false", "--load_in_4bit", "--bnb_4bit_quant_storage", "float32"],
}
STORAGE = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "8bit": "torch.int8", "4bit": "torch.float32"}
RECIPE = {
    "max_steps": 4,
    "bias_layers": "all",
    "score_steps": 2,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 2,
    "disable_tqdm": True,
}


@dataclass
class Result:
    output: Path
    notes: list[dict]

    @property
    def losses(self):
        state = json.loads((self.output / "checkpoint-4" / "trainer_state.json").read_text())
        return torch.tensor([entry["loss"] for entry in state["log_history"] if "loss" in entry])

    @property
    def deltas(self):
        return load_file(self.output / "adapter_model.safetensors")


def launch(folder, model, engine, precision, *overrides, recipe=None, launch_config=None, launched=()):
    """One cell through the launch line of its recipe; the global batch is 8 rows whatever the engine.

    A single process, which the cells are compared with, needs no launcher.
    """
    folder.mkdir(parents=True, exist_ok=True)
    MODELS[model]().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    make_rows(48).to_json(folder / "rows.jsonl")
    relative = any("relative_learning_rate" in text for text in (*overrides, *(recipe or {})))
    settings = {
        **RECIPE,
        **({} if relative else {"learning_rate": 3e-3}),
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8 if engine == "single" else 4,
        **(recipe or {}),
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML
    command = [REPOSITORY / "tests" / "witness.py", folder, "--config", folder / "recipe.yaml", *FLAGS[precision]]
    if engine == "single":
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return python(*command, "--use_cpu", "true", *overrides, cwd=folder, env=environment)
    name = {"ddp": "ddp_cpu"}.get(engine, engine)
    config = launch_config or REPOSITORY / "recipes" / "accelerate_configs" / f"{name}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", *launched]
    return python(*launcher, *command, *overrides, cwd=folder)


def finished(folder, *args, **kwargs) -> Result:
    run = launch(folder, *args, **kwargs)
    assert run.returncode == 0, run.stderr[-3000:]
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return Result(folder / "out", notes)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A function that gives the single-process run of a model and precision, run once."""
    runs = {}

    def run(model, precision, *overrides, recipe=None) -> Result:
        key = (model, precision, str(recipe))
        if key not in runs:
            folder = tmp_path_factory.mktemp(f"{model}-{precision}")
            runs[key] = finished(folder, model, "single", precision, *overrides, recipe=recipe)
        return runs[key]

    return run


FUSED = {("bloom", engine, precision) for engine in ("zero2", "zero3") for precision in ("fp32", "8bit")}
IN_CI = {("llama", "zero3", "8bit")}
CELLS = [
    pytest.param(*cell, marks=[] if cell in IN_CI else pytest.mark.matrix)
    for cell in (*itertools.product(("opt", "llama"), list(ENGINES)[1:], PRECISIONS), *sorted(FUSED))
]


@pytest.mark.matrix
@pytest.mark.parametrize("bias_term", ["value", "auto"])
def test_an_evaluation_before_the_run_leaves_the_processes_together(reference, tmp_path, bias_term):
    """accelerate marks the model as prepared when it evaluates, and would then leave DDP out of the run."""
    recipe = {"bias_term": bias_term, "test_file": str(tmp_path / "cell" / "rows.jsonl")}
    expected = reference("llama", "fp32", recipe={"bias_term": bias_term})
    found = finished(tmp_path / "cell", "llama", "ddp", "fp32", recipe=recipe)
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta, expected.deltas[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(engine, marks=pytest.mark.matrix) for engine in ("zero1", "zero2", "zero3"))]
)
def test_every_process_keeps_what_the_frozen_layers_give(reference, tmp_path, engine):
    """Two rows, one for each process in each step, so that every process soon knows both; ZeRO-3 keeps none."""
    few = tmp_path / "few.jsonl"
    make_rows(2).to_json(few)
    recipe = {
        "train_file": str(few), "bias_term": "value", "bias_layers": "upper", "max_steps": 12, "save_steps": 4,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    expected = reference(
        "llama", "fp32", recipe=recipe | {"per_device_train_batch_size": 2, "cache_frozen_layers": False}
    )
    found = finished(tmp_path / "cell", "llama", engine, "fp32", recipe=recipe)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=1e-4)
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta, expected.deltas[name], rtol=0, atol=1e-4, msg=name)
    for notes in (*found.notes, *expected.notes):
        skipped = notes["skipped_frozen_layers"]
        assert skipped >= 4 if notes in found.notes and engine != "zero3" else skipped is None


@pytest.mark.parametrize(("model", "engine", "precision"), CELLS)
def test_a_cell_equals_the_single_process(reference, tmp_path, model, engine, precision):
    expected = reference(model, precision)
    found = finished(tmp_path / "cell", model, engine, precision)

    assert len(found.notes) == 2
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=tolerance)
    assert found.deltas.keys() == expected.deltas.keys()
    for name, delta in found.deltas.items():
        assert delta.dtype == torch.float32
        assert delta.any()
        torch.testing.assert_close(delta, expected.deltas[name], rtol=0, atol=tolerance, msg=name)
        if model == "bloom":  # query, key and value of each head in turn: two thirds of the vector stay out of it
            assert (delta == 0).sum() >= 64
    for notes in found.notes:
        assert notes["selected"] == expected.notes[0]["selected"]
        assert notes["scores"] == found.notes[0]["scores"]
        assert notes["scores"]["ranking"] == expected.notes[0]["scores"]["ranking"]
        assert notes["base_before"] == notes["base_after"]
        assert notes["optimizer_dtypes"] == ["torch.float32"]
        assert notes["weight_dtypes"] == [STORAGE[precision]]
        if precision in ("8bit", "4bit"):
            assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[precision] in notes["layers"]
        share = notes["elements_held"] / notes["elements"]
        print(f"{model} {engine} {precision}: {notes['elements_held']} of {notes['elements']} elements here")
        assert share == pytest.approx(0.5 if engine.startswith("zero3") else 1.0, rel=0.01)

    checkpoint = found.output / "checkpoint-4"
    kept = [path for path in checkpoint.rglob("*") if path.is_file() and "tokenizer" not in path.name]
    assert sum(path.stat().st_size for path in kept) < 400_000
    for states in checkpoint.rglob("*model_states.pt"):
        saved = torch.load(states, weights_only=False)["module"]
        assert saved
        assert all("beft_bias" in name for name in saved)


def test_an_8bit_base_starts_within_one_percent_of_the_full_one(reference):
    full, quantised = reference("llama", "fp32").losses[0], reference("llama", "8bit").losses[0]
    assert abs(quantised / full - 1) < 0.01
    assert quantised != full


OPTIONS = {
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True, "max_length": 32, "per_device_train_batch_size": 1},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    "relative": {"relative_learning_rate": 0.03},
}


@pytest.mark.parametrize(
    ("engine", "recipe"),
    [
        pytest.param(
            engine,
            recipe,
            id=f"{engine}-{name}",
            marks=[] if (engine, name) == ("zero3", "checkpointing") else pytest.mark.matrix,
        )
        for engine in ("ddp", "zero2", "zero3")
        for name, recipe in OPTIONS.items()
    ],
)
def test_training_options_on_every_kind_of_engine(reference, tmp_path, engine, recipe):
    single = {**recipe}
    if "per_device_train_batch_size" in recipe:
        single["per_device_train_batch_size"] = 2 * recipe["per_device_train_batch_size"]
    expected = reference("llama", "fp32", recipe=single)
    found = finished(tmp_path / "cell", "llama", engine, "fp32", recipe=recipe)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=1e-4)
    for name, delta in found.deltas.items():
        torch.testing.assert_close(delta, expected.deltas[name], rtol=0, atol=1e-4, msg=name)


DEEPSPEED_FILE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}


def own_optimizer(folder) -> Path:
    """A launch configuration with a file of DeepSpeed that has an optimizer and a schedule of its own."""
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED_FILE))
    settings = {"deepspeed_config_file": str(folder / "ds.json")}
    launch_config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": 2}
    (folder / "launch.yaml").write_text(json.dumps({**launch_config, "deepspeed_config": settings}))
    return folder / "launch.yaml"


def test_a_deepspeed_file_with_an_optimizer_and_a_schedule_of_its_own_does_not_bend_the_scores(reference, tmp_path):
    """WarmupDecayLR would keep a scoring pass of two steps at a learning rate of zero."""
    found = finished(tmp_path / "cell", "llama", "zero2", "fp32", launch_config=own_optimizer(tmp_path))
    scores, expected = found.notes[0]["scores"], reference("llama", "fp32").notes[0]["scores"]
    assert scores["ranking"] == expected["ranking"]
    for term in expected["ranking"]:
        for score in ("importance", "magnitude", "fisher"):
            assert scores["terms"][term][score] == pytest.approx(expected["terms"][term][score], rel=1e-3)


@pytest.mark.matrix
def test_a_relative_learning_rate_is_refused_with_an_optimizer_of_deepspeed(tmp_path):
    run = launch(
        tmp_path / "cell", "llama", "zero2", "fp32", "--relative_learning_rate", "0.03",
        launch_config=own_optimizer(tmp_path),
    )  # fmt: skip
    assert run.returncode != 0
    assert "DeepSpeed's own optimizer" in " ".join(run.stderr.split())


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.matrix)])
def test_resume_under_deepspeed_ends_where_the_whole_run_does(tmp_path, engine):
    """In bf16, as on a GPU: the deltas are in 16 bits in the engine, and its fp32 copies of them have to come back."""
    relative = ("--relative_learning_rate", "0.03")  # so that there are groups of parameters to put back
    whole = finished(tmp_path / "cell", "llama", engine, "bf16", *relative)
    expected = whole.deltas
    for name in ("adapter_model.safetensors", "adapter_config.json", "beft_scores.json"):
        (whole.output / name).unlink()
    for path in sorted((whole.output / "checkpoint-4").rglob("*.pt"))[:1]:
        path.write_bytes(path.read_bytes()[:100])  # damaged: passed over for checkpoint-2
    run = launch(tmp_path / "cell", "llama", engine, "bf16", "--resume_from_checkpoint", "true", *relative)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "passed over" in run.stderr
    for name, delta in load_file(whole.output / "adapter_model.safetensors").items():
        assert torch.equal(delta, expected[name])
    other = launch(tmp_path / "cell", "llama", "single", "bf16", "--resume_from_checkpoint", "true", *relative)
    assert other.returncode != 0
    assert f"was written by {engine} on 2 process(es), and this run is single on 1" in other.stderr


GOES_ON = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import make_llama, make_rows, make_tokenizer
from peft import PeftModel
from beft_trl import BeftSFTConfig, BeftSFTTrainer
from beft_trl.cli.run import leave

model = PeftModel.from_pretrained(make_llama().to(torch.bfloat16), sys.argv[2], autocast_adapter_dtype=True)
config = BeftSFTConfig(
    sys.argv[3], max_steps=1, learning_rate=1e-9, bias_layers="all", bf16=True, per_device_train_batch_size=2,
    gradient_checkpointing=False, report_to="none", save_strategy="no",
)
trainer = BeftSFTTrainer(model, config, train_dataset=make_rows(16), processing_class=make_tokenizer())
trainer.train()
trainer.save_model()
leave(trainer)
"""


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.matrix)])
def test_an_adapter_that_is_trained_further_begins_unrounded_in_16_bits(tmp_path, engine):
    """The engine's fp32 copies are made from 16 bits, in which these numbers are off by up to 1e-3."""
    torch.manual_seed(0)
    model = get_peft_model(make_llama(), BeftConfig(target_modules=["v_proj"]))
    for name, values in model.named_parameters():
        if ".beft_bias." in name:
            values.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "goes_on.py").write_text(GOES_ON)
    launcher = ["--config_file", REPOSITORY / "recipes" / "accelerate_configs" / f"{engine}.yaml"]
    launcher += ["--main_process_port", "0", tmp_path / "goes_on.py"]
    given = [REPOSITORY / "tests", tmp_path / "adapter", tmp_path / "out"]
    run = python("-m", "accelerate.commands.launch", *launcher, *given, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, values in after.items():
        torch.testing.assert_close(values, before[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("precision", "overrides", "message"),
    [
        ("bf16", ["--bf16", "false"], "dtype=bfloat16 with bf16=False under ZeRO-3"),
        pytest.param(
            "4bit",
            ["--bnb_4bit_quant_storage", "uint8"],
            "4-bit weights stored as uint8 under ZeRO-3",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_a_cell_that_misses_its_condition_is_refused_before_weights_are_loaded(
    tmp_path, precision, overrides, message
):
    run = launch(tmp_path / "cell", "llama", "zero3", precision, *overrides, launched=("--num_processes", "1"))
    assert run.returncode != 0
    assert message in run.stderr
    assert "Loading weights" not in run.stderr
