import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_tokenizer
from datasets import Dataset
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from beft_trl import BeftDPOConfig, BeftGRPOConfig, BeftSFTConfig
from beft_trl.cli.bases import refuse_missing_model
from beft_trl.cli.recipe import BeftScriptArguments, held_out_rows, load_rows, parse_recipe
from beft_trl.cli.run import load_data


REPOSITORY = Path(__file__).parents[1]
LAUNCH_CONFIGS = sorted((REPOSITORY / "recipes" / "accelerate_configs").glob("*.yaml"))
AXOLOTL_RECIPES = (REPOSITORY / "recipes" / "axolotl").glob("*.yaml")  # held against Axolotl in test_axolotl.py
GLUE_RECIPES = (REPOSITORY / "recipes" / "glue").glob("*.yaml")  # test_glue_encoder.py
OTHERS = {*LAUNCH_CONFIGS, *AXOLOTL_RECIPES, *GLUE_RECIPES}
CONFIGS = {"dpo.yaml": BeftDPOConfig, "grpo.yaml": BeftGRPOConfig}
RECIPES = sorted(set((REPOSITORY / "recipes").rglob("*.yaml")) - OTHERS)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_shipped_recipe_parses_strictly(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    # bf16 is refused on a device without it, unless that is a CPU on purpose.
    config = CONFIGS.get(recipe.name, BeftSFTConfig)
    script_args, training_args, model_args, dataset_args = parse_recipe(
        ["--config", str(recipe), "--use_cpu", "true"], config
    )
    assert training_args.output_dir.startswith("outputs/")
    assert training_args.model_init_kwargs["dtype"] == model_args.dtype
    if script_args.train_file:
        rows = load_rows(script_args, dataset_args, chat=True)
        assert held_out_rows(rows, script_args, training_args).num_rows > 0


@pytest.mark.parametrize("config", LAUNCH_CONFIGS, ids=lambda path: path.name)
def test_every_launch_configuration_is_read_by_accelerate_without_unknown_keys(config):
    loaded = load_config_from_file(str(config))
    assert loaded.num_processes >= 1
    assert f"recipes/accelerate_configs/{config.name}" in config.read_text()
    known = {"zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag"}
    known |= {"zero3_save_16bit_model", "deepspeed_multinode_launcher"}
    assert set(getattr(loaded, "deepspeed_config", None) or {}) <= known


def test_every_recipe_has_its_launch_line_in_its_readme():
    for recipe in RECIPES:
        if recipe.parent.name == "recipes":
            continue
        readme = (recipe.parent / "README.md").read_text()
        lines = [line for line in readme.splitlines() if str(recipe.relative_to(REPOSITORY)) in line]
        assert len(lines) == 1
        assert lines[0] in recipe.read_text()
        for path in re.findall(r"(?:recipes|examples)/\S+", lines[0]):
            assert (REPOSITORY / path).is_file()


def test_the_command_line_overrides_the_recipe():
    recipe = str(REPOSITORY / "recipes" / "opt-125m" / "beft.yaml")
    _, training_args, _, _ = parse_recipe(["--config", recipe, "--learning_rate", "1e-4", "--bias_term", "value"])
    assert (training_args.learning_rate, training_args.bias_term) == (1e-4, "value")


def write(path, text):
    path.write_text(text)
    return ["--config", str(path)]


def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path):
    recipe = write(tmp_path / "r.yaml", "model_name_or_path: x\nbias_trem: value\noutput_dir: out\n")
    with pytest.raises(ValueError, match=r"bias_trem \(did you mean bias_term\?\).*zzz\b"):
        parse_recipe([*recipe, "--zzz", "1"])


def test_values_out_of_range_in_yaml_are_refused(tmp_path):
    with pytest.raises(ValueError, match="bias_term='valeu'.*value"):
        parse_recipe(write(tmp_path / "r.yaml", "model_name_or_path: x\nbias_term: valeu\noutput_dir: out\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("use_peft: true", "use_peft=True"), ("seed: 1", "^model_name_or_path")],
)
def test_recipes_that_cannot_run(tmp_path, line, message):
    model = "" if "model_name" in message else "model_name_or_path: x\n"
    with pytest.raises(ValueError, match=message):
        parse_recipe(write(tmp_path / "r.yaml", f"{model}{line}\noutput_dir: out\n"))


def load(chat=False, datasets=(), **settings):
    return load_rows(BeftScriptArguments(**settings), DatasetMixtureConfig(datasets=list(datasets)), chat)


ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
]


