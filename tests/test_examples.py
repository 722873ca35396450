"""The examples as a user starts them, on a tiny model with the demo's rows."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from datasets import Dataset
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
    """A fifth for a wrong one of six, so that a guess is worth nothing in the mean."""
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    answers = [" Billing", " Sales\nWhere is", " Billing\n", " Billing team", " I do not know", ""]
    assert example["right_team"](answers, team=["Billing"] * 6) == [1, -0.2, 1, 0, 0, 0]
    assert sum(example["right_team"](example["TEAMS"], team=["Sales"] * 6)) == pytest.approx(0)


def test_no_answer_that_is_to_be_learnt_stands_in_a_prompt_of_the_example():
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    rows = Dataset.from_json(str(EXAMPLES / "data" / "support_train.jsonl"))
    shown, rest = example["split"](rows)
    assert len(shown) == 3 and len(shown) + len(rest) == len(rows) == 126
    for row, given in zip(rest, example["prompts"](rest, shown), strict=True):
        _, *solved, asked = given["prompt"].splitlines()
        assert asked == f"{row['prompt'][-1]['content']} ->" and given["team"] == row["completion"][0]["content"]
        assert [line.partition(" -> ")[2] for line in solved] == [each["completion"][0]["content"] for each in shown]
        assert row["prompt"][-1]["content"] not in "".join(solved)
