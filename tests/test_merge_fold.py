"""A value bias that a merge folds into the bias of the output projection."""

from types import SimpleNamespace

import pytest
import torch
from architectures import build
from conftest import make_llama, of_term, saved
from safetensors.torch import load_file
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from beft_trl import MergeError, merge_adapter
from beft_trl.layout import BiasSite, features, output_projection
from beft_trl.merge import placement


TOKENS = torch.arange(2, 14)[None]


# By what rule a value delta goes into each architecture, or why not.
def test_a_native_value_bias_folds_into_the_output_projection_on_request(tmp_path):
    model = build("opt")
    adapted = saved(model, tmp_path, of_term(model))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True)
    assert [name.split(".")[-2] for name in report.changed] == ["out_proj", "out_proj"]
    merged = type(model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = adapted(TOKENS).logits
        torch.testing.assert_close(merged.eval()(TOKENS).logits, expected, rtol=0, atol=1e-5 * float(expected.max()))
    saved(build("opt"), tmp_path / "query", of_term(build("opt"), "query"))
    with pytest.raises(MergeError, match="OPTForCausalLM.*output_projection"):
        merge_adapter(tmp_path / "query" / "adapter", tmp_path / "other", output_projection=True)


def shifted(model, sites, deltas):
    """Adds a delta to what each projection puts out, as a bias would, without PEFT."""
    for site in sites:
        full = torch.zeros(features(model.get_submodule(site.module))[1])
        full[site.rows] = deltas[site.module]
        model.get_submodule(site.module).register_forward_hook(lambda module, args, output, full=full: output + full)
    return model.eval()


@pytest.mark.parametrize("kind", ["square Conv1D", "square Linear", "wide Linear", "grouped wide Linear"])
def test_an_unverified_fold_has_the_logits_of_shifted_values(kind, tmp_path):
    if kind == "square Conv1D":
        model = build("gpt2")
    elif kind == "square Linear":
        model = build("opt")
    else:
        heads = 2 if "grouped" in kind else 4
        model = make_llama(attention_bias=True, head_dim=16, num_key_value_heads=heads)
    sites = of_term(model)
    output = output_projection(model.get_submodule(sites[0].module.rpartition(".")[0]))[1]
    assert ((features(output)[0] == features(output)[1]) is ("square" in kind)) and output.weight.ndim == 2
    saved(model, tmp_path, sites)
    deltas = {
        name.removeprefix("base_model.model.").removesuffix(".beft_bias"): values[0]
        for name, values in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True, verify=False)
    assert "W_o b_v" in report.rule
    merged = type(model).from_pretrained(tmp_path / "merged")
    base = type(model).from_pretrained(tmp_path / "base")
    values = {site.module: deltas[site.module][site.rows] for site in sites}
    with torch.no_grad():
        expected = shifted(base, sites, values)(TOKENS).logits
        torch.testing.assert_close(merged.eval()(TOKENS).logits, expected, rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("layer", [lambda: Conv1D(10, 6), lambda: torch.nn.Linear(6, 10)], ids=["Conv1D", "Linear"])
def test_a_fold_through_a_layer_that_is_not_square_is_what_the_layer_adds(layer):
    torch.manual_seed(0)
    attention = torch.nn.ModuleDict({"c_attn": Conv1D(18, 10), "c_proj": layer(), "attn_dropout": torch.nn.Dropout()})
    model = torch.nn.ModuleDict({"attn": attention})
    terms = zip(("query", "key", "value"), torch.arange(18).chunk(3), strict=True)
    sites = [BiasSite(0, term, "attn.c_attn", rows, True, None) for term, rows in terms]
    values, delta = torch.randn(3, 6), torch.randn(6)
    checkpoint = SimpleNamespace(tensor=lambda path, name: getattr(model.get_submodule(path), name).detach())
    folded = placement.fold({"attn.c_attn": torch.cat([torch.zeros(12), delta])}, model, sites, checkpoint)
    with torch.no_grad():
        expected = attention["c_proj"](values + delta) - attention["c_proj"](values)
    torch.testing.assert_close(folded["attn.c_proj"].expand(3, -1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss", "bitnet"])
def test_a_value_bias_that_a_gate_a_sink_or_a_norm_follows_is_not_folded(name, tmp_path):
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
    }  # fmt: skip
    model = BitNetForCausalLM(BitNetConfig(**config)) if name == "bitnet" else build(name)
    saved(model, tmp_path, of_term(model))
    with pytest.raises(MergeError, match=f"{type(model).__name__}.*output_projection"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True, verify=False)
    assert not (tmp_path / "merged").exists()
