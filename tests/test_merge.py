"""Merged checkpoints: their files, dtypes and logits, read by a process that knows nothing of PEFT or this package."""

import copy
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from architectures import EXPECTED, build
from conftest import make_llama, make_rows, make_tokenizer
from peft import BeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from beft_trl import MergeError, find_bias_sites, merge_adapter
from beft_trl.layout import BiasSite, features, output_projection
from beft_trl.merge import placement
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
    rules = placement.with_biases

    def wrong(config, skeleton):
        """A rule that also changes what the model computes."""
        for rule, variant, created in rules(config, skeleton):
            variant.rms_norm_eps = 0.5
            yield rule, variant, created

    monkeypatch.setattr(placement, "with_biases", wrong)
    with pytest.raises(MergeError, match="logits differ from those of base plus adapter"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = build("llama")
    saved(model, tmp_path, of_term(model))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("beft_trl.merge.checkpoint_files.copy_and_patch", full)
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


SLOW_MERGE = """
import sys, time
from beft_trl.merge import adapter
write = adapter.write_card
def slow(*args):
    print("writing", flush=True)
    time.sleep(60)
adapter.write_card = slow
adapter.merge_adapter(sys.argv[1], sys.argv[2])
"""


def slow_merge(folder):
    """A process that has written the merged weights, and waits."""
    command = [sys.executable, "-c", SLOW_MERGE, str(folder / "adapter"), str(folder / "merged")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def killed(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_merge_leaves_no_checkpoint_and_the_next_one_clears_up_after_it(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    killed(slow_merge(tmp_path))
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.rglob("config.json") if "base" not in path.parts]
    assert [path for path in tmp_path.rglob("*.safetensors") if ".merged.partial" in str(path)]
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_merge_leaves_alone_what_others_may_be_writing(tmp_path):
    """A merge that runs, one of another machine that shares the disk, and what no lock tells about."""
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    elsewhere, unlocked = (tmp_path / f".merged.partial-{name}" for name in ("other-host-0123", "123"))
    for folder in (elsewhere, unlocked):
        folder.mkdir()
    (tmp_path / f"{elsewhere.name}.lock").touch()
    process = slow_merge(tmp_path)
    try:
        before = {path for path in tmp_path.rglob("*") if ".merged.partial" in str(path)}
        assert len({path for path in before if path.suffix == ".safetensors"}) == 2
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert {path for path in tmp_path.rglob("*") if ".merged.partial" in str(path)} == before
    finally:
        killed(process)


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
    with pytest.raises(MergeError, match="cannot become an output-projection bias"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True, verify=False)
    assert not (tmp_path / "merged").exists()


def rewrite(file, dtype_of):
    """Puts every tensor of a file in the dtype that a function of its name gives."""
    tensors = {name: values.to(dtype_of(name)) for name, values in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("config_dtype", [None, "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
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


def hub_cache(folder, name, content):
    """Puts a folder's files into a cache as the hub library does: blobs, and a snapshot of links to them."""
    repository = folder / "hub" / f"models--nobody--{name}"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in content.iterdir():
        file.rename(repository / "blobs" / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    return snapshot


def test_snapshots_in_a_hub_cache_merge_and_another_models_blobs_do_not(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "notes.txt").write_text("mine")
    base = hub_cache(tmp_path, "base", tmp_path / "base")
    adapter = hub_cache(tmp_path, "adapter", tmp_path / "adapter")
    assert merge_adapter(adapter, tmp_path / "merged", base).difference < 1e-5
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"notes.txt", "tokenizer.json", "config.json"} <= merged
    assert not [path for path in (tmp_path / "merged").iterdir() if path.is_symlink()]
    (base / "notes.txt").unlink()
    (base / "notes.txt").symlink_to("../../../models--nobody--adapter/blobs/blob-of-tokenizer.json")
    with pytest.raises(MergeError, match="notes.txt leads out of its folder"):
        merge_adapter(adapter, tmp_path / "other", base)
    assert not (tmp_path / "other").exists()


def larger_tokenizer(count):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<more{index}>" for index in range(count)])
    return tokenizer


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(where, verify, tmp_path):
    model = build("llama")
    rows = model.config.vocab_size
    saved(model, tmp_path, of_term(model))
    extra = rows - len(make_tokenizer())
    larger_tokenizer(extra + 2).save_pretrained(tmp_path / where)
    with pytest.raises(MergeError, match=rf"2 tokens \('<more{extra}>' first\) beyond the {rows} rows"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=verify)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    larger_tokenizer(extra).save_pretrained(tmp_path / where)
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged", verify=verify).changed == []


def test_a_tokenizer_beyond_the_embedding_is_refused_for_a_task_model_too(tmp_path):
    model = build("bert")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    settings = BeftConfig(target_modules=["value"], modules_to_save=["classifier"], init_weights=False)
    if not hasattr(model, "classifier"):
        model.add_module("classifier", torch.nn.Linear(4, 2))
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    rows = model.config.vocab_size
    larger_tokenizer(rows - len(make_tokenizer()) + 1).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=f"1 tokens .* beyond the {rows} rows"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    with pytest.raises(MergeError, match="Merge without output_projection"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True)


def test_what_an_old_configuration_says_on_generation_stays(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    (tmp_path / "base" / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"temperature": 0.7, "do_sample": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for folder in ("base", "merged"):
        assert LlamaForCausalLM.from_pretrained(tmp_path / folder).generation_config.temperature == 0.7
