import io
import re

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from beft_trl import BiasScores
from beft_trl.importance import LayerScores, TermScores
from beft_trl.report import heat_map, model_card, scores_table


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


def test_the_heat_map_is_a_picture_of_terms_by_layers(scores):
    with Image.open(io.BytesIO(heat_map(scores))) as image:
        assert image.format == "PNG" and image.width > image.height > 100
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50


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


def test_a_local_base_model_is_not_given_to_the_hub(scores, tmp_path):
    local = BiasScores(**{**vars(scores), "base_model": str(tmp_path), "layers": []})  # as earlier versions wrote it
    card = model_card(local, 48, 9600)
    assert f"The value bias of every attention layer of `{tmp_path}`" in str(card)
    assert card.data.base_model is None
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}")' in str(card)
