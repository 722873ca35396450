"""`beft info` of adapters whose names look like markup, and of damaged ones."""

import io
import json
import shutil

import pytest
import torch
from damages import CONFIG, DEEP, DELTA, GARBAGE, SCORES, WEIGHTS, both, edit, link, make_folder, tensors, write
from rich.console import Console

from beft_trl import MergeError
from beft_trl.cli.info import adapter_report


def told(folder):
    """What `beft info` prints of the adapter."""
    output = io.StringIO()
    console = Console(file=output, highlight=False, width=300)
    for part in adapter_report(folder / "adapter"):
        console.print(part)
    return output.getvalue()


LAYER = {"layer": 0, "importance": 0.5, "magnitude": 0.1, "fisher": 0.2}
RECORD = {
    "selected": "value", "method": "beft", "anchor": "bias", "steps": 2, "base_model": "base", "versions": {},
    "terms": {term: {"parameters": 4, "dead": None, "layers": [LAYER]} for term in ("query", "key", "value")},
}  # fmt: skip


def scores(**values):
    return write(SCORES, json.dumps(RECORD | values))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit(CONFIG, base_model_name_or_path="[/b] [red]"), "Base: [/b] [red]."),
        (edit(CONFIG, peft_version="[/b]"), "peft [/b]"),
        (scores(versions={"[/b]": "[bold"}), "[/b] [bold"),
        (scores(base_model="[/b]"), "Bias terms of [/b]"),
        (scores(notes=["[/b] is a note."]), "[/b] is a note."),
        (scores(method=None), "Trains the value bias"),
        (
            both(
                edit(CONFIG, modules_to_save=["[", "lm_head"]),
                tensors(WEIGHTS, **{"base_model.model.lm_head.[/b]": torch.ones(2)}),
            ),
            "lm_head.[/b]",
        ),
        (tensors(WEIGHTS, **{DELTA.replace("self_attn", "[/b]"): torch.zeros(1, 16)}), "model.layers.0.[/b].v_proj"),
    ],
)
def test_names_that_look_like_markup_are_told_as_they_are(change, named, good, tmp_path):
    shutil.copytree(good, tmp_path / "[b]")
    change(tmp_path / "[b]")
    output = "".join(told(tmp_path / "[b]").split())  # a title is broken where its table ends
    assert all("".join(text.split()) in output for text in (named, "Deltas of", "[b]"))


@pytest.mark.parametrize(
    "change",
    [
        *(write(SCORES, text) for text in ("", "{", "[]", "7", GARBAGE, DEEP, "{}")),
        make_folder(SCORES),
        link(SCORES, "../secret"),
        *(
            scores(**values)
            for values in (
                {"selected": 7},
                {"selected": "[/b]"},
                {"selected": ["value"]},
                {"method": "bogus"},
                {"method": 7},
                {"anchor": "sea"},
                {"versions": [1]},
                {"learning_rates": [1]},
                {"learning_rates": {"a": "fast"}},
                {"notes": [7]},
                {"terms": "value"},
                {"terms": {"value": None}},
                {"terms": {"[/b]": RECORD["terms"]["value"]}},
                {"terms": {"value": {"parameters": "many", "dead": None, "layers": [LAYER]}}},
                {"terms": {"value": {"parameters": 4, "dead": None, "layers": [LAYER | {"importance": "high"}]}}},
                {"terms": {"value": {"parameters": 4, "dead": None, "layers": [7]}}},
            )
        ),
    ],
)
def test_damaged_scores_are_one_error_that_names_their_file(change, good, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(ValueError, match="beft_scores.json") as raised:
        told(folder)
    assert raised.type in (ValueError, MergeError)
