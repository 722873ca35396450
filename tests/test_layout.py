import re

import pytest
import torch
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from peft import BeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    CodeGenConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
)

from beft_trl import UnsupportedLayoutError, find_bias_sites
from beft_trl.layout import sites_of_term


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}

# config, key dead, query and value sizes, native biases of query, key and value
SEPARATE = {
    "gptj": (GPTJConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4), False, 32, 32, False),
    "gpt_neo": (
        GPTNeoConfig(**{**SIZES, "num_layers": 2, "num_heads": 4}, attention_types=[[["global", "local"], 1]]),
        True,
        32,
        32,
        False,
    ),
    "phi": (PhiConfig(**SIZES), False, 32, 32, True),
    "mistral": (MistralConfig(**GROUPED), False, 32, 16, False),
    "qwen2": (Qwen2Config(**{**SIZES, "num_key_value_heads": 2}), False, 32, 16, True),
    "qwen3": (Qwen3Config(**GROUPED), False, 32, 16, False),
    "gemma": (GemmaConfig(**GROUPED), False, 32, 16, False),
}
ENCODERS = {"bert": BertConfig(**SIZES), "roberta": RobertaConfig(**SIZES)}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_opt_sites():
    sites = find_bias_sites(make_opt())
    assert [(site.layer, site.term) for site in sites] == [
        (layer, term) for layer in (0, 1) for term in ("query", "key", "value")
    ]
    assert sites[2].module == "model.decoder.layers.0.self_attn.v_proj"
    assert all(site.has_bias and torch.equal(site.rows, torch.arange(32)) for site in sites)
    assert ["rotary" in (site.dead or "") for site in sites] == [False, True, False] * 2


def test_llama_sites_have_grouped_query_sizes_and_no_biases():
    sites = find_bias_sites(make_llama())
    assert [len(site.rows) for site in sites] == [32, 16, 16] * 2
    assert not any(site.has_bias or site.dead for site in sites)


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_projections_are_found_by_structure(name):
    config, key_dead, query, value, has_bias = SEPARATE[name]
    model = build(config)
    sites = find_bias_sites(model)
    assert [(site.layer, site.term) for site in sites] == [
        (layer, term) for layer in (0, 1) for term in ("query", "key", "value")
    ]
    for site in sites:
        projection = model.get_submodule(site.module)
        assert len(site.rows) == projection.weight.shape[0] == (query if site.term == "query" else value)
        assert site.has_bias == has_bias == (projection.bias is not None)
        assert (site.dead is not None) == (key_dead and site.term == "key")


@pytest.mark.parametrize("name", [*SEPARATE, "opt", "llama"])
def test_a_dead_key_has_no_gradient_and_a_live_one_has(name):
    """The structure's word against an actual gradient, relative to the value's."""
    model = {"opt": make_opt, "llama": make_llama}[name]() if name in ("opt", "llama") else build(SEPARATE[name][0])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    sites = find_bias_sites(model)
    model = get_peft_model(model.double(), BeftConfig(target_modules=[site.module for site in sites]))
    model.double()
    tokens = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradient = dict.fromkeys(("query", "key", "value"), 0.0)
    for site in sites:
        norm = model.get_base_model().get_submodule(site.module).beft_bias["default"].grad.norm().item()
        gradient[site.term] = max(gradient[site.term], norm)
    dead = any(site.dead for site in sites if site.term == "key")
    # Rounding leaves 1e-7 of the value's gradient in GPT-Neo, which computes its attention scores in fp32.
    assert (gradient["key"] < 1e-6 * gradient["value"]) == dead
    assert gradient["query"] > 1e-4 * gradient["value"]


def test_layers_without_positions_have_a_dead_key():
    sites = find_bias_sites(build(SmolLM3Config(**GROUPED, no_rope_layers=[1, 0])))
    keys = [site for site in sites if site.term == "key"]
    assert keys[0].dead is None and "rotary" in keys[1].dead
    assert [site.layer for site in sites_of_term(sites, "key")] == [0]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    model = AutoModelForSequenceClassification.from_config(ENCODERS[name])
    sites = find_bias_sites(model)
    assert len(sites) == 6 and all(site.has_bias for site in sites)
    assert sites[3].module.endswith("encoder.layer.1.attention.self.query")
    assert [site.term for site in sites if site.dead] == ["key", "key"]


def test_meta_device_and_peft_wrapping_give_the_same_sites():
    expected = [(site.module, len(site.rows), site.has_bias, site.dead) for site in find_bias_sites(make_llama())]
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(make_llama().config)
    wrapped = get_peft_model(make_llama(), BeftConfig(target_modules=["q_proj", "v_proj"]))
    for model in (bare, wrapped):
        assert [(site.module, len(site.rows), site.has_bias, site.dead) for site in find_bias_sites(model)] == expected


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4), "transformer.h.0.attn.c_attn"),
        (BloomConfig(**SIZES, n_layer=2, n_head=4), "transformer.h.0.self_attention.query_key_value"),
        (CodeGenConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "transformer.h.0.attn.qkv_proj"),
    ],
)
def test_a_fused_projection_is_refused_by_name(config, layer):
    with pytest.raises(UnsupportedLayoutError, match=re.escape(layer)):
        find_bias_sites(build(config))


def test_a_model_without_attention_is_refused():
    model = build(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8))
    with pytest.raises(UnsupportedLayoutError, match="MambaForCausalLM has no attention layer"):
        find_bias_sites(model)


def test_an_explicit_dead_term_is_refused_and_left_out_of_all():
    sites = find_bias_sites(make_opt())
    with pytest.raises(ValueError, match="bias_term='key' has no effect.*Use 'query', 'value' or 'auto'"):
        sites_of_term(sites, "key")
    assert {site.term for site in sites_of_term(sites, "all")} == {"query", "value"}
    assert {site.term for site in sites_of_term(sites, "value")} == {"value"}


def test_rows_and_tokenizer_of_the_test_suite_fit():
    tokens = make_tokenizer()(make_rows()["prompt"][0])["input_ids"]
    assert min(tokens) > 2
