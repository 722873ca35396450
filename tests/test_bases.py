"""A base model that is missing, damaged or another one than its configuration says is refused before it is loaded."""

import json

import pytest
import torch
from conftest import make_llama, make_opt
from safetensors.torch import load_file, save_file
from transformers.utils import is_gptqmodel_available, is_optimum_available

from beft_trl.cli.bases import base_skeleton, check_weights


def check(folder, args):
    skeleton = base_skeleton(str(folder), args)
    check_weights(str(folder), args, skeleton)
    return skeleton


@pytest.fixture
def base(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def tensors(change):
    def damage(base):
        file = base / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def config(**settings):
    def damage(base):
        file = base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


def without(part):
    return tensors(lambda weights: {name: values for name, values in weights.items() if part not in name})


def pickled(change):
    def damage(base):
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        change(base / "pytorch_model.bin")

    return damage


DAMAGE = {
    "no weights": lambda base: (base / "model.safetensors").unlink(),
    "empty weights": lambda base: (base / "model.safetensors").write_bytes(b""),
    "weights of text": lambda base: (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com"),
    "weights without tensors": without(""),
    "weights without a layer": without("layers.1."),
    "weights of other sizes": tensors(lambda weights: {name: w[..., :4].clone() for name, w in weights.items()}),
    "another embedding": tensors(
        lambda weights: {name: w[:9].clone() if "embed" in name else w for name, w in weights.items()}
    ),
    "an index of nothing": lambda base: (base / "model.safetensors.index.json").write_text("{}"),
    "more layers": config(num_hidden_layers=3),
    "biases that are not there": config(attention_bias=True),
    "more heads of keys": config(num_key_value_heads=4),
    "a width of none": config(hidden_size=0),
    "heads of none": config(num_attention_heads=0),
    "a vocabulary below zero": config(vocab_size=-1),
    "a number that is text": config(intermediate_size="many"),
    "an activation that is none": config(hidden_act="bogus"),
    "a dtype that is none": config(dtype="bogus"),
    "a pickle of garbage": pickled(lambda path: path.write_bytes(b"cos\nsystem\n")),
    "a pickle that ends early": pickled(lambda path: path.write_bytes(path.read_bytes()[:2000])),
    "settings for generation that are a list": lambda base: (base / "generation_config.json").write_text("[]"),
    "a quantisation that is none": config(quantization_config={"quant_method": "bogus"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_base_that_is_damaged_or_another_one_is_named(base, make_config, kind):
    DAMAGE[kind](base)
    with pytest.raises((ValueError, OSError), match=str(base)):
        check(base, make_config())


def test_settings_that_make_no_model_are_named(base, make_config):
    with pytest.raises(ValueError, match="model_init_kwargs"):
        base_skeleton(str(base), make_config(model_init_kwargs={"num_hidden_layers": "x"}))


@pytest.mark.parametrize("name", ["no_such", "num_hiden_layers"])
def test_a_setting_that_neither_model_nor_loading_knows_is_named(base, make_config, name):
    with pytest.raises(ValueError, match=name):
        base_skeleton(str(base), make_config(model_init_kwargs={name: 1, "low_cpu_mem_usage": True}))


def test_weights_that_need_a_package_that_is_absent_are_refused(base, make_config):
    config(quantization_config={"quant_method": "gptq", "bits": 4})(base)
    if is_optimum_available() and is_gptqmodel_available():
        pytest.skip("the package is here")
    with pytest.raises(ImportError, match="optimum|gptqmodel"):
        base_skeleton(str(base), make_config())


@pytest.mark.parametrize("model", [make_llama, make_opt])
def test_a_whole_base_passes_in_whatever_files(tmp_path, make_config, model):
    for name, options in (("one", {}), ("shards", {"max_shard_size": "20KB"})):
        model().save_pretrained(tmp_path / name, **options)
        check(tmp_path / name, make_config())
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "one").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    check(tmp_path / "links", make_config())
    weights = model().state_dict()
    torch.save(weights, tmp_path / "one" / "pytorch_model.bin")
    (tmp_path / "one" / "model.safetensors").unlink()
    assert check(tmp_path / "one", make_config()).device.type == "meta"
