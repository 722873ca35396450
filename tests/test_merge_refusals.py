"""What a merge and a look at an adapter refuse, each with one error and no trace: damaged and hostile folders."""

import io
import json
import os
import shutil

import pytest
import torch
from architectures import build
from conftest import make_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_merge import of_term, saved

from beft_trl import MergeError, merge_adapter
from beft_trl.cli.info import adapter_report


SINGLE, INDEX = "base/model.safetensors", "base/model.safetensors.index.json"
WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
VALUE, BIAS = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.v_proj.bias"
DELTA = "base_model.model.model.layers.0.self_attn.v_proj.beft_bias"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a base of one file, one of shards, one with biases, and an adapter of the first two."""
    folder = tmp_path_factory.mktemp("good")
    model = build("llama")
    model.config.vocab_size = 64
    model.resize_token_embeddings(64)
    saved(model, folder, of_term(model))
    make_tokenizer().save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    plain = type(model).from_pretrained(folder / "base")
    plain.save_pretrained(folder / "sharded", max_shard_size="20KB")
    (folder / "secret").write_text("secret")
    return folder


def content(folder):
    """Every file and link of a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def write(path, text):
    def change(folder):
        (folder / path).unlink(missing_ok=True)
        (folder / path).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def cut(path, size):
    return lambda folder: os.truncate(folder / path, size)


def remove(path):
    return lambda folder: (folder / path).unlink()


def make_folder(path):
    def change(folder):
        if (folder / path).exists():
            (folder / path).unlink()
        (folder / path).mkdir()

    return change


def link(path, target):
    def change(folder):
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target)

    return change


def move_and_link(path, target):
    """The file itself outside, and a link to it in its place."""

    def change(folder):
        (folder / path).rename(folder / "outside")
        (folder / path).symlink_to(target)

    return change


def edit(path, **values):
    """Keys of a JSON file; None takes a key out."""

    def change(folder):
        record = json.loads((folder / path).read_text()) | values
        record = {key: value for key, value in record.items() if value is not None}
        (folder / path).write_text(json.dumps(record))

    return change


def tensors(path, **values):
    """Tensors of a file, by a name of this module; None takes one out, and a function changes one."""

    def change(folder):
        found = load_file(folder / path)
        for key, value in values.items():
            name = globals().get(key, key)
            found[name] = value(found[name]) if callable(value) else value
        save_file({key: value.contiguous() for key, value in found.items() if value is not None}, folder / path)

    return change


def sharded(*, values=None, **where):
    """The base in shards, with an index that says of the value projection's weight that it is elsewhere."""

    def change(folder):
        shutil.rmtree(folder / "base")
        shutil.copytree(folder / "sharded", folder / "base")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= where.get("weight_map", {})
        index.update({} if values is None else values)
        (folder / INDEX).write_text(json.dumps(index))

    return change


def both(*changes):
    def change(folder):
        for each in changes:
            each(folder)

    return change