def test_alpaca_rows_are_turns_for_a_template_that_the_recipe_names(tmp_path):
    """The base has no template. Rows as plain text would not be given to the template that the recipe names."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "rows.json").write_text(json.dumps(ALPACA))
    recipe = f"model_name_or_path: {tmp_path}\ntrain_file: {tmp_path}/rows.json\nuse_cpu: true\n"
    for line, kind in (("", str), (f"chat_template_path: {tmp_path}/chat.jinja\n", list)):
        data = load_data(parse_recipe(write(tmp_path / "r.yaml", recipe + line)))
        assert isinstance(data.train[0]["prompt"], kind)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_local_files_of_every_kind_with_alpaca_columns(tmp_path, suffix):
    import pandas

    frame = pandas.DataFrame(ALPACA)
    path = tmp_path / f"rows.{suffix}"
    {
        "json": lambda: frame.to_json(path, orient="records"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    rows = load(train_file=str(path), test_file=str(path))
    assert set(rows) == {"train", "test"}
    assert rows["test"][0] == {"prompt": "Name a colour.\n\nAnswer:", "completion": " Red."}
    assert rows["train"][1]["prompt"] == "Add.\n\n1 and 2\n\nAnswer:"
    assert load(train_file=str(path), chat=True)["train"][1] == {
        "prompt": [{"role": "user", "content": "Add.\n\n1 and 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }


def test_other_formats_pass_through(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    assert load(train_file=str(path))["train"][0] == {"text": "w1 w2"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "train_file.*dataset_name.*none"),
        ({"train_file": "a.json", "dataset_name": "b"}, ValueError, "train_file and dataset_name"),
        ({"test_file": "a.json"}, ValueError, "train_file.*dataset_name"),
        ({"train_file": "absent.json"}, FileNotFoundError, "absent.json"),
        ({"train_file": __file__}, ValueError, "test_recipe.py.*jsonl"),
    ],
)
def test_datasets_that_cannot_be_loaded(settings, error, message):
    with pytest.raises(error, match=message):
        load(**settings)


def test_train_and_test_file_may_be_of_two_kinds(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "rows.csv").write_text("text\nw2\n")
    rows = load(train_file=str(tmp_path / "rows.jsonl"), test_file=str(tmp_path / "rows.csv"))
    assert (rows["train"]["text"][:], rows["test"]["text"][:]) == (["w1"], ["w2"])


@pytest.mark.parametrize("split", ["test", "train"])
def test_local_files_keep_their_parts_whatever_the_splits_are_called(tmp_path, split):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    rows = load(
        train_file=str(tmp_path / "train.jsonl"), test_file=str(tmp_path / "test.jsonl"), dataset_train_split=split
    )
    assert rows["train"][0] == {"text": "train"} and rows["test"][0] == {"text": "test"}


OF_ANOTHER_WAY = [
    ({"train_file": "rows.jsonl"}, {"test_split_size": 0.1}, "datasets"),
    ({"train_file": "rows.jsonl"}, {"streaming": True}, "datasets"),
    ({"train_file": "rows.jsonl"}, {"dataset_streaming": True}, "dataset_name"),
    ({"dataset_name": "data"}, {"test_file": "rows.jsonl"}, "train_file"),
    ({"dataset_name": "data"}, {"test_split_size": 0.1}, "datasets"),
    ({}, {"test_file": "rows.jsonl"}, "train_file"),
    ({}, {"dataset_config": "main"}, "dataset_name"),
]


@pytest.mark.parametrize(("rows", "setting", "way"), OF_ANOTHER_WAY)
def test_a_setting_of_another_way_to_give_rows_is_refused(tmp_path, monkeypatch, rows, setting, way):
    """It would have no effect: no held-out rows, or others than those that were given."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for file in ("rows.jsonl", "data/train.jsonl"):
        Path(file).write_text('{"text": "w1"}\n' * 20)
    names = DatasetMixtureConfig.__dataclass_fields__
    mixture = {name: value for name, value in setting.items() if name in names}
    if not rows:
        mixture["datasets"] = [DatasetConfig(path="json", data_files="rows.jsonl")]
    script = {**rows, **{name: value for name, value in setting.items() if name not in names}}
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* only with {way}"):
        load_rows(BeftScriptArguments(**script), DatasetMixtureConfig(**mixture), chat=False)


