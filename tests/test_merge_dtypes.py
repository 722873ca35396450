"""Merges of files in other dtypes than fp32, and of several."""

import copy
import json

import pytest
import torch
from architectures import build
from conftest import of_term, saved
from safetensors.torch import load_file, save_file

from beft_trl import merge_adapter
from beft_trl.tuner import delta


TOKENS = torch.arange(2, 14)[None]


# By what rule a value delta goes into each architecture, or why not.
def test_a_sum_is_made_in_fp32_and_kept_in_the_dtype_of_the_checkpoint(tmp_path):
    model = copy.deepcopy(build("qwen2")).bfloat16()  # with its configuration, which all models of a name share
    sites = of_term(model)
    adapted = saved(model, tmp_path, sites)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for site in sites:
        name = f"{site.module}.bias"
        expected = before[name].float() + delta(adapted, site)[0].detach()
        assert torch.equal(after[name], expected.bfloat16())
    assert 0 < report.difference < 1e-1


def rewrite(file, dtype_of):
    """Puts every tensor of a file in the dtype that a function of its name gives."""
    tensors = {name: values.to(dtype_of(name)) for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


# By default every dtype of the weights under a configuration that names none, and every one of it over bf16 weights.
DTYPES = [
    pytest.param(weights, said, marks=[] if said is None or weights == torch.bfloat16 else pytest.mark.matrix)
    for weights in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for said in (None, "float32", "bfloat16", "float16", "float64")
]


@pytest.mark.parametrize(("weights", "config_dtype"), DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neo"])
def test_files_of_mixed_dtypes_merge(name, weights, config_dtype, tmp_path):
    """Norms and embeddings in fp32, projections in another dtype, and a configuration that says a third."""
    model = copy.deepcopy(build(name))
    adapted = saved(model, tmp_path, of_term(model))
    base = tmp_path / "base"
    other = (("norm", "ln_", "embed", "wte"), torch.float32)
    rewrite(base / "model.safetensors", lambda name: other[1] if any(part in name for part in other[0]) else weights)
    config = json.loads((base / "config.json").read_text()) | {"dtype": config_dtype}
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    # Rounding of the base itself included: the logits are those of a model in fp32.
    merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager").eval()
    rounding = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(weights, 1e-5)
    with torch.no_grad():
        expected, logits = adapted(TOKENS).logits, merged(TOKENS).logits
    assert (logits - expected).abs().max() <= rounding * expected.abs().max()
    assert report.difference is not None


def test_a_new_bias_is_as_precise_as_the_model_that_is_loaded(tmp_path):
    """Of a bf16 file that is loaded in fp32, a bias in bf16 would be off by a thousandth."""
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    rewrite(tmp_path / "base" / "model.safetensors", lambda name: torch.bfloat16)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report.difference < 1e-5
    file = max((tmp_path / "merged").glob("*.safetensors"))
    assert {values.dtype for values in load_file(file).values()} == {torch.float32}


def test_shards_of_different_dtypes_merge(tmp_path):
    model = build("qwen2")
    saved(model, tmp_path, of_term(model))
    (tmp_path / "base" / "model.safetensors").unlink()
    build("qwen2").save_pretrained(tmp_path / "base", max_shard_size="10KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    for number, shard in enumerate(shards):
        rewrite(shard, lambda name, number=number: (torch.float32, torch.bfloat16)[number % 2])
    assert len(shards) > 2
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for shard in shards:
        before, after = load_file(shard), load_file(tmp_path / "merged" / shard.name)
        assert {name: values.dtype for name, values in before.items()} == {
            name: values.dtype for name, values in after.items()
        }
    assert len(report.changed) == 2
