"""A checkpoint for a server has the biases that it reads, and is refused if it would pass over one."""

import json

import pytest
import torch
from architectures import build
from conftest import make_llama
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from beft_trl import MergeError, find_bias_sites, merge_adapter
from beft_trl.cli.main import app
from beft_trl.merge.servers import NAMES, SERVERS
from beft_trl.merge.zero_biases import add_zero_biases
from beft_trl.tuner import attach_deltas, delta


TOKENS = torch.arange(2, 14)[None]


def make_adapter(name, folder, term="value", switched_on=False):
    model = build(name)
    if switched_on:
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "attention_bias": True}))
    model.save_pretrained(folder / "base")
    sites = [site for site in find_bias_sites(model) if site.term == term]
    adapted = attach_deltas(model, sites)
    for site in sites:
        delta(adapted, site).data[0, site.rows] = torch.randn(len(site.rows))
    adapted.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return adapted.eval()(TOKENS).logits


def names_in(folder):
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


@pytest.mark.parametrize("server", ["vllm", "llama.cpp", "sglang", "transformers"])
def test_zeros_that_a_server_does_not_read_are_left_out_and_the_logits_stay(tmp_path, server):
    """Qwen3 with biases: llama.cpp's converter stops at one of its output projection, and vLLM passes over it."""
    expected = make_adapter("qwen3", tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server=server)
    names = names_in(tmp_path / "merged")
    assert all(f"model.layers.{layer}.self_attn.{term}_proj.bias" in names for layer in (0, 1) for term in "qkv")
    read = server in ("sglang", "transformers")
    assert any("o_proj.bias" in name for name in names) == read
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (merged(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


REFUSED = [
    ("vllm", "gemma", {}, "passes over"),
    ("sglang", "granite", {}, "passes over"),
    ("vllm", "qwen3", {"output_projection": True}, "o_proj.bias"),
    ("vllm", "cohere", {}, "not known"),
    ("ollama", "llama", {}, "llama.cpp"),
    ("vlm", "llama", {}, "vllm"),
]


@pytest.mark.parametrize(("server", "name", "options", "said"), REFUSED)
def test_what_a_server_would_pass_over_is_refused_and_nothing_is_written(tmp_path, server, name, options, said):
    make_adapter(name, tmp_path)
    with pytest.raises(MergeError, match=said):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server=server, **options)
    assert not (tmp_path / "merged").exists()


def test_biases_that_a_base_has_by_a_switch_are_looked_at_too(tmp_path):
    """A base that was merged before, for instance."""
    make_adapter("llama", tmp_path, switched_on=True)
    with pytest.raises(MergeError, match="ollama.*llama"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server="ollama")
    make_adapter("granite", tmp_path, switched_on=True)
    with pytest.raises(MergeError, match="passes over"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server="sglang")
    expected = make_adapter("llama", tmp_path, switched_on=True)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server="sglang")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (merged(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("server", NAMES)
def test_biases_that_an_architecture_always_has_are_for_every_server(tmp_path, server):
    make_adapter("opt", tmp_path)
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base", server=server)
    assert report.difference < 1e-5


def test_the_command_takes_a_server_and_says_what_works_instead(tmp_path):
    make_adapter("gemma", tmp_path)
    options = ["merge", "--adapter", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--for", "vllm"]
    ran = CliRunner().invoke(app, [*options, "--output", str(tmp_path / "merged")])
    assert ran.exit_code == 1 and "beft export" in str(ran.exception)


def test_the_page_has_the_table_of_the_code():
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    for name, server in SERVERS.items():
        for model_type, letters in server.reads.items():
            how = "run" if model_type in server.run else "read"
            told = ", ".join(letters) if letters else "none"
            assert f"| {name} | {server.version} | `{model_type}` | {told} | {how} |" in page


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "linear", "factor": 2.0}])
def test_a_configuration_has_the_rotary_base_where_other_readers_look_too(tmp_path, scaling):
    """mlx-lm reads `rope_theta` and `rope_scaling`, which Transformers 5 writes into `rope_parameters` only."""
    rotary = {"rope_theta": 100_000.0, "rope_type": "default"} | scaling
    model = make_llama(rope_parameters=rotary)
    model.save_pretrained(tmp_path / "base")
    add_zero_biases(tmp_path / "base", tmp_path / "zero")
    record = json.loads((tmp_path / "zero" / "config.json").read_text())
    assert record["rope_theta"] == 100_000.0
    assert ("rope_scaling" in record) == bool(scaling) and scaling.items() <= record.get("rope_scaling", {}).items()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "zero").eval()
    assert loaded.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
