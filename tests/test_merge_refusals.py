"""What a merge refuses, each with one error and no trace: damaged and hostile folders."""

import json
import shutil

import pytest
import torch
from damages import (
    BIAS,
    CONFIG,
    DEEP,
    DELTA,
    GARBAGE,
    HEADER,
    INDEX,
    SCORES,
    SINGLE,
    VALUE,
    WEIGHTS,
    both,
    content,
    cut,
    edit,
    link,
    make_folder,
    move_and_link,
    remove,
    rename,
    sharded,
    tensors,
    twice,
    without,
    write,
)
from safetensors.torch import save_file

from beft_trl import MergeError, merge_adapter


REFUSED = {
    # The base's weights.
    "weights empty": (write(SINGLE, ""), "model.safetensors"),
    "weights garbage": (write(SINGLE, GARBAGE), "model.safetensors"),
    "weights cut in the header": (cut(SINGLE, 100), "model.safetensors"),
    "weights cut in the data": (cut(SINGLE, 20_000), "model.safetensors"),
    "weights with a bad header": (write(SINGLE, HEADER), "model.safetensors"),
    "weights a Git LFS pointer": (write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), "model.safetensors"),
    "weights a folder": (make_folder(SINGLE), "model.safetensors"),
    "weights missing": (remove(SINGLE), "model.safetensors"),
    "weights without a tensor": (tensors(SINGLE, VALUE=None), f" {VALUE}"),
    "weights narrower than the config": (tensors(SINGLE, VALUE=lambda values: values[:8]), f"{VALUE} .* shape"),
    "weights of a scalar": (tensors(SINGLE, VALUE=torch.ones(())), f"{VALUE} .* shape"),
    "weights of integers": (tensors(SINGLE, VALUE=lambda values: values.int()), f"{VALUE} .* I32"),
    "weights in 8 bits": (tensors(SINGLE, VALUE=lambda values: values.to(torch.float8_e4m3fn)), f"{VALUE} .* F8"),
    "weights with a bias too many": (tensors(SINGLE, BIAS=torch.zeros(16)), f"has a {BIAS}"),
    "weights not finite": (tensors(SINGLE, VALUE=lambda values: values * float("nan")), "base .* not finite"),
    "weights without a norm": (tensors(SINGLE, **{"model.norm.weight": None}), "base .* model.norm.weight"),
    "weights with another norm": (tensors(SINGLE, **{"model.norm.weight": torch.ones(7)}), "model.norm.weight.*shape"),
    "weights with other rows": (
        tensors(SINGLE, **{"model.embed_tokens.weight": lambda values: values[:50]}),
        "embed_tokens.weight .* shape",
    ),
    "weights by other names": (rename(SINGLE, lambda name: f"transformer.{name}"), r" model\.layers\."),
    # The base's index.
    "index empty": (both(sharded(), write(INDEX, "")), "index.json"),
    "index garbage": (both(sharded(), write(INDEX, GARBAGE)), "index.json"),
    "index cut": (both(sharded(), cut(INDEX, 30)), "index.json"),
    "index deep": (both(sharded(), write(INDEX, DEEP)), "index.json"),
    "index a list": (both(sharded(), write(INDEX, "[]")), "index.json .*list"),
    "index a number": (both(sharded(), write(INDEX, "7")), "index.json .*int"),
    "index a folder": (both(sharded(), make_folder(INDEX)), "index.json"),
    "index without a map": (sharded(values={"weight_map": None}), "weight_map"),
    "index with a list as map": (sharded(values={"weight_map": [VALUE]}), "weight_map"),
    "index with an empty map": (sharded(values={"weight_map": {}}), "weight_map"),
    **{
        f"index names {name!r}": (sharded(weight_map={VALUE: name}), f"{VALUE} is in")
        for name in (
            "../secret", "../secret.safetensors", "/etc/passwd", "/tmp/a.safetensors", "sub/a.safetensors",
            "..\\a.safetensors", "C:a.safetensors", "", ".", "..", "a\0.safetensors", "config.json", 7, None, ["a"],
        )
    },
    "index names a missing shard": (sharded(weight_map={VALUE: "a.safetensors"}), "a.safetensors"),
    "index names a missing tensor": (sharded(weight_map={"nothing.weight": "model-00001-of-00005.safetensors"}),
        "nothing.weight"),
    "index of a shard that lacks a tensor": (without, f" {VALUE}"),
    "index of a tensor in two shards": (twice, f"{VALUE} is in .*, too"),
    "index of other files next to a single one": (
        write(INDEX, json.dumps({"weight_map": {VALUE: "a.safetensors"}})),
        "model.safetensors.* a.safetensors",
    ),
    "index next to the single file, damaged": (write(INDEX, '{"weight_map": []}'), "weight_map"),
    # The base's configuration.
    "config missing": (remove("base/config.json"), "config.json"),
    "config empty": (write("base/config.json", ""), "config.json"),
    "config garbage": (write("base/config.json", GARBAGE), "config.json"),
    "config a list": (write("base/config.json", "[]"), "config.json .*list"),
    "config deep": (write("base/config.json", DEEP), "config.json"),
    "config a folder": (make_folder("base/config.json"), "config.json"),
    **{
        f"config with {values}": (edit("base/config.json", **values), named)
        for values, named in (
            ({"model_type": None}, "config.json"),
            ({"model_type": "llama17"}, "config.json"),
            ({"model_type": 7}, "config.json"),
            ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "config.json"),
            ({"hidden_size": 0}, "config.json"),
            ({"hidden_size": "wide"}, "config.json"),
            ({"num_attention_heads": 0}, "config.json"),
            ({"hidden_act": "bogus"}, "config.json"),
            ({"rope_parameters": "fast"}, "config.json"),
            ({"intermediate_size": -3}, "config.json"),
            ({"dtype": "bogus"}, "config.json"),
            ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
            ({"dtype": "int8"}, "int8"),
            ({"architectures": "Llama"}, "architectures"),
            ({"architectures": [7]}, "architectures"),
            ({"num_hidden_layers": 3}, "model.layers.2.* no tensor|no tensor model.layers.2"),
            ({"num_key_value_heads": 1}, "shape|do not match"),
            ({"hidden_size": 64}, "shape"),
            ({"vocab_size": 300}, "embed_tokens.weight .* shape"),
            ({"intermediate_size": 99}, "base .* another shape"),
            ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised weights"),
        )
    },
    # The adapter.
    "adapter a file": (None, "secret", {"adapter": "secret"}),
    "adapter missing": (None, "nothing", {"adapter": "nothing"}),
    "adapter without a config": (remove(CONFIG), "adapter_config.json"),
    "adapter config empty": (write(CONFIG, ""), "adapter_config.json"),
    "adapter config binary": (write(CONFIG, GARBAGE), "adapter_config.json"),
    "adapter config a list": (write(CONFIG, "[]"), "adapter_config.json .*list"),
    "adapter config deep": (write(CONFIG, DEEP), "adapter_config.json"),
    "adapter config a folder": (make_folder(CONFIG), "adapter_config.json"),
    **{
        f"adapter config with {values}": (edit(CONFIG, **values), named)
        for values, named in (
            ({"peft_type": None}, "None"),
            ({"peft_type": ["BEFT"]}, r"\bBEFT\b"),
            ({"peft_type": "LORA"}, "LORA"),
            ({"base_model_name_or_path": None}, r"adapter\b.*base"),
            ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
            ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
            ({"base_model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
            ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
            ({"modules_to_save": [1]}, "modules_to_save"),
            ({"modules_to_save": {"a": 1}}, "modules_to_save"),
            ({"target_modules": ["c_attn"]}, "PEFT.*LlamaForCausalLM.*adapter_config.json"),
            ({"target_modules": 7}, "PEFT.*LlamaForCausalLM.*adapter_config.json"),
            ({"target_modules": ["model.layers.1.self_attn.v_proj"]}, "layers.0.self_attn.v_proj.* target_modules"),
        )
    },
    "adapter weights missing": (remove(WEIGHTS), "adapter_model.safetensors"),
    "adapter weights empty": (write(WEIGHTS, ""), "adapter_model.safetensors"),
    "adapter weights garbage": (write(WEIGHTS, GARBAGE), "adapter_model.safetensors"),
    "adapter weights cut": (cut(WEIGHTS, 300), "adapter_model.safetensors"),
    "adapter weights a folder": (make_folder(WEIGHTS), "adapter_model.safetensors"),
    "adapter with a LoRA tensor": (tensors(WEIGHTS, lora_A=torch.ones(2, 2)), "lora_A"),
    "adapter without tensors": (lambda folder: save_file({}, folder / WEIGHTS), "no delta"),
    **{
        f"delta {name}": (tensors(WEIGHTS, DELTA=change), "layers.0.self_attn.v_proj")
        for name, change in (
            ("a scalar", torch.ones(())),
            ("of one dimension", lambda values: values[0]),
            ("in two rows", lambda values: values.view(2, -1)),
            ("of three dimensions", lambda values: values[None]),
            ("without elements", lambda values: values[:, :0]),
            ("too wide", lambda values: values.repeat(1, 2)),
            ("of integers", lambda values: values.int()),
            ("in 8 bits", lambda values: values.to(torch.float8_e4m3fn)),
            ("of complex numbers", lambda values: values.to(torch.complex64)),
            ("of booleans", lambda values: values.bool()),
            ("not finite", lambda values: values / 0),
        )
    },
    "deltas of other layers": (
        rename(WEIGHTS, lambda name: name.replace("layers.1.", "layers.7.")), "model.layers.7.self_attn.v_proj",
    ),
    "delta of a norm": (
        tensors(WEIGHTS, **{DELTA.replace("self_attn.v_proj", "input_layernorm"): torch.ones(1, 32)}),
        "input_layernorm",
    ),
    "scores a list": (write(SCORES, "[]"), "beft_scores.json"),
    # What does not stay in its folder.
    "base config linked away": (move_and_link("base/config.json", "../outside"), "config.json.*outside"),
    "base weights linked away": (move_and_link(SINGLE, "../outside"), "model.safetensors.*outside"),
    "base file linked to a secret": (link("base/notes.txt", "../secret"), "notes.txt.*secret"),
    "base file linked to nothing": (link("base/notes.txt", "nothing"), "notes.txt is a link to nothing"),
    "base file linked to itself": (link("base/notes.txt", "notes.txt"), "notes.txt is a link to notes.txt"),
    "base folder linked": (link("base/up", ".."), "up is a link to a folder"),
    "index linked away": (both(sharded(), move_and_link(INDEX, "../outside")), "index.json.*outside"),
    "adapter config linked away": (move_and_link(CONFIG, "../outside"), "adapter_config.json.*outside"),
    "adapter weights linked away": (move_and_link(WEIGHTS, "../outside"), "adapter_model.safetensors.*outside"),
    "adapter tokenizer linked to a secret": (link("adapter/tokenizer.json", "../secret"), "tokenizer.json.*secret"),
    "adapter tokenizer linked to /etc/passwd": (link("adapter/vocab.txt", "/etc/passwd"), "vocab.txt.*passwd"),
    "adapter template linked to a secret": (link("adapter/chat_template.jinja", "../secret"), "jinja.*secret"),
    # Folders that are not what they must be.
    "base a file": (None, "secret is a file", {"base": "secret"}),
    "base missing": (None, "a/b/c is neither", {"base": "a/b/c"}),
    "base the adapter": (None, "holds an adapter", {"base": "adapter"}),
    "output a file": (None, "secret is a file", {"output": "secret"}),
    "output not empty": (both(make_folder("merged"), write("merged/mine", "mine")), "merged is not empty",
        {"output": "merged"}),
    "output below a file": (None, "secret/merged cannot be written", {"output": "secret/merged"}),
    "output a link to nothing": (link("merged", "nothing"), "a link to nothing: nothing was", {"output": "merged"}),
    "output the base": (None, "base is not empty", {"output": "base"}),
    "output the adapter": (None, "adapter is not empty", {"output": "adapter"}),
    "output in the base": (None, "is in the base", {"output": "base/merged"}),
    "output deep in the base": (None, "is in the base", {"output": "base/a/b"}),
    "output in the base, by a way around": (None, "is in the base", {"output": "adapter/../base/merged"}),
    "output with a long name": (None, "x cannot be written .*long", {"output": "x" * 300}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_one_error_and_leaves_every_file_as_it_was(name, good, tmp_path, monkeypatch):
    change, named, *arguments = REFUSED[name]
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    edit(CONFIG, base_model_name_or_path="base")(folder)
    if change is not None:
        change(folder)
    monkeypatch.chdir(folder)
    before = content(folder)
    with pytest.raises((MergeError, OSError), match=f"(?s){named}") as raised:
        merge_adapter(**({"adapter": "adapter", "output": "new/merged"} | dict(*arguments)))
    assert raised.type in (MergeError, OSError)
    assert "report this model" not in str(raised.value)
    assert content(folder) == before


@pytest.mark.parametrize("base", ["base", "sharded"])
def test_what_is_refused_damaged_is_merged_whole(base, good, tmp_path):
    assert merge_adapter(good / "adapter", tmp_path / "new" / "merged", good / base).difference < 1e-5
