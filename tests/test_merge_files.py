"""The files that a merge reads and writes: shards, links, tokenizers, full disks and merges that are killed."""

import json

import pytest
import torch
from architectures import build
from conftest import make_tokenizer, of_term, saved
from peft import BeftConfig, get_peft_model
from processes import Python, python
from transformers import (
    LlamaForCausalLM,
)

from beft_trl import MergeError, merge_adapter


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


def test_an_output_where_nothing_can_be_made_is_one_error(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "file" / "merged")
    assert (tmp_path / "file").read_text() == "mine"


FULL_DISK = """
import resource, signal, sys
from beft_trl import merge_adapter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
merge_adapter(sys.argv[1], sys.argv[2])
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    """Writes really fail: the process may not write a file beyond 10,000 bytes."""
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    run = python("-c", FULL_DISK, tmp_path / "adapter", tmp_path / "merged")
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith(("OSError", "beft_trl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


SLOW_MERGE = """
import sys, time
from beft_trl import merge_adapter

def hook(event, arguments):
    if event == "open" and ".merged.partial" in str(arguments[0]) and str(arguments[0]).endswith("README.md"):
        print("writing", flush=True)
        time.sleep(600)

sys.addaudithook(hook)
merge_adapter(sys.argv[1], sys.argv[2])
"""


def slow_merge(folder):
    """A process that has written the merged weights, and waits before the model card."""
    process = Python("-c", SLOW_MERGE, folder / "adapter", folder / "merged")
    process.until(lambda: process.stdout == "writing\n")
    return process


def test_a_killed_merge_leaves_no_checkpoint_and_the_next_one_clears_up_after_it(tmp_path):
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    slow_merge(tmp_path).kill()
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.rglob("config.json") if "base" not in path.parts]
    assert [path for path in tmp_path.rglob("*.safetensors") if ".merged.partial" in str(path)]
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_merge_keeps_what_others_may_be_writing(tmp_path):
    """A merge that runs, one of another machine that shares the disk, and what no lock tells about."""
    model = build("llama")
    saved(model, tmp_path, of_term(model))
    elsewhere, unlocked = (tmp_path / f".merged.partial-{name}" for name in ("other-host-0123", "123"))
    for folder in (elsewhere, unlocked):
        folder.mkdir()
    (tmp_path / f"{elsewhere.name}.lock").touch()
    with slow_merge(tmp_path):
        before = {path for path in tmp_path.rglob("*") if ".merged.partial" in str(path)}
        assert len({path for path in before if path.suffix == ".safetensors"}) == 2
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        assert {path for path in tmp_path.rglob("*") if ".merged.partial" in str(path)} == before


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
    with pytest.raises(MergeError, match="notes.txt.*blob-of-tokenizer.json"):
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
    with pytest.raises(MergeError, match=rf"\b2 tokens.*'<more{extra}>'.*\b{rows}\b"):
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
    with pytest.raises(MergeError, match=rf"\b1 tokens.*\b{rows}\b"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    with pytest.raises(MergeError, match="output_projection"):
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
