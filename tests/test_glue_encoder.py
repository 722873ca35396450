"""The encoder example as a user starts it, on local files and a tiny BERT."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from processes import python
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, pipeline, set_seed
from trl import TrlParser

from beft_trl import BeftTrainingArguments, merge_adapter


REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "examples" / "glue_encoder.py"
RECIPES = sorted((REPOSITORY / "recipes" / "glue").glob("*.yaml"))


@pytest.fixture
def project(tmp_path):
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    set_seed(0)
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    # A quotation mark that is never closed must not swallow the rows after it.
    rows = [f'w{index} "w{index + 1} w3\t{["no", "yes"][index % 2]}' for index in range(24)]
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    return tmp_path


def run(project, *arguments, launched=()):
    command = [
        *launched, SCRIPT, "--config", str(RECIPES[0]), "--model_name_or_path", "encoder", "--use_cpu", "true",
        "--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--train_rows", "24", *arguments,
    ]  # fmt: skip
    return python(*command, cwd=project, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def test_local_files(project):
    files = ["--train_file", "rows.tsv", "--validation_file", "rows.tsv", "--output_dir", "out"]
    done = run(project, *files)
    assert done.returncode == 0, done.stderr
    assert "bias and the head on 24 rows" in done.stdout
    assert json.loads((project / "out" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}

    control = run(project, *files[:-1], "head", "--head_only", "true")
    assert control.returncode == 0, control.stderr
    assert "Trained only the head on 24 rows" in control.stdout

    merge_adapter(project / "out", project / "merged", base=str(project / "encoder"))
    answer = pipeline("text-classification", model=str(project / "merged"))("w1 w2 w3")[0]
    assert answer["label"] in ("no", "yes")


@pytest.mark.matrix
@pytest.mark.parametrize("engine", ["zero1", "ddp_cpu", "zero2", "zero3"])
def test_two_processes_equal_one(project, engine):
    """Bias, head and loss, on the same global batch."""
    arguments = ["--train_file", "rows.tsv", "--validation_file", "rows.tsv", "--modules_to_save", "pooler"]
    one = run(project, *arguments, "--output_dir", "one")
    assert one.returncode == 0, one.stderr
    config = REPOSITORY / "recipes" / "accelerate_configs" / f"{engine}.yaml"
    launched = [
        "-m", "accelerate.commands.launch", "--config_file", str(config),
        "--num_processes", "2", "--main_process_port", "0",
    ]  # fmt: skip
    two = run(project, *arguments, "--per_device_train_batch_size", "2", "--output_dir", "two", launched=launched)
    assert two.returncode == 0, two.stderr
    assert measured(one) == pytest.approx(measured(two), abs=1.5e-4)  # printed with four digits
    expected, found = (load_file(project / folder / "adapter_model.safetensors") for folder in ("one", "two"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def measured(done) -> list[float]:
    """Loss, accuracy and correlation, as they were printed."""
    line = next(line for line in done.stdout.splitlines() if line.startswith("loss "))
    return [float(part.split()[1]) for part in line.split(", ")]


def test_a_training_file_without_a_validation_file_is_refused(project):
    done = run(project, "--train_file", "rows.tsv", "--output_dir", "out")
    assert done.returncode != 0 and "validation_file together" in done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_strictly(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    from glue_encoder import GlueArguments

    glue, args = TrlParser([GlueArguments, BeftTrainingArguments]).parse_args_and_config(["--config", str(recipe)])
    assert (glue.train_rows, args.learning_rate, args.per_device_train_batch_size) == (1000, 4e-4, 16)
    readme = (recipe.parent / "README.md").read_text()
    line = f"accelerate launch examples/glue_encoder.py --config {recipe.relative_to(REPOSITORY)}"
    assert line in readme and line in recipe.read_text()
