"""Seconds and memory of a merge next to `cp -r`, on a synthetic sharded checkpoint that never was a model.

python examples/benchmarks/merge_cost.py --gigabytes 4 --folder /tmp/merge_cost
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from peft import BeftConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from beft_trl import merge_adapter
from beft_trl.layout import build_skeleton, find_bias_sites


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    """A Llama's checkpoint with one shard of random bf16 weights for each layer, and an adapter next to it."""
    layers = max(1, round(gigabytes * 2**30 / (2 * 12.1 * 2048**2)))
    config = LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, vocab_size=32000)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    model = build_skeleton(config)
    by_shard: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        by_shard.setdefault(layer, {})[name] = parameter.shape
    weight_map = {}
    (folder / "base").mkdir(parents=True)
    for number, shapes in enumerate(by_shard.values(), 1):
        shard = f"model-{number:05d}-of-{len(by_shard):05d}.safetensors"
        tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / "base" / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder / "base")
    sites = [site for site in find_bias_sites(model) if site.term == "value"]
    (folder / "adapter").mkdir()
    deltas = {f"base_model.model.{site.module}.beft_bias": torch.randn(1, len(site.rows)) for site in sites}
    save_file(deltas, folder / "adapter" / "adapter_model.safetensors")
    beft = BeftConfig(target_modules=[site.module for site in sites], base_model_name_or_path=str(folder / "base"))
    beft.save_pretrained(str(folder / "adapter"))


def timed(command: list[str], output: Path) -> tuple[float, int]:
    """Seconds and peak resident memory in bytes."""
    shutil.rmtree(output, ignore_errors=True)
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, process.memory_info().rss)
        time.sleep(0.01)
    assert process.returncode == 0, command
    return time.perf_counter() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder with twice the space")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    write_checkpoint(args.folder, args.gigabytes)
    base, output = args.folder / "base", args.folder / "output"
    copy = ["cp", "-r", str(base), str(output)]
    merge = [sys.executable, "-m", "beft_trl.cli", "merge", "--no-verify"]
    merge += ["--adapter", str(args.folder / "adapter"), "--output", str(output)]
    timed(copy, output)  # both find the files in the page cache
    print(f"{sum(path.stat().st_size for path in base.iterdir()) / 2**30:.2f} GiB in {base}")
    for _ in range(args.repeat):
        (copied, _), (merged, peak) = timed(copy, output), timed(merge, output)
        shutil.rmtree(output)
        started = time.perf_counter()
        merge_adapter(args.folder / "adapter", output, verify=False)
        inside = time.perf_counter() - started
        print(
            f"cp -r {copied:.1f} s; merge_adapter {inside:.1f} s, ratio {inside / copied:.2f}; beft merge, its "
            f"imports included, {merged:.1f} s, ratio {merged / copied:.2f}, peak memory {peak / 2**20:.0f} MiB",
            flush=True,
        )
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
