import io
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from beft_trl import BiasScores
from beft_trl.importance import LayerScores, TermScores
from beft_trl.report import heat_map, learning_curve, model_card, scores_table


@pytest.fixture
def scores():
    def term(scale, parameters):
        return TermScores(parameters, layers=[LayerScores(layer, scale, scale / 2, scale / 4) for layer in range(3)])

    terms = {"query": term(2e-4, 96), "key": TermScores(48, dead="no positions"), "value": term(8e-4, 48)}
    return BiasScores("value", "beft", "activation", 5, "facebook/opt-125m", terms, layers=[0, 1, 2])


def render(scores):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(scores_table(scores, 48, 9600))
    return capture.get()


def test_the_table_shows_scores_choice_margin_dead_terms_and_share(scores):
    text = render(scores)
    assert re.search(r"value +│ +8.00e-04 │ +4.00e-04 │ 2.00e-04 │ +3 │ +48 │ trained", text)
    assert re.search(r"query +│ +2.00e-04 ", text) and re.search(r"key +│ +│ +│ +│ +│ +48 │ dead", text)
    flat = " ".join(text.split())
    assert "first by importance after 5 steps" in flat and "4 times the second" in flat
    assert "48 trainable of 9,600 parameters (0.5000%)" in flat and "The key bias is dead: no positions." in flat
    assert text.index("value") < text.index("query")  # best first


def test_a_given_term_is_not_said_to_be_scored(scores):
    given = BiasScores("query", None, None, 0, "m", {"query": TermScores(96), "value": TermScores(48)})
    text = " ".join(render(given).split())
    assert "Selected: the query bias, as asked, without scoring." in text and "first by" not in text


FRAME, GREY, TRAINING, HELD_OUT = (255, 0, 0), (224, 224, 224), (31, 119, 180), (255, 127, 14)


