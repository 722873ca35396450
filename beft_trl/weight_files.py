"""Weights as files: what is in an adapter's folder and a checkpoint's, and a copy of one with other biases."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


PREFIX, SUFFIX = "base_model.model.", ".beft_bias"


class MergeError(ValueError):
    """An adapter that cannot be merged, with the reason and what would work. Nothing was written."""


@dataclass
class AdapterContent:
    """What an adapter's folder holds.

    Attributes:
        deltas: fp32, shape (n,), by the path of their module.
        saved_whole: tensors of modules that were trained whole, such as a task's head, by name.
        base_model: name or path of the base model, where the adapter says it.
    """

    deltas: dict[str, Tensor]
    saved_whole: dict[str, Tensor]
    base_model: str | None


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuses a file that a link or a name leads out of its folder. The links of a hub cache stay in it.

    Raises:
        MergeError: with the file, and where it leads.
    """
    home = folder.resolve()
    homes = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(path.resolve().is_relative_to(each) for each in homes):
        raise MergeError(
            f"{path} leads out of its folder, to {path.resolve()}: it is not read. Put the file itself there."
        )


def read_adapter(folder: Path) -> AdapterContent:
    """Reads the folder of an adapter.

    Raises:
        MergeError: where the folder holds no BEFT adapter, or a damaged one.
    """
    if not (folder / "adapter_config.json").is_file():
        raise MergeError(f"{folder} holds no adapter_config.json: give the folder that a BEFT run wrote.")
    for file in (folder / "adapter_config.json", folder / ADAPTER_SAFE_WEIGHTS_NAME):
        refuse_outside(file, folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config["peft_type"]
        modules = config.get("modules_to_save") or []
        if not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
            raise ValueError(f"modules_to_save is {modules!r}, and must be a list of names")
        tensors = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MergeError(
            f"The adapter in {folder} cannot be read ({error}): it is damaged or incomplete. Take another checkpoint."
        ) from error
    saved = [f".{module}." for module in modules]
    deltas, saved_whole, foreign = {}, {}, []
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and name.endswith(SUFFIX):
            deltas[path.removesuffix(SUFFIX)] = tensor.float().flatten()
        elif any(module in f".{path}" for module in saved):
            saved_whole[path] = tensor
        else:
            foreign.append(name)
    if kind != "BEFT" or foreign or not deltas:
        found = f"its type is {kind}" if kind != "BEFT" else f"it holds {', '.join(foreign[:2]) or 'no tensor'}"
        raise MergeError(f"{folder} is no BEFT adapter: {found}. Merge others with PEFT's own merge_and_unload.")
    named = {f"The delta of {path}": values for path, values in deltas.items()} | saved_whole
    broken = next((name for name, values in named.items() if not values.isfinite().all()), None)
    if broken:
        raise MergeError(f"{broken} in {folder} is not finite: the run broke. Take an earlier checkpoint.")
    return AdapterContent(deltas, saved_whole, config.get("base_model_name_or_path"))


class CheckpointFiles:
    """The weight files of a folder, and where a module's tensors are in them."""

    def __init__(self, folder: Path, skeleton: Any):
        self.folder = folder
        self._base_prefix = f"{skeleton.base_model_prefix}."
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            self.file_of = _weight_map(index)
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            self.file_of = dict.fromkeys(_names(folder / SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
        else:
            raise MergeError(
                f"{folder} has no model.safetensors and no index of safetensors shards. Load the model with "
                "Transformers and write it with save_pretrained first."
            )
        self.shards = sorted(set(self.file_of.values()))
        missing = [shard for shard in self.shards if not (folder / shard).is_file()]
        if missing:
            raise MergeError(f"{folder} lacks {missing[0]}, which its index names. Download the model again.")
        for shard in self.shards:
            refuse_outside(folder / shard, folder)
            absent = {name for name, file in self.file_of.items() if file == shard} - set(_names(folder / shard))
            if absent:
                raise MergeError(
                    f"{folder / shard} has no tensor {min(absent)}, which the index says is in it. Download the model "
                    "again."
                )

    def name(self, path: str, tensor: str) -> str:
        """The name in the files of a tensor of the module at `path`; weights tell it for biases that are to come.

        Files may leave out or add the base model's prefix, and keep an older order of a name's parts.
        """
        for candidate in (path, path.removeprefix(self._base_prefix), f"{self._base_prefix}{path}"):
            if f"{candidate}.weight" in self.file_of:
                return f"{candidate}.{tensor}"
        parts = path.split(".")
        near = [
            name.removesuffix(".weight")
            for name in self.file_of
            if name.endswith(".weight") and sorted(name.split(".")[:-1]) == sorted(parts)
        ]
        if len(near) == 1:
            return f"{near[0]}.{tensor}"
        raise MergeError(
            f"{self.folder} has no tensor {path}.weight: its names are not those of the model's modules. Load the "
            "model with Transformers and write it with save_pretrained first."
        )

    def tensor(self, path: str, tensor: str) -> Tensor:
        name = self.name(path, tensor)
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    def dtype(self, path: str) -> torch.dtype:
        name = self.name(path, "weight")
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_slice(name)[:0].dtype

    def _check_size(self, name: str, shape: tuple[int, ...], values: Tensor) -> None:
        if len(values) not in shape:
            raise MergeError(
                f"{name} in {self.folder} has the shape {shape}, and the adapter and the configuration say "
                f"{len(values)} outputs. Give the base that the adapter was trained on, with its own config.json."
            )

    def copy_with(
        self, add: dict[str, Tensor], create: dict[str, Tensor], folder: Path, link: bool = False
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """Copies the files to `folder` with changed and new biases in them.

        Args:
            add: fp32, shape (n,), by module path: what is added to existing biases.
            create: the same for biases that are to come, which go into a file of their own.
            folder: where to, empty of weights.
            link: hard-link the files that do not change.

        Returns:
            The names of the changed and of the new tensors, and xxh3-128 of the source's files that were copied.
        """
        changed: dict[str, dict[str, Tensor]] = {}
        for path, delta in add.items():
            name = self.name(path, "bias")
            bias = self.tensor(path, "bias")
            self._check_size(name, tuple(bias.shape), delta)
            changed.setdefault(self.file_of[name], {})[name] = (bias.float() + delta).to(bias.dtype)
        added = {}
        for path, values in create.items():
            name = self.name(path, "weight")
            with safe_open(self.folder / self.file_of[name], "pt") as file:
                self._check_size(name, tuple(file.get_slice(name).get_shape()), values)
            added[self.name(path, "bias")] = values.to(self.dtype(path))

        count = len(self.shards) + bool(added)
        new_name = {shard: _shard_name(number, count) for number, shard in enumerate(self.shards, 1)}
        if not added:
            new_name = {shard: shard for shard in self.shards}
        with ThreadPoolExecutor() as pool:
            hashes = {}
            copies = []
            for shard in self.shards:
                source, target = self.folder / shard, folder / new_name[shard]
                if link and shard not in changed:
                    os.link(source.resolve(), target)
                    continue
                hashes[shard] = pool.submit(xxh3, source)
                copies.append(pool.submit(_copy_and_patch, source, target, changed.get(shard, {})))
            for copy_done in copies:
                copy_done.result()
        if added:
            last = _shard_name(count, count)
            save_file(added, folder / last, metadata={"format": "pt"})
            weight_map = {name: new_name[shard] for name, shard in self.file_of.items()} | dict.fromkeys(added, last)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        elif (self.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            shutil.copyfile(self.folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
        names = sorted(name for shard in changed.values() for name in shard)
        return names, sorted(added), {shard: future.result() for shard, future in hashes.items()}


def _weight_map(index: Path) -> dict[str, str]:
    refuse_outside(index, index.parent)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(Path(file).name == file and "\\" not in file for file in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MergeError(
            f"{index} is damaged ({type(error).__name__}: {error}): it must map tensors to files. Download the model "
            "again."
        ) from error
    if not plain or not weight_map:
        outside = next((file for file in weight_map.values() if Path(file).name != file), "no file")
        raise MergeError(f"{index} names {outside}, and its files must stand next to it. Download the model again.")
    return weight_map


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{file} is damaged ({error}). Download the model again.") from error


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def xxh3(file: Path, size: int = 1 << 22) -> str:
    """The xxh3-128 of a file, read `size` bytes at a time."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(size))
    with open(file, "rb", buffering=0) as reading:
        while count := reading.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _copy_and_patch(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    shutil.copyfile(source, target)  # in the kernel, so that the bytes do not pass through this process
    _patch(target, tensors)


def _patch(file: Path, tensors: dict[str, Tensor]) -> None:
    """Overwrites tensors of a safetensors file by others of their shape and dtype. Its header stays as it is.

    Format: https://huggingface.co/docs/safetensors, 8 bytes with the header's length, the header in JSON, the data.
    """
    if not tensors:
        return
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in tensors.items():
            start, end = header[name]["data_offsets"]
            data = save({name: tensor.contiguous()})
            stream.seek(8 + length + start)
            stream.write(data[len(data) - (end - start) :])
