import re

import pytest
import torch
from architectures import DECODERS, EXPECTED, build
from conftest import make_opt, make_rows, make_tokenizer
from peft import BeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, T5Config, T5ForConditionalGeneration

from beft_trl import UnsupportedLayoutError, find_bias_sites, layout
from beft_trl.layout import TERMS, features, sites_of_term
from beft_trl.tuner import attach_deltas, delta


LENGTH, POSITION = 6, 3
# Their attention computes its scores in fp32 even where the model is in float64.
SCORES_IN_FP32 = {"gpt_neo", "bloom"}


def tokens(batch=2, length=12):
    return torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(0))


def test_opt_sites():
    sites = find_bias_sites(make_opt())
    assert [(site.layer, site.term) for site in sites] == [(layer, term) for layer in (0, 1) for term in TERMS]
    assert sites[2].module == "model.decoder.layers.0.self_attn.v_proj"
    assert all(site.has_bias and torch.equal(site.rows, torch.arange(32)) for site in sites)
    assert ["rotary" in (site.dead or "") for site in sites] == [False, True, False] * 2


@pytest.mark.parametrize("name", EXPECTED)
def test_sizes_biases_dead_keys_and_left_out_layers(name):
    model = build(name)
    sites = find_bias_sites(model)
    query, value, has_bias, key_dead, left_out = EXPECTED[name]
    layers = model.config.get_text_config().num_hidden_layers
    assert sites.left_out == left_out
    assert len(sites) == 3 * (layers - left_out)
    assert [len(site.rows) for site in sites[:3]] == [query, value, value]
    assert {site.has_bias for site in sites} == {has_bias}
    assert (sites[1].dead is not None) == key_dead
    assert not any(site.dead for site in sites if site.term != "key")
    assert not any("vision" in site.module for site in sites)


def terms_by_perturbation(model, path):
    """For each output feature of the projection at `path`, which term it is, found out by disturbing it.

    One copy of the sequence for each feature, whose output at one token is disturbed. A query acts only on its own
    token, and not at all on the first, which sees itself only; a value acts on later tokens in proportion to the
    disturbance, since it leaves the probabilities as they are; a key does so out of proportion.
    """
    projection, attention = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    size = features(projection)[1]
    sequence = tokens(1, LENGTH).expand(size + 1, -1)

    def outputs(step, position):
        seen = {}

        def disturb(module, args, output):
            if output.numel() == (size + 1) * LENGTH * size:
                each = output.clone().view(size + 1, LENGTH, size)
                each[torch.arange(size), position, torch.arange(size)] += step
                return each.view_as(output)
            return None  # DeBERTa also projects its position embeddings

        def keep(module, args, output):
            seen["output"] = output[0] if isinstance(output, tuple) else output

        handles = [projection.register_forward_hook(disturb), attention.register_forward_hook(keep)]
        with torch.no_grad():
            model(input_ids=sequence)
        for handle in handles:
            handle.remove()
        output = seen["output"].reshape(size + 1, LENGTH, -1)
        return output[:-1] - output[-1:]

    single, double, first = outputs(0.5, POSITION), outputs(1.0, POSITION), outputs(0.5, 0)
    others = [token for token in range(LENGTH) if token != POSITION]
    norm = single.abs().amax()
    terms = []
    for feature in range(size):
        reach = single[feature, others].abs().amax() / norm
        excess = (double[feature] - 2 * single[feature]).abs().amax() / single[feature].abs().amax()
        if reach > 1e-7:
            terms.append("value" if excess < 1e-4 else "key")
        else:
            terms.append("query" if single[feature].any() else "nothing")
    # What acts on the first token and on no other is no query: the output gate of Qwen3-Next. With sinks, or where
    # attention goes both ways, a query does act there.
    if not hasattr(attention, "sinks") and model.can_generate():
        for feature in range(size):
            if terms[feature] == "query" and first[feature].abs().amax() > 1e-7 * norm:
                terms[feature] = "gate"
    return terms


def expected_rows(model, sites):
    """What the sites say and what the perturbation finds, for every projection of the first and last layer."""
    for path in dict.fromkeys(site.module for site in (*sites[:3], *sites[-3:])):
        found = terms_by_perturbation(model, path)
        for site in sites:
            if site.module == path:
                rows = [row for row, term in enumerate(found) if term == site.term]
                yield site, site.rows.tolist(), rows


@pytest.mark.parametrize("name", EXPECTED)
def test_every_row_acts_as_its_term(name):
    model = build(name).double()
    sites = find_bias_sites(model)
    for site, said, found in expected_rows(model, sites):
        assert said == found, (site.module, site.term)


