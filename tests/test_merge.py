"""Merged checkpoints: their files, dtypes and logits, read by a process that knows nothing of PEFT or this package."""

import json
import re
import subprocess
import sys

import pytest
import torch
from architectures import EXPECTED, build
from conftest import make_rows, make_tokenizer, of_term, saved
from peft import BeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from beft_trl import MergeError, merge_adapter


TOKENS = torch.arange(2, 14)[None]
# By what rule a value delta goes into each architecture, or why not.
NATIVE, SWITCH, OUTPUT, REFUSED = (
    "added to the model's own biases",
    "=True in the config",
    "output projection",
    "has no bias",
)
RULES = {name: NATIVE for name, expected in EXPECTED.items() if expected[2]} | {
    "gpt_neo": OUTPUT,
    "falcon_new": SWITCH,
    "falcon_multi_query": SWITCH,
    "llama": SWITCH,
    "qwen3": SWITCH,
    "qwen3_moe": SWITCH,
    "gemma": SWITCH,
    "gemma2": SWITCH,
    "gemma3": SWITCH,
    "cohere": SWITCH,
    "cohere2": SWITCH,
    "olmo2": SWITCH,
    "stablelm": SWITCH,
    "smollm3": SWITCH,
    "granite": SWITCH,
    "bamba": SWITCH,
    "deepseek_v3": OUTPUT,
    "llava": SWITCH,
    "qwen3_next": SWITCH,
    **dict.fromkeys(("gptj", "codegen", "mpt", "phi3", "mistral", "mixtral", "lfm2", "jamba"), REFUSED),
}

READER = """
import json, sys, torch, transformers
assert not any(name.split(".")[0] in ("peft", "beft_trl", "trl") for name in sys.modules)
tokens = torch.arange(2, 14)[None]
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    model, info = architecture.from_pretrained(
        folder, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    model.eval()
    report = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    with torch.no_grad():
        report["logits"] = model(input_ids=tokens).logits.float().tolist()
    if model.can_generate():
        generated = model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
        report["generated"] = generated.tolist()
    print(json.dumps(report))
"""


@pytest.mark.parametrize("name", RULES)
def test_a_merged_model_has_the_logits_of_base_and_adapter(name, tmp_path):
    model = build(name)
    sites = of_term(model)
    adapted = saved(model, tmp_path, sites)
    if RULES[name] == REFUSED:
        with pytest.raises(MergeError, match=rf"{type(model).__name__}\b.*{re.escape(sites[0].module)}"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
        return
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert RULES[name] in report.rule
    merged, info = type(model).from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = adapted(input_ids=TOKENS).logits
        logits = merged.eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert report.difference < 1e-5


def test_files_and_what_a_process_without_peft_reads(tmp_path):
    adapted = {}
    for name in ("gpt2", "qwen2", "llama", "gpt_neo", "bert"):
        folder = tmp_path / name
        model = build(name)
        adapted[name] = saved(model, folder, of_term(model))
        base = {path.name for path in (folder / "base").iterdir()}
        before = load_file(folder / "base" / "model.safetensors")
        report = merge_adapter(folder / "adapter", folder / "merged")
        written = {path.name for path in (folder / "merged").iterdir()}
        shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
        assert written == (base - {"model.safetensors"} | shards if report.added else base) | {"README.md"}
        after = {}
        for shard in (folder / "merged").glob("*.safetensors"):
            assert shard.stat().st_mode == (folder / "merged" / "README.md").stat().st_mode
            after |= load_file(shard)
        assert after.keys() - before.keys() == set(report.added)
        assert {key for key in before if not torch.equal(before[key], after[key])} == set(report.changed)
        assert len(report.changed) == (0 if name == "llama" else 2)
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}

    command = [sys.executable, "-c", READER, *(str(tmp_path / name / "merged") for name in adapted)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for (name, model), line in zip(adapted.items(), run.stdout.splitlines()[-len(adapted) :], strict=True):
        found = json.loads(line)
        assert not found["missing_keys"] + found["unexpected_keys"] + found["mismatched_keys"]
        with torch.no_grad():
            expected = model(input_ids=TOKENS).logits
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=tolerance, msg=name)
        if "generated" in found:
            expected = model.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert found["generated"] == expected.tolist()


@pytest.mark.parametrize("term", ["query", "key"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "falcon_new"])
def test_other_terms_merge_too(name, term, tmp_path):
    model = build(name)
    saved(model, tmp_path, of_term(model, term))
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5


def test_a_mistral_without_sliding_window_becomes_a_llama(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    adapted = saved(model, tmp_path, of_term(model, "query"))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert "written as a Llama" in report.rule
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, adapted(TOKENS).logits, rtol=0, atol=1e-5)


def test_an_adapter_of_plain_peft_merges(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, BeftConfig(target_modules=["q_proj", "v_proj"], init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5


def test_an_adapter_of_a_quantised_run_says_how_far_the_full_model_is(make_config, tmp_path):
    pytest.importorskip("bitsandbytes")
    from beft_trl import BeftSFTTrainer

    build("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = BeftSFTTrainer(
        str(tmp_path / "base"),
        make_config(bias_term="value"),
        train_dataset=make_rows(),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert report.difference < 1e-5 < report.quantized_difference < 0.5
    assert f"{report.quantized_difference:.1e}" in (tmp_path / "merged" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


class OddConfig(LlamaConfig):
    model_type = "odd_llama"


class OddForCausalLM(LlamaForCausalLM):
    """The switch that gives its attention biases also changes what its last norm computes."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.variance_epsilon = 0.5 if config.attention_bias else 1e-6


def test_a_merge_that_is_wrong_is_found_and_removed(tmp_path):
    AutoConfig.register("odd_llama", OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
    model = OddForCausalLM(OddConfig(**build("llama").config.to_diff_dict() | {"model_type": "odd_llama"}))
    saved(model, tmp_path, of_term(model))
    with pytest.raises(MergeError, match=r"logits.*\btorch.float32\b"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