def pixels(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG" and image.width > image.height > 100
        return np.asarray(image.convert("RGB"))


def columns(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((picture == colour).all(2).any(0))


def runs(numbers: np.ndarray) -> int:
    return int((np.diff(numbers) > 1).sum()) + 1


def test_the_heat_map_frames_what_is_trained_and_greys_what_was_not_scored():
    """Six layers, the upper four are scored and five has no live value bias: the frame is that of three and four."""
    terms = {
        name: TermScores(8, layers=[LayerScores(layer, score, score, score) for layer in layers])
        for name, score, layers in (("query", 1e-5, (2, 3, 4, 5)), ("value", 1e-3, (2, 3, 4)))
    }
    picture = pixels(heat_map(BiasScores("value", "beft", "bias", 5, "", terms, layers=[2, 3, 4, 5])))
    middle = (picture == GREY).all(2)
    height = np.flatnonzero(middle.sum(1) > 50)
    value, query = (picture[height[0] + len(height) * part // 20] for part in (3, 11))
    grey = [np.flatnonzero((row == GREY).all(1)) for row in (value, query)]
    assert [runs(each) for each in grey] == [2, 1]  # layers 0 and 1, and 5 of the value bias
    layer = np.ptp(grey[1]) / 2
    frame = np.flatnonzero((value == FRAME).all(1))
    assert runs(frame) == 2 and np.ptp(frame) == pytest.approx(3 * layer, rel=0.05)
    assert not (query == FRAME).all(1).any()


def test_the_heat_map_shows_the_learning_rate_of_each_layer(scores):
    plain, rates = pixels(heat_map(scores)), pixels(heat_map(scores, {0: 0.1, 1: 0.3, 2: 0.2}))
    below = rates[rates.shape[0] // 2 :]
    below = below[:, : columns(rates, FRAME)[-1]]
    line = {x: np.flatnonzero((below[:, x] == FRAME).all(1)).min() for x in columns(below, FRAME)}
    assert rates.shape[0] > plain.shape[0]
    left, right = min(line), max(line)
    top = min(line, key=line.get)
    assert left < top < right and line[top] < line[right] < line[left]


def test_a_learning_curve_needs_two_training_losses():
    held_out = [{"eval_loss": 2.0, "step": step} for step in (1, 2)]
    assert learning_curve([]) is None
    assert learning_curve([{"loss": 1.0, "step": 1}, *held_out, {"train_loss": 1.0, "step": 2}]) is None
    assert learning_curve([{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}]) is not None


def test_the_learning_curve_shows_held_out_loss_and_accuracy_where_they_were_logged():
    training = [{"loss": 4.0 - step, "step": step} for step in (1, 2, 3)]
    losses = [{"eval_loss": 4.5 - step, "step": step} for step in (2, 3)]
    accuracies = [{**entry, "eval_mean_token_accuracy": 0.5} for entry in losses]
    plain, held_out, both = (pixels(learning_curve(training + more)) for more in ([], losses, accuracies))
    assert len(columns(plain, TRAINING)) and not len(columns(plain, HELD_OUT))
    # From step 2 on, half of the width of the training loss. The end of the legend's line may lie beyond it.
    assert columns(held_out, HELD_OUT)[0] == pytest.approx(columns(held_out, TRAINING)[[0, -1]].mean(), abs=20)
    assert both.shape[0] > held_out.shape[0] and both.shape[1] == held_out.shape[1]


@pytest.mark.parametrize(("last", "straight"), [(1e-3, True), (0.9e-2, True), (1.1e-2, False)])
def test_the_loss_is_logarithmic_beyond_two_decades(last, straight):
    """A loss that falls by the same factor at each step is a straight line only on a logarithmic axis."""
    history = [{"loss": last ** (step / 10), "step": step} for step in range(11)]
    picture = pixels(learning_curve(history))
    line = (picture == TRAINING).all(2)
    across = columns(picture, TRAINING)
    left, middle, right = across[0], (across[0] + across[-1]) // 2, across[-1]
    top, centre, bottom = (np.flatnonzero(line[:, x]).max() for x in (left + 3, middle, right - 3))
    assert ((centre - top) / (bottom - top) == pytest.approx(0.5, abs=0.05)) == straight


def test_a_heat_map_of_zeros_is_drawn():
    terms = {"value": TermScores(4, layers=[LayerScores(0, 0.0, 0.0, 0.0)])}
    assert heat_map(BiasScores("value", "fisher", "bias", 1, "", terms)).startswith(b"\x89PNG")


PATTERN = r"""---
base_model: facebook/opt-125m
library_name: peft
pipeline_tag: text-generation
tags:
- beft
- trl
---

# support

The value bias of the attention layers 0-2 of `facebook/opt-125m`, fine-tuned with BEFT\. The base model is frozen: .*

Selected: the value bias of layers 0-2, first by importance after 5 steps, .* 48 trainable of 9,600 parameters .*

\| term \| importance .*
\| value \| 8\.00e-04 \| 4\.00e-04 \| 2\.00e-04 \| 3 \| 48 \| trained \|
.*
!\[.*\]\(beft_scores\.png\)

## How to load it
.*PeftModel\.from_pretrained\(.*
## Citation
"""


def test_the_model_card(scores, tmp_path):
    card = model_card(scores, 48, 9600, model_name="support", tags=["trl"])
    assert re.match(PATTERN, str(card), flags=re.DOTALL)
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name) == ("facebook/opt-125m", "peft")


def test_the_card_shows_a_learning_curve_only_if_there_is_one(scores):
    assert "(beft_curve.png)" in str(model_card(scores, 48, 9600, curve=True))
    assert "(beft_curve.png)" not in str(model_card(scores, 48, 9600))


def test_a_local_base_model_is_not_given_to_the_hub(scores, tmp_path):
    local = BiasScores(**{**vars(scores), "base_model": str(tmp_path), "layers": []})  # as earlier versions wrote it
    card = model_card(local, 48, 9600)
    assert f"The value bias of every attention layer of `{tmp_path}`" in str(card)
    assert card.data.base_model is None
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}")' in str(card)
