"""A base with biases of zero is the base, and has room for every query, key and value bias."""

import pytest
import torch
from architectures import build
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM

from beft_trl import MergeError, find_bias_sites
from beft_trl.merge.zero_biases import add_zero_biases


TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_it_answers_as_the_base_does(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    report = add_zero_biases(tmp_path / "base", tmp_path / "biases")
    assert not report.changed and len(report.added) >= 3 * model.config.num_hidden_layers
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "biases", attn_implementation="eager").eval()
    assert all(site.has_bias for site in find_bias_sites(wider))
    assert all(site.has_bias is False for site in find_bias_sites(model))
    with torch.inference_mode():
        assert torch.equal(wider(TOKENS).logits, model(TOKENS).logits)
    assert (tmp_path / "biases" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("name", "why"), [("opt", "biases of its own"), ("gptj", "no configuration switch")])
def test_a_base_that_has_them_or_cannot_is_refused(tmp_path, name, why):
    build(name).save_pretrained(tmp_path / "base")
    with pytest.raises(MergeError, match=why):
        add_zero_biases(tmp_path / "base", tmp_path / "biases")
    assert not (tmp_path / "biases").exists()