MISREAD = {
    "a key twice": ("seed: 1\nlearning_rate: 1e-3\nseed: 2\n", "in lines 2 and 4"),
    "a nested key twice": ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "a stands twice"),
    "a word that YAML takes for false": ("save_strategy: no\n", 'write "no" in quotes'),
    "settings of LoRA": ("lora_r: 32\n", "lora_r "),
    "settings of LoRA that are its defaults": ("lora_alpha: 32\nlora_r: 16\n", "lora_r, lora_alpha"),
    "datasets as Axolotl has them": ("datasets: [{path: a.jsonl, type: alpaca}]\n", "'type': 'alpaca'"),
    "datasets of names": ("datasets: [a.jsonl]\n", "'a.jsonl'"),
    "two dtypes": ("dtype: float32\nmodel_init_kwargs: {dtype: bfloat16}\n", "dtype='float32' and dtype='bfloat16'"),
    "a nested dtype that is none": ("model_init_kwargs: {dtype: float33}\n", "dtype='float33'"),
    "a path of nothing": ("output_dir: ''\n", "output_dir=''"),
    "a path that no system has": ('output_dir: "a\\0b"\n', "output_dir='a\\x00b'"),
    "a rate of nothing": ("learning_rate: 0\n", "learning_rate=0"),
    "two names of dtype": ("dtype: float32\ntorch_dtype: bfloat16\n", "give dtype only"),
    "a dtype that is none": ("dtype: float33\n", "dtype='float33'"),
    "a packing that is none": ("packing_strategy: bogus\n", "packing_strategy='bogus'"),
    "two quantisations": (
        "load_in_8bit: true\nmodel_init_kwargs: {quantization_config: {load_in_4bit: true}}\n",
        "quantization_config of model_init_kwargs",
    ),
    "answers below zero": ("answers: -1\n", "answers=-1"),
}


@pytest.mark.parametrize("kind", MISREAD)
def test_a_recipe_that_would_be_read_otherwise_than_it_is_written_is_refused(tmp_path, kind):
    text, fact = MISREAD[kind]
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: m\n{text}use_cpu: true\nbf16: false\n")
    with pytest.raises(ValueError, match=re.escape(fact)):
        parse_recipe(["--config", str(tmp_path / "recipe.yaml")])


def test_a_command_line_may_name_the_dtype_by_its_old_name(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model_name_or_path: m\ndtype: float32\nuse_cpu: true\nbf16: false\n")
    for option in (["--torch_dtype", "bfloat16"], ["--torch_dtype=bfloat16"]):
        recipe = parse_recipe(["--config", str(tmp_path / "recipe.yaml"), *option])
        assert recipe.training.model_init_kwargs["dtype"] == "bfloat16"


def test_old_names_numbers_in_mappings_and_the_home_folder_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: ~/base\ntorch_dtype: bfloat16\nuse_cpu: true\nbf16: false\ntrain_file: ~/rows.jsonl\n"
        "lr_scheduler_kwargs: {min_lr_rate: 1e-1}\noutput_dir: ~/out\n"
    )
    recipe = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert recipe.base_model == f"{tmp_path}/base" and recipe.script.train_file == f"{tmp_path}/rows.jsonl"
    assert recipe.training.output_dir == f"{tmp_path}/out"
    assert recipe.training.model_init_kwargs["dtype"] == "bfloat16"
    assert recipe.training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_the_demo_before_its_model_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m beft_trl.demo"):
        refuse_missing_model("models/SmolLM2-135M-Instruct")
    with pytest.raises(FileNotFoundError, match="'./absent'"):
        refuse_missing_model("./absent")
    with pytest.raises(FileNotFoundError, match="config.json"):
        refuse_missing_model(str(tmp_path))
    with pytest.raises(OSError, match="'nobody/nothing'"):
        refuse_missing_model("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("blank", [{"output": ""}, {"output": None}, {"instruction": " "}])
def test_a_blank_cell_of_an_alpaca_row_is_named(tmp_path, blank, streaming):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ALPACA, ALPACA[0] | blank]))
    with pytest.raises(ValueError, match=f"Row 3 of the split train: '{next(iter(blank))}'"):
        list(load(dataset_name=str(tmp_path), dataset_streaming=streaming)["train"])
    with pytest.raises(ValueError, match=rf"Row 3 of .*train.jsonl: '{next(iter(blank))}'"):
        load(train_file=str(file))


def test_answers_need_prompts(make_config):
    rows = {"train": [], "test": Dataset.from_list([{"messages": [{"role": "user", "content": "w1"}]}])}
    with pytest.raises(ValueError, match="answers=4"):
        held_out_rows(rows, BeftScriptArguments(answers=4), make_config())


def test_evaluation_needs_held_out_rows(make_config):
    script_args = BeftScriptArguments()
    assert held_out_rows({"train": []}, script_args, make_config()) is None
    for settings in ({"eval_strategy": "epoch"}, {"eval_on_start": True}):
        with pytest.raises(ValueError, match="eval_strategy=.*eval_on_start=.*test_file"):
            held_out_rows({"train": []}, script_args, make_config(**settings))