def file_of(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def twice(folder):
    """The value projection's weight in two shards."""
    sharded()(folder)
    other = next(file for name, file in file_of(folder).items() if file != file_of(folder)[VALUE])
    tensors(f"base/{other}", VALUE=torch.zeros(16, 32))(folder)


def without(folder):
    """A shard that lacks what the index says it has."""
    sharded()(folder)
    tensors(f"base/{file_of(folder)[VALUE]}", VALUE=None)(folder)


GARBAGE = bytes(range(256)) * 4
HEADER = (50).to_bytes(8, "little") + b'{"a": {"dtype": "F9", "shape": [1], "data_offsets"'
DEEP = "[" * 100_000
SCORES = "adapter/beft_scores.json"
# By name: what happens to the folder, what the error must name, and other arguments of the merge.
REFUSED = {
    # The base's weights.
    "weights empty": (write(SINGLE, ""), "model.safetensors cannot be read"),
    "weights garbage": (write(SINGLE, GARBAGE), "model.safetensors cannot be read"),
    "weights cut in the header": (cut(SINGLE, 100), "model.safetensors cannot be read"),
    "weights cut in the data": (cut(SINGLE, 20_000), "model.safetensors cannot be read"),
    "weights with a bad header": (write(SINGLE, HEADER), "model.safetensors cannot be read"),
    "weights a Git LFS pointer": (write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    "weights a folder": (make_folder(SINGLE), "model.safetensors cannot be read"),
    "weights missing": (remove(SINGLE), "has no model.safetensors and no index"),
    "weights without a tensor": (tensors(SINGLE, VALUE=None), f"no tensor {VALUE}"),
    "weights narrower than the config": (tensors(SINGLE, VALUE=lambda values: values[:8]), f"{VALUE} .* shape"),
    "weights of a scalar": (tensors(SINGLE, VALUE=torch.ones(())), f"{VALUE} .* shape"),
    "weights of integers": (tensors(SINGLE, VALUE=lambda values: values.int()), f"{VALUE} .* I32"),
    "weights in 8 bits": (tensors(SINGLE, VALUE=lambda values: values.to(torch.float8_e4m3fn)), f"{VALUE} .* F8"),
    "weights with a bias too many": (tensors(SINGLE, BIAS=torch.zeros(16)), f"has a {BIAS}"),
    "weights not finite": (tensors(SINGLE, VALUE=lambda values: values * float("nan")), "base .* not finite"),
    "weights without a norm": (tensors(SINGLE, **{"model.norm.weight": None}), "base .* model.norm.weight is missing"),
    "weights with another norm": (tensors(SINGLE, **{"model.norm.weight": torch.ones(7)}), "model.norm.weight.*shape"),
    "weights with other rows": (
        tensors(SINGLE, **{"model.embed_tokens.weight": lambda values: values[:50]}),
        "embed_tokens.weight .* shape",
    ),
    # The base's index.
    "index empty": (both(sharded(), write(INDEX, "")), "index.json cannot be read"),
    "index garbage": (both(sharded(), write(INDEX, GARBAGE)), "index.json cannot be read"),
    "index cut": (both(sharded(), cut(INDEX, 30)), "index.json cannot be read"),
    "index deep": (both(sharded(), write(INDEX, DEEP)), "index.json cannot be read"),
    "index a list": (both(sharded(), write(INDEX, "[]")), "index.json holds a list"),
    "index a number": (both(sharded(), write(INDEX, "7")), "index.json holds a int"),
    "index a folder": (both(sharded(), make_folder(INDEX)), "index.json cannot be read"),
    "index without a map": (sharded(values={"weight_map": None}), "has no weight_map"),
    "index with a list as map": (sharded(values={"weight_map": [VALUE]}), "has no weight_map"),
    "index with an empty map": (sharded(values={"weight_map": {}}), "has no weight_map"),
    **{
        f"index names {name!r}": (sharded(weight_map={VALUE: name}), f"{VALUE} is in .*, which is no name")
        for name in (
            "../secret", "../secret.safetensors", "/etc/passwd", "/tmp/a.safetensors", "sub/a.safetensors",
            "..\\a.safetensors", "C:a.safetensors", "", ".", "..", "a\0.safetensors", "config.json", 7, None, ["a"],
        )
    },
    "index names a missing shard": (sharded(weight_map={VALUE: "a.safetensors"}), "lacks a.safetensors"),
    "index names a missing tensor": (sharded(weight_map={"nothing.weight": "model-00001-of-00005.safetensors"}),
        "no tensor nothing.weight"),
    "index of a shard that lacks a tensor": (without, f"no tensor {VALUE}"),
    "index of a tensor in two shards": (twice, f"{VALUE} is in .*, too"),
    "index of other files next to a single one": (
        write(INDEX, json.dumps({"weight_map": {VALUE: "a.safetensors"}})),
        "has model.safetensors, .* names a.safetensors",
    ),
    "index next to the single file, damaged": (write(INDEX, '{"weight_map": []}'), "has no weight_map"),
    # The base's configuration.
    "config missing": (remove("base/config.json"), "has no config.json"),
    "config empty": (write("base/config.json", ""), "config.json cannot be read"),
    "config garbage": (write("base/config.json", GARBAGE), "config.json cannot be read"),
    "config a list": (write("base/config.json", "[]"), "config.json holds a list"),
    "config deep": (write("base/config.json", DEEP), "config.json cannot be read"),
    "config a folder": (make_folder("base/config.json"), "config.json cannot be read"),
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
        )
    },
    # The adapter.
    "adapter a file": (None, "no folder .*secret", {"adapter": "secret"}),
    "adapter missing": (None, "no folder .*nothing", {"adapter": "nothing"}),
    "adapter without a config": (remove(CONFIG), "holds no adapter_config.json"),
    "adapter config empty": (write(CONFIG, ""), "adapter_config.json cannot be read"),
    "adapter config binary": (write(CONFIG, GARBAGE), "adapter_config.json cannot be read"),
    "adapter config a list": (write(CONFIG, "[]"), "adapter_config.json holds a list"),
    "adapter config deep": (write(CONFIG, DEEP), "adapter_config.json cannot be read"),
    "adapter config a folder": (make_folder(CONFIG), "adapter_config.json cannot be read"),
    **{
        f"adapter config with {values}": (edit(CONFIG, **values), named)
        for values, named in (
            ({"peft_type": None}, "its type is None"),
            ({"peft_type": ["BEFT"]}, "is no BEFT adapter"),
            ({"peft_type": "LORA"}, "its type is LORA"),
            ({"base_model_name_or_path": None}, "does not say what its base model was"),
            ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
            ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is"),
            ({"base_model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
            ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
            ({"modules_to_save": [1]}, "modules_to_save is"),
            ({"modules_to_save": {"a": 1}}, "modules_to_save is"),
            ({"target_modules": ["c_attn"]}, "PEFT cannot load the adapter"),
            ({"target_modules": 7}, "PEFT cannot load the adapter"),
            ({"target_modules": ["model.layers.1.self_attn.v_proj"]}, "layers.0.self_attn.v_proj.* target_modules"),
        )
    },
    "adapter weights missing": (remove(WEIGHTS), "adapter_model.safetensors cannot be read"),
    "adapter weights empty": (write(WEIGHTS, ""), "adapter_model.safetensors cannot be read"),
    "adapter weights garbage": (write(WEIGHTS, GARBAGE), "adapter_model.safetensors cannot be read"),
    "adapter weights cut": (cut(WEIGHTS, 300), "adapter_model.safetensors cannot be read"),
    "adapter weights a folder": (make_folder(WEIGHTS), "adapter_model.safetensors cannot be read"),
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
    "delta of a norm": (
        tensors(WEIGHTS, **{DELTA.replace("self_attn.v_proj", "input_layernorm"): torch.ones(1, 32)}),
        "input_layernorm",
    ),
    "scores a list": (write(SCORES, "[]"), "beft_scores.json"),
    # What does not stay in its folder.
    "base config linked away": (move_and_link("base/config.json", "../outside"), "config.json leads out"),
    "base weights linked away": (move_and_link(SINGLE, "../outside"), "model.safetensors leads out"),
    "base file linked to a secret": (link("base/notes.txt", "../secret"), "notes.txt leads out"),
    "base file linked to nothing": (link("base/notes.txt", "nothing"), "notes.txt is a link to nothing"),
    "base file linked to itself": (link("base/notes.txt", "notes.txt"), "notes.txt is a link to notes.txt"),
    "base folder linked": (link("base/up", ".."), "up is a link to a folder"),
    "index linked away": (both(sharded(), move_and_link(INDEX, "../outside")), "index.json leads out"),
    "adapter config linked away": (move_and_link(CONFIG, "../outside"), "adapter_config.json leads out"),
    "adapter weights linked away": (move_and_link(WEIGHTS, "../outside"), "adapter_model.safetensors leads out"),
    "adapter tokenizer linked to a secret": (link("adapter/tokenizer.json", "../secret"), "tokenizer.json leads out"),
    "adapter tokenizer linked to /etc/passwd": (link("adapter/vocab.txt", "/etc/passwd"), "vocab.txt leads out"),
    "adapter template linked to a secret": (link("adapter/chat_template.jinja", "../secret"), "jinja leads out"),
    # Folders that are not what they must be.
    "base a file": (None, "secret is a file", {"base": "secret"}),
    "base missing": (None, "a/b/c is neither", {"base": "a/b/c"}),
    "base the adapter": (None, "holds an adapter", {"base": "adapter"}),
    "output a file": (None, "secret is a file", {"output": "secret"}),
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


def told(folder):
    """What `beft info` prints of the adapter."""
    output = io.StringIO()
    console = Console(file=output, highlight=False, width=300)
    for part in adapter_report(folder / "adapter"):
        console.print(part)
    return output.getvalue()


LAYER = {"layer": 0, "importance": 0.5, "magnitude": 0.1, "fisher": 0.2}
RECORD = {
    "selected": "value", "method": "beft", "anchor": "bias", "steps": 2, "base_model": "base", "versions": {},
    "terms": {term: {"parameters": 4, "dead": None, "layers": [LAYER]} for term in ("query", "key", "value")},
}  # fmt: skip


def scores(**values):
    return write(SCORES, json.dumps(RECORD | values))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit(CONFIG, base_model_name_or_path="[/b] [red]"), "Base: [/b] [red]."),
        (edit(CONFIG, peft_version="[/b]"), "peft [/b]"),
        (scores(versions={"[/b]": "[bold"}), "[/b] [bold"),
        (scores(base_model="[/b]"), "Bias terms of [/b]"),
        (scores(notes=["[/b] is a note."]), "[/b] is a note."),
        (scores(method=None), "Trains the value bias"),
        (
            both(
                edit(CONFIG, modules_to_save=["[", "lm_head"]),
                tensors(WEIGHTS, **{"base_model.model.lm_head.[/b]": torch.ones(2)}),
            ),
            "lm_head.[/b]",
        ),
        (tensors(WEIGHTS, **{DELTA.replace("self_attn", "[/b]"): torch.zeros(1, 16)}), "model.layers.0.[/b].v_proj"),
    ],
)
def test_names_that_look_like_markup_are_told_as_they_are(change, named, good, tmp_path):
    shutil.copytree(good, tmp_path / "[b]")
    change(tmp_path / "[b]")
    output = "".join(told(tmp_path / "[b]").split())  # a title is broken where its table ends
    assert all("".join(text.split()) in output for text in (named, "Deltas of", "[b]"))


@pytest.mark.parametrize(
    "change",
    [
        *(write(SCORES, text) for text in ("", "{", "[]", "7", GARBAGE, DEEP, "{}")),
        make_folder(SCORES),
        link(SCORES, "../secret"),
        *(
            scores(**values)
            for values in (
                {"selected": 7},
                {"selected": "[/b]"},
                {"selected": ["value"]},
                {"method": "bogus"},
                {"method": 7},
                {"anchor": "sea"},
                {"versions": [1]},
                {"learning_rates": [1]},
                {"learning_rates": {"a": "fast"}},
                {"notes": [7]},
                {"terms": "value"},
                {"terms": {"value": None}},
                {"terms": {"[/b]": RECORD["terms"]["value"]}},
                {"terms": {"value": {"parameters": "many", "dead": None, "layers": [LAYER]}}},
                {"terms": {"value": {"parameters": 4, "dead": None, "layers": [LAYER | {"importance": "high"}]}}},
                {"terms": {"value": {"parameters": 4, "dead": None, "layers": [7]}}},
            )
        ),
    ],
)
def test_damaged_scores_are_one_error_that_names_their_file(change, good, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(ValueError, match="beft_scores.json") as raised:
        told(folder)
    assert raised.type in (ValueError, MergeError)
