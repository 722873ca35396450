"""What a merge refuses: damaged files, files outside their folder, tokens without embedding; what it cleans up."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from architectures import build
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from test_merge import TOKENS, of_term, saved

from beft_trl import MergeError, merge_adapter


@pytest.fixture
def folders(tmp_path):
    """Base and adapter of a Llama, the base with an index of its one shard."""
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    base = tmp_path / "base"
    tensors = load_file(base / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def change_index(folders, change):
    file = folders / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def outside(name):
    def change(index):
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)

    return change


INDEXES = {
    "a parent folder": outside("../secret.safetensors"),
    "an absolute path": outside("/etc/passwd"),
    "a folder within": outside("sub/model.safetensors"),
    "a Windows path": outside("..\\secret.safetensors"),
    "no map": lambda index: index.pop("weight_map"),
    "a list": lambda index: index.update(weight_map=[1]),
    "numbers": lambda index: index.update(weight_map={"a": 1}),
    "an empty map": lambda index: index.update(weight_map={}),
    "a tensor that is not there": lambda index: index["weight_map"].update(other="model.safetensors"),
    "a file that is not there": lambda index: index["weight_map"].update(other="other.safetensors"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_is_damaged_or_leads_elsewhere_is_refused(folders, kind):
    secret = folders / "secret.safetensors"
    save_file({"secret": torch.ones(1)}, secret)
    before = secret.read_bytes()
    change_index(folders, INDEXES[kind])
    with pytest.raises(MergeError):
        merge_adapter(folders / "adapter", folders / "merged", verify=False)
    assert secret.read_bytes() == before
    assert sorted(path.name for path in folders.iterdir()) == ["adapter", "base", "secret.safetensors"]


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64, b"[" * 100])
@pytest.mark.parametrize(
    "file", ["base/model.safetensors", "adapter/adapter_model.safetensors", "base/model.safetensors.index.json"]
)
def test_a_damaged_file_is_named(folders, file, content):
    (folders / file).write_bytes(content)
    with pytest.raises(MergeError, match=re.escape(file.split("/")[0])):
        merge_adapter(folders / "adapter", folders / "merged", verify=False)
    assert not (folders / "merged").exists()


@pytest.mark.parametrize(
    "link", ["base/notes.txt", "base/folder", "adapter/tokenizer.json", "adapter/adapter_config.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(folders, link):
    secret = folders / "secret"
    secret.mkdir()
    (secret / "password").write_text("secret")
    (folders / link).unlink(missing_ok=True)
    (folders / link).symlink_to(secret if link.endswith("folder") else secret / "password")
    with pytest.raises(MergeError, match="leads out of its folder"):
        merge_adapter(folders / "adapter", folders / "merged", verify=False)
    assert not (folders / "merged").exists()


def test_the_links_of_a_hub_cache_are_followed(folders):
    blobs, snapshot = folders / "models--a--b" / "blobs", folders / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((folders / "base").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    report = merge_adapter(folders / "adapter", folders / "merged", snapshot)
    assert report.difference < 1e-5


@pytest.mark.parametrize("verify", [False, True])
def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(folders, verify):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"new{number}" for number in range(200)])
    tokenizer.save_pretrained(folders / "adapter")
    with pytest.raises(MergeError, match="tokens beyond"):
        merge_adapter(folders / "adapter", folders / "merged", verify=verify)
    assert not (folders / "merged").exists()


def test_an_output_bias_of_a_square_conv1d_is_that_of_the_stored_transpose(tmp_path):
    """Without the comparison of logits, whose work this one does."""
    model = build("gpt2")
    adapted = saved(model, tmp_path, of_term(model))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", output_projection=True, verify=False)
    merged = type(model).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        expected, found = adapted(input_ids=TOKENS).logits, merged(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_base_of_mixed_dtypes_merges(folders):
    tensors = load_file(folders / "base" / "model.safetensors")
    mixed = {name: values.float() if "norm" in name else values.bfloat16() for name, values in tensors.items()}
    save_file(mixed, folders / "base" / "model.safetensors", metadata={"format": "pt"})
    report = merge_adapter(folders / "adapter", folders / "merged")
    assert report.difference < 0.1
    merged = {}
    for shard in (folders / "merged").glob("*.safetensors"):
        merged |= load_file(shard)
    assert all(
        torch.equal(merged[name], values) and merged[name].dtype == values.dtype for name, values in mixed.items()
    )


def test_what_a_killed_merge_left_is_cleaned_by_the_next_one(folders):
    program = (
        "import sys, time, beft_trl.merge as merge\n"
        "merge.CheckpointFiles.copy_with = lambda *call: (print('copying', flush=True), time.sleep(600))\n"
        "merge.merge_adapter(sys.argv[1], sys.argv[2], verify=False)\n"
    )
    command = [sys.executable, "-c", program, folders / "adapter", folders / "merged"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "copying\n"
    left = list(folders.glob(".merged.partial-*"))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    assert len(left) == 1 and left[0].exists() and time.monotonic() < deadline
    merge_adapter(folders / "adapter", folders / "merged", verify=False)
    assert not list(folders.glob(".merged.partial-*"))


def test_a_base_of_other_sizes_than_its_config_is_refused_without_verification(folders):
    tensors = load_file(folders / "base" / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("v_proj.weight"):
            tensors[name] = torch.ones(3, values.shape[1])
    save_file(tensors, folders / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="v_proj"):
        merge_adapter(folders / "adapter", folders / "merged", verify=False)
