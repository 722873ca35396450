"""GGUF files by llama.cpp's own converter: found or asked for, and with the adapter's biases in the file.

    LLAMA_CPP=llama.cpp pytest tests/test_gguf.py

runs the converter of a clone, which CI does not have.
"""

import importlib.machinery
import importlib.util
import os

import pytest
import torch
from conftest import make_llama, make_rows, saved
from safetensors.torch import load_file
from typer.testing import CliRunner

from beft_trl import MergeError, export_lora, find_bias_sites, merge_adapter
from beft_trl.cli.main import app
from beft_trl.merge.gguf import LORA_SCRIPT, MODEL_SCRIPT


TEXTS = [(row["prompt"], row["completion"]) for row in make_rows(60, seed=3)]
real = pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="no llama.cpp: its folder goes into LLAMA_CPP")


@pytest.fixture
def adapter(tmp_path):
    """An adapter of query, key and value, whose rotary rows llama.cpp has in another order than Transformers."""
    model = make_llama()
    saved(model, tmp_path, find_bias_sites(model))
    return tmp_path / "adapter"


@pytest.fixture
def writes(tmp_path, monkeypatch):
    """A function that puts two scripts of the converter's names into a folder, and installs `sentencepiece` or not."""

    def make(script, sentencepiece=True):
        found = importlib.machinery.ModuleSpec("sentencepiece", None) if sentencepiece else None
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "sentencepiece" else find(name))
        folder = tmp_path / "llama.cpp"
        folder.mkdir(exist_ok=True)
        for name in (MODEL_SCRIPT, LORA_SCRIPT):
            (folder / name).write_text(script)
        return folder

    return make


def refused(match, function, adapter, **options):
    output = adapter.parent / "output"
    with pytest.raises(MergeError, match=match):
        if function is export_lora:
            export_lora(adapter, output, adapter.parent / "base", TEXTS, adapter.parent / "vectors.safetensors",
                        force=True, file_format="gguf", **options)  # fmt: skip
        else:
            merge_adapter(adapter, output, adapter.parent / "base", server="llama.cpp", gguf=True, **options)
    assert not output.exists()


@pytest.mark.parametrize("function", [export_lora, merge_adapter])
def test_without_a_converter_it_says_what_to_get(adapter, tmp_path, monkeypatch, writes, function):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    refused("git clone .*ggml-org/llama.cpp.*--llama-cpp", function, adapter)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    refused(f"{tmp_path} has no {MODEL_SCRIPT}", function, adapter)
    refused("pip install sentencepiece", function, adapter, llama_cpp=writes("", sentencepiece=False))


@pytest.mark.parametrize("function", [export_lora, merge_adapter])
@pytest.mark.parametrize(
    ("script", "match"),
    [("raise NotImplementedError('of no such model')", "of no such model"), ("", "exit code 0")],
)
def test_a_converter_that_fails_leaves_nothing_and_its_last_words(adapter, writes, function, script, match):
    refused(match, function, adapter, llama_cpp=writes(script))


def test_a_gguf_is_for_llama_cpp_only(adapter, tmp_path):
    with pytest.raises(MergeError, match=r"for vllm: give --for llama\.cpp"):
        merge_adapter(adapter, tmp_path / "output", server="vllm", gguf=True)
    with pytest.raises(ValueError, match="'ggml' is not known: give one of lora, gguf"):
        export_lora(adapter, tmp_path / "output", file_format="ggml")


def interleaved(rows, heads):
    """llama.cpp turns neighbours, Transformers the two halves of a head: the rows of a query or key in its order."""
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()


def tensors_of(file):
    reader = pytest.importorskip("gguf").GGUFReader(file)
    return {tensor.name: torch.tensor(tensor.data.copy()).squeeze() for tensor in reader.tensors}


def assert_biases(tensors, adapter, name_of):
    config = make_llama().config
    deltas = load_file(adapter / "adapter_model.safetensors")
    assert len(deltas) == 3 * config.num_hidden_layers
    for path, values in deltas.items():
        layer, kind = path.split("layers.")[1].split(".")[0], path.split("self_attn.")[1][0]
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(kind)
        expected = interleaved(values.squeeze(), heads) if heads else values.squeeze()
        torch.testing.assert_close(tensors[name_of(layer, kind)], expected, rtol=0, atol=0)


@real
def test_the_gguf_of_a_lora_has_the_biases_as_b(adapter, tmp_path):
    options = ["--rows", str(tmp_path / "rows.jsonl"), "--vectors", str(tmp_path / "v.safetensors"), "--force"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{a}", "completion": "{b}"}}\n' for a, b in TEXTS))
    done = CliRunner().invoke(
        app, ["export", str(adapter), "--output", str(tmp_path / "lora"), "--base", str(tmp_path / "base"),
              "--format", "gguf", *options], catch_exceptions=False,
    )  # fmt: skip
    assert "llama-server -m BASE.gguf --lora" in done.output
    tensors = tensors_of(tmp_path / "lora" / "adapter_model.gguf")
    assert_biases(tensors, adapter, lambda layer, kind: f"blk.{layer}.attn_{kind}.weight.lora_b")
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path, values in lora.items():
        if "lora_A" in path:
            layer, kind = path.split("layers.")[1].split(".")[0], path.split("self_attn.")[1][0]
            torch.testing.assert_close(tensors[f"blk.{layer}.attn_{kind}.weight.lora_a"], values[0], rtol=0, atol=0)


@real
def test_the_gguf_of_a_merged_model_has_the_biases(adapter, tmp_path):
    """The tests' own tokenizer is none that the converter knows: the base gets one of sentencepiece next to it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with (tmp_path / "base" / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([prompt for prompt, _ in TEXTS]), model_writer=file, vocab_size=24, minloglevel=2
        )
    report = merge_adapter(adapter, tmp_path / "merged", tmp_path / "base", server="llama.cpp", gguf=True)
    assert_biases(tensors_of(report.gguf), adapter, lambda layer, kind: f"blk.{layer}.attn_{kind}.bias")
