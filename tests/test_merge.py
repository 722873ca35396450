"""Merged checkpoints: their files, dtypes and logits, read by a process that knows nothing of PEFT or this package."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from architectures import EXPECTED, build
from conftest import make_rows, make_tokenizer
from peft import BeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from beft_trl import MergeError, find_bias_sites, merge_adapter, placement
from beft_trl.tuner import attach_deltas, delta


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


def saved(model, folder, sites, seed=0):
    """Base and adapter folders of a model with random deltas at the sites, and the model with its deltas."""
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = attach_deltas(model, sites).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites:
            delta(adapted, site)[0, site.rows] = torch.randn(len(site.rows), generator=generator) * 0.3
    adapted.save_pretrained(folder / "adapter")
    return adapted


def of_term(model, term="value"):
    return [site for site in find_bias_sites(model) if site.term == term]


@pytest.mark.parametrize("name", RULES)
def test_a_merged_model_has_the_logits_of_base_and_adapter(name, tmp_path):
    model = build(name)
    adapted = saved(model, tmp_path, of_term(model))
    if RULES[name] == REFUSED:
        with pytest.raises(MergeError, match=f"{type(model).__name__} has no bias where.*Keep the adapter"):
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


def test_a_sum_is_made_in_fp32_and_kept_in_the_dtype_of_the_checkpoint(tmp_path):
    model = build("qwen2").bfloat16()
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
    with pytest.raises(MergeError, match="cannot become an output-projection bias in OPTForCausalLM"):
        merge_adapter(tmp_path / "query" / "adapter", tmp_path / "other", output_projection=True)


def test_an_adapter_of_plain_peft_merges(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, BeftConfig(target_modules=["q_proj", "v_proj"], init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged").difference < 1e-5


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_sharded_checkpoint_and_hard_links(name, tmp_path):
    model = build(name)
    saved(model, tmp_path, of_term(model))
    model = build(name)
    (tmp_path / "base" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 2
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", link=True)
    assert report.difference < 1e-5
    links = [path for path in (tmp_path / "merged").glob("*.safetensors") if path.stat().st_nlink == 2]
    assert links and len(links) <= len(shards)
    for shard in shards:  # what is linked is what did not change
        assert shard.stat().st_size > 0
    base = type(model).from_pretrained(tmp_path / "base")
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), build(name).parameters(), strict=True))


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


def damage(kind, folder):
    adapter = folder / "adapter" / "adapter_model.safetensors"
    config = folder / "adapter" / "adapter_config.json"
    weights = folder / "base" / "model.safetensors"
    if kind == "truncated":
        adapter.write_bytes(adapter.read_bytes()[:200])
    elif kind == "not finite":
        tensors = load_file(adapter)
        next(iter(tensors.values()))[0, 3] = float("nan")
        save_file(tensors, adapter)
    elif kind == "LoRA":
        config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder / "base")}))
    elif kind == "no adapter":
        config.unlink()
    elif kind == "no base":
        config.write_text(config.read_text().replace(str(folder / "base"), "nobody/nothing"))
    elif kind == "other layers":
        save_file({key.replace("layers.1.", "layers.7."): value for key, value in load_file(adapter).items()}, adapter)
    elif kind == "other sizes":
        save_file({key: torch.cat([value, value], 1) for key, value in load_file(adapter).items()}, adapter)
    elif kind == "no safetensors":
        weights.unlink()
    elif kind == "quantised base":
        settings = json.loads((folder / "base" / "config.json").read_text())
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True).to_dict()
        (folder / "base" / "config.json").write_text(json.dumps(settings))
    elif kind == "shard missing":
        weights.unlink()
        build("llama").save_pretrained(folder / "base", max_shard_size="20KB")
        min((folder / "base").glob("model-*.safetensors")).unlink()
    elif kind == "other names":
        save_file({f"transformer.{key}": values for key, values in load_file(weights).items()}, weights)
    elif kind == "tensor missing":
        save_file({key: value for key, value in load_file(weights).items() if key != "model.norm.weight"}, weights)
    elif kind == "output not empty":
        (folder / "merged").mkdir()
        (folder / "merged" / "mine").write_text("mine")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read.*damaged or incomplete"),
        ("not finite", r"The delta of model.layers.0.self_attn.v_proj in .* is not finite"),
        ("LoRA", "is no BEFT adapter: its type is LORA"),
        ("no adapter", "holds no adapter_config.json"),
        ("no base", "base model nobody/nothing is neither a folder nor"),
        ("other layers", r"do not match: the adapter has a delta for model.layers.7.self_attn.v_proj"),
        ("other sizes", r"the delta of model.layers.0.self_attn.v_proj has 32 values, the layer has 16 outputs"),
        ("no safetensors", "has no model.safetensors and no index"),
        ("quantised base", "holds quantised weights.*the model that they were quantised from"),
        ("shard missing", "lacks model-00001-of-.*which its index names"),
        ("other names", r"has no tensor model.layers.*_proj.weight: its names are not"),
        ("tensor missing", "does not load into LlamaForCausalLM: model.norm.weight is missing"),
        ("output not empty", "is not empty: nothing was written"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(kind, message, tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    damage(kind, tmp_path)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(MergeError, match=message):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_an_output_where_nothing_can_be_made_is_one_error(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/merged cannot be written .*: nothing was written"):
        merge_adapter(tmp_path / "adapter", tmp_path / "file" / "merged")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_merge_that_is_wrong_is_found_and_removed(tmp_path, monkeypatch):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    rules = placement._with_biases

    def wrong(config, skeleton):
        """A rule that also changes what the model computes."""
        for rule, variant, created in rules(config, skeleton):
            variant.rms_norm_eps = 0.5
            yield rule, variant, created

    monkeypatch.setattr(placement, "_with_biases", wrong)
    with pytest.raises(MergeError, match="logits differ from those of base plus adapter"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = build("llama")
    saved(model, tmp_path, of_term(model))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("beft_trl.weight_files._copy_and_patch", full)
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


SLOW_MERGE = """
import sys, time
from beft_trl import merge
write = merge._write_card
def slow(*args):
    print("writing", flush=True)
    time.sleep(60)
merge._write_card = slow
merge.merge_adapter(sys.argv[1], sys.argv[2])
"""


def test_a_killed_merge_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_MERGE, str(tmp_path / "adapter"), str(tmp_path / "merged")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.rglob("config.json") if "base" not in path.parts]
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