@pytest.mark.parametrize(("name", "wrong"), [("bloom", "blocked"), ("gpt2", "grouped"), ("codegen", "blocked")])
def test_a_wrong_order_of_fused_rows_is_seen(name, wrong, monkeypatch):
    """The test above can fail: the shapes of a wrong order are right."""
    model = build(name).double()
    attention = next(
        type(module).__name__ for module in model.modules() if type(module).__name__ in layout._FUSED_ORDER
    )
    monkeypatch.setitem(layout._FUSED_ORDER, attention, wrong)
    if wrong == "grouped":
        assert type(model.get_submodule("transformer.h.0.attn").head_dim) is int
    assert any(said != found for _, said, found in expected_rows(model, find_bias_sites(model)))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_random_delta_gives_the_logits_of_an_independent_computation(name):
    """The adapter against hooks that add to the features that the perturbation of the first layer finds."""
    plain = build(name).double()
    sites = [site for site in find_bias_sites(plain) if site.layer == find_bias_sites(plain)[0].layer]
    inputs = tokens(2, 8)
    before = plain(input_ids=inputs).logits
    found = {path: terms_by_perturbation(plain, path) for path in {site.module for site in sites}}
    for site in sites:
        rows = [row for row, term in enumerate(found[site.module]) if term == site.term]
        vector = torch.zeros(len(found[site.module]), dtype=torch.float64)
        vector[rows] = torch.randn(len(rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        hook = plain.get_submodule(site.module).register_forward_hook(lambda m, a, output, v=vector: output + v)
        with torch.no_grad():
            expected = plain(input_ids=inputs).logits
        hook.remove()

        model = attach_deltas(build(name).double(), [site]).double()
        with torch.no_grad():
            values = torch.randn(len(site.rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            delta(model, site)[0, site.rows] = values
            logits = model(input_ids=inputs).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if name in SCORES_IN_FP32 else 1e-9)
        moved = (logits - before).abs().amax() > 1e-4 * before.abs().amax()
        assert moved == (site.dead is None), site.term


# The structure cannot tell that the last layer of Cohere-2 has no positions: the gradient does, in the scoring pass.
UNSEEN = {("cohere2", 3)}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_dead_key_has_no_gradient_and_a_live_one_has(name):
    """The structure's word against an actual gradient, relative to the value's, in every layer."""
    model = build(name).double()
    sites = find_bias_sites(model)
    model = attach_deltas(model, sites).double()
    model(input_ids=tokens(4)).logits.square().mean().backward()
    gradients = {site: delta(model, site).grad.flatten()[site.rows].norm().item() for site in sites}
    for query, key, value in zip(sites[::3], sites[1::3], sites[2::3], strict=True):
        # Rounding leaves 1e-7 where attention scores are computed in fp32 whatever the model is.
        dead = gradients[key] < 1e-6 * gradients[value]
        assert dead == (key.dead is not None or (name, key.layer) in UNSEEN), key.layer
        assert gradients[query] > 1e-5 * gradients[value]


def test_the_sites_print_as_a_table():
    text = str(find_bias_sites(build("bloom")))
    assert "transformer.h.1.self_attention.query_key_value" in text
    assert re.search(r"0 +│ key +│ \S+ +│ 8:16 of every 24 +│ 32 +│ its own +│ dead: its softmax", text)
    text = str(find_bias_sites(build("lfm2")))
    assert re.search(r"1 +│ value +│ \S+ +│ 0:16 +│ 16 +│ added +│ alive", text)
    assert "1 layers without query, key and value projections are left out." in text


def test_meta_device_and_peft_wrapping_give_the_same_sites():
    def summary(model):
        return [(site.module, site.rows.tolist(), site.has_bias, site.dead) for site in find_bias_sites(model)]

    for name, target in (("llama", ["q_proj", "v_proj"]), ("gpt_neox", ["query_key_value"])):
        expected = summary(build(name))
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(DECODERS[name])
        assert summary(bare) == expected
        assert summary(get_peft_model(build(name), BeftConfig(target_modules=target))) == expected


class UnknownAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(32, 96), nn.Linear(32, 32)


def test_a_fused_projection_of_unknown_order_is_refused_by_name():
    with pytest.raises(UnsupportedLayoutError, match=r"0\.qkv_proj, 2\b"):
        find_bias_sites(nn.Sequential(UnknownAttention(), UnknownAttention()))


class DoubledAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, 64), nn.Linear(32, 32)
        self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)


def test_a_query_projection_that_gives_something_else_too_is_refused():
    with pytest.raises(UnsupportedLayoutError, match="q_proj.*DoubledAttention"):
        find_bias_sites(DoubledAttention())


def test_a_model_without_attention_and_one_with_cross_attention_are_refused():
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    )
    with pytest.raises(UnsupportedLayoutError, match="MambaForCausalLM.*q_proj"):
        find_bias_sites(model)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedLayoutError, match="T5ForConditionalGeneration.*cross-attention"):
        find_bias_sites(T5ForConditionalGeneration(config))


def test_an_explicit_dead_term_is_refused_and_left_out_of_all():
    sites = find_bias_sites(make_opt())
    with pytest.raises(ValueError, match="bias_term='key'.*'query', 'value' or 'auto'"):
        sites_of_term(sites, "key")
    assert {site.term for site in sites_of_term(sites, "all")} == {"query", "value"}
    assert {site.term for site in sites_of_term(sites, "value")} == {"value"}


def test_rows_and_tokenizer_of_the_test_suite_fit():
    tokens = make_tokenizer()(make_rows()["prompt"][0])["input_ids"]
    assert min(tokens) > 2
