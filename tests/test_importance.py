import json
import math

import numpy as np
import pytest
import torch

from beft_trl import BiasScores
from beft_trl.importance import LayerScores, TermScores, fisher, importance, magnitude


def numpy_importance(b1, b0):
    """The projection of the shorter vector on the longer one, by lengths and the angle between them."""
    long, short = max(np.linalg.norm(b1), np.linalg.norm(b0)), min(np.linalg.norm(b1), np.linalg.norm(b0))
    if long == 0:
        return 0.0
    cosine = 0.0 if short == 0 else float(b1 @ b0) / (np.linalg.norm(b1) * np.linalg.norm(b0))
    return 1 - short * cosine / long


@pytest.mark.parametrize("seed", range(20))
def test_importance_is_the_relative_projection_of_the_shorter_vector(seed):
    random = np.random.default_rng(seed)
    b0 = random.normal(size=17) * 10 ** random.uniform(-3, 1)
    b1 = b0 + random.normal(size=17) * 10 ** random.uniform(-3, 1)
    found = importance(torch.tensor(b1), torch.tensor(b0)).item()
    assert found == pytest.approx(numpy_importance(b1, b0), abs=1e-12)
    assert 0 <= found <= 2
    assert found == pytest.approx(importance(torch.tensor(b0), torch.tensor(b1)).item(), abs=1e-15)


@pytest.mark.parametrize(
    ("b1", "b0", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),  # no change
        ([3.0, 4.0], [0.0, 0.0], 1.0),  # from zero, every change is 1
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([6.0, 8.0], [3.0, 4.0], 0.5),  # only magnitude
        ([4.0, -3.0], [3.0, 4.0], 1.0),  # a right angle
        ([-3.0, -4.0], [3.0, 4.0], 2.0),  # beyond a right angle
        ([1e-30, 0.0], [1e-30, 0.0], 0.0),  # squares that underflow in fp32
    ],
)
def test_importance_of_edge_cases(b1, b0, expected):
    assert importance(torch.tensor(b1), torch.tensor(b0)).item() == pytest.approx(expected, abs=1e-12)


def test_a_small_turn_in_fp32_is_resolved():
    b0 = torch.full((576,), 0.3)
    b1 = b0 + torch.tensor([1e-4, -1e-4] * 288)
    expected = numpy_importance(b1.double().numpy(), b0.double().numpy())
    assert expected < 1e-6
    assert importance(b1, b0).item() == pytest.approx(expected, rel=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        importance(torch.zeros(3), torch.zeros(4))


def test_magnitude_and_fisher_against_numpy():
    random = np.random.default_rng(0)
    b0, b1, gradients = random.normal(size=9), random.normal(size=9), random.normal(size=(4, 9))
    assert magnitude(torch.tensor(b1), torch.tensor(b0)).item() == pytest.approx(np.mean(np.abs(b1 - b0)))
    assert fisher(torch.tensor(gradients)).item() == pytest.approx(np.mean(gradients**2))


@pytest.fixture
def scores():
    def term(*values):
        return TermScores(8, layers=[LayerScores(index, *each) for index, each in enumerate(values)])

    return BiasScores(
        selected="value",
        method="beft",
        anchor="bias",
        steps=5,
        base_model="tiny",
        terms={
            "query": term((0.1, 3.0, 0.2), (0.3, 5.0, 0.4)),
            "key": TermScores(8, dead="no positions"),
            "value": term((0.5, 1.0, 0.6), (0.3, 1.0, 0.8)),
        },
    )


def test_a_term_scores_the_mean_of_its_layers_and_each_method_ranks_by_its_own(scores):
    assert scores.terms["query"].score("importance") == pytest.approx(0.2)
    assert scores.terms["value"].score("fisher") == pytest.approx(0.7)
    assert scores.ranking == ["value", "query"]
    assert scores.margin == pytest.approx(2.0)
    assert BiasScores(**{**vars(scores), "method": "magnitude"}).ranking == ["query", "value"]
    assert BiasScores(**{**vars(scores), "method": None}).ranking == []


def test_json_has_the_documented_keys_and_comes_back_equal(scores, tmp_path):
    scores.to_json(tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert set(record) == {
        "selected",
        "ranking",
        "method",
        "anchor",
        "steps",
        "base_model",
        "layers",
        "quantization",
        "notes",
        "versions",
        "learning_rates",
        "terms",
    }
    assert set(record["terms"]["value"]) == {"importance", "magnitude", "fisher", "dead", "parameters", "layers"}
    assert record["terms"]["value"]["layers"][1] == {"layer": 1, "importance": 0.3, "magnitude": 1.0, "fisher": 0.8}
    assert record["terms"]["key"]["importance"] is None and record["terms"]["key"]["dead"] == "no positions"
    assert math.isclose(record["terms"]["value"]["magnitude"], 1.0)
    assert BiasScores.from_json(tmp_path / "scores.json") == scores


GOOD = {"selected": "value", "method": None, "anchor": None, "steps": 0, "base_model": "m"}
TERM = {"parameters": 4, "dead": None, "layers": []}
WRONG = [
    {"selected": "output"}, {"selected": "key"}, {"selected": 7}, {"method": "best"}, {"anchor": "mean"},
    {"steps": "two"}, {"base_model": 7}, {"terms": {"output": TERM}}, {"terms": {"value": TERM | {"parameters": "4"}}},
    {"terms": {"value": TERM | {"layers": [{"layer": 0, "importance": "x", "magnitude": 1, "fisher": 1}]}}},
]  # fmt: skip


def test_the_good_record_is_read(tmp_path):
    (tmp_path / "beft_scores.json").write_text(json.dumps({**GOOD, "terms": {"value": TERM}}))
    assert BiasScores.from_json(tmp_path / "beft_scores.json").selected == "value"


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "[" * 100_000, '{"selected": "value"}', '{"terms": {"value": 3}}'),
        *(json.dumps({**GOOD, "terms": {"value": TERM}, **wrong}) for wrong in WRONG),
    ],
)
def test_a_damaged_file_is_named(content, tmp_path):
    path = tmp_path / "beft_scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="beft_scores.json"):
        BiasScores.from_json(path)
