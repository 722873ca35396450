"""What can be wrong with the folders of a base and an adapter: functions that change one."""

import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file


SINGLE, INDEX = "base/model.safetensors", "base/model.safetensors.index.json"
WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
VALUE, BIAS = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.v_proj.bias"
DELTA = "base_model.model.model.layers.0.self_attn.v_proj.beft_bias"


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


def rename(path, name_of):
    """Other names of all tensors of a file."""

    def change(folder):
        save_file({name_of(name): values for name, values in load_file(folder / path).items()}, folder / path)

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
