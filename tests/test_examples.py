"""The examples as a user starts them, on a tiny model with the demo's rows."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's folder as the current one, with the recipes of this page and a tiny model."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_llama(max_position_embeddings=1024).save_pretrained("models/SmolLM2-135M-Instruct")
    tokenizer.save_pretrained("models/SmolLM2-135M-Instruct")
    shutil.copytree(EXAMPLES.parent / "recipes" / "rl", "recipes/rl")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--use_cpu", "true", *arguments])
        runpy.run_path(str(EXAMPLES / script))["main"]()

    return run


def test_the_demo_is_overridden_by_the_command_line(demo):
    rates = []
    for folder, given in (("default", []), ("double", ["--relative_learning_rate", "0.1"])):
        short = ["--max_steps", "2", "--answers", "0"]
        demo("sft_opt.py", *short, "--bias_term=key", "--output_dir", folder, *given)
        record = json.loads(Path(folder, "beft_scores.json").read_text())
        assert record["selected"] == "key"
        rates.append(record["learning_rates"])
    assert rates[1] == pytest.approx({path: 2 * rate for path, rate in rates[0].items()})


def test_the_example_of_preferences(demo, capsys):
    demo("dpo.py", "--max_steps", "2", "--score_steps", "1")
    assert "the right team is the likeliest of six for 0." in capsys.readouterr().out
    assert load_file("outputs/dpo/adapter_model.safetensors")


def test_the_example_of_rewards_says_if_they_teach_nothing(demo):
    """The tiny model knows no word that is a team's name."""
    with pytest.raises(RuntimeError, match="num_generations"):
        demo("grpo.py", "--max_steps", "2", "--per_device_train_batch_size", "4", "--num_generations", "2")


def test_the_rewards_of_the_example():
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    answers = ["Billing", "Sales", " Billing ", "Billing!!!!!!!", "Billing or Sales", "I do not know"]
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert example["names_a_team"](completions) == pytest.approx([0.3, 0.3, 0.3, 0.15, 0, 0])
    assert example["names_the_right_team"](completions, team=["Billing"] * 6) == pytest.approx([1, 0, 1, 0.5, 0, 0])
