"""The weight files of a base model, and a copy of them with other biases."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..weight_files import AGAIN, FLOATS, MergeError, read_json, refuse_outside, write_tensors


class CheckpointFiles:
    """The weight files of a folder, and where a module's tensors are in them."""

    def __init__(self, folder: Path, skeleton: Any):
        self.folder, self._skeleton = folder, skeleton
        self._base_prefix = f"{skeleton.base_model_prefix}."
        single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
        self.index = index if os.path.lexists(index) else None
        if self.index is not None:
            self.file_of = _weight_map(index)
            others = set(self.file_of.values()) - {SAFE_WEIGHTS_NAME}
            if others and os.path.lexists(single):
                raise MergeError(
                    f"{folder} has {SAFE_WEIGHTS_NAME}, which Transformers loads, and an index that names "
                    f"{min(others)}: two sets of weights. Remove {SAFE_WEIGHTS_INDEX_NAME}, or {SAFE_WEIGHTS_NAME}, "
                    "whichever is older."
                )
        elif os.path.lexists(single):
            self.file_of = dict.fromkeys(_names(single), SAFE_WEIGHTS_NAME)
        else:
            raise MergeError(
                f"{folder} has no model.safetensors and no index of safetensors shards. Load the model with "
                "Transformers and write it with save_pretrained first."
            )
        self.shards = sorted(set(self.file_of.values()))
        missing = [shard for shard in self.shards if not os.path.lexists(folder / shard)]
        if missing:
            raise MergeError(f"{folder} lacks {missing[0]}, which its index names. {AGAIN}")
        for shard in self.shards:
            names = set(_names(folder / shard))
            absent = {name for name, file in self.file_of.items() if file == shard} - names
            if absent:
                raise MergeError(
                    f"{folder / shard} has no tensor {min(absent)}, which the index says is in it. {AGAIN}"
                )
            twice = {name for name in names & self.file_of.keys() if self.file_of[name] != shard}
            if twice:
                raise MergeError(
                    f"{min(twice)} is in {folder / shard}, too, and the index says that it is in "
                    f"{self.file_of[min(twice)]}. {AGAIN}"
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

    def has_weight(self, path: str) -> bool:
        """Whether the files hold the weight of the module at `path`, as far as its name tells."""
        try:
            return self.name(path, "weight") in self.file_of
        except MergeError:
            return False

    def check_embedding(self) -> None:
        """Raises MergeError if the files hold the embedding, and in another shape than the configuration says."""
        embedding = self._skeleton.get_input_embeddings()
        path = next(path for path, module in self._skeleton.named_modules() if module is embedding)
        if self.has_weight(path):
            self.entry(path, "weight")

    def tensor(self, path: str, tensor: str) -> Tensor:
        name, _ = self.entry(path, tensor)
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    def entry(self, path: str, tensor: str) -> tuple[str, torch.dtype]:
        """The name in the files and the dtype of a tensor of the module at `path`.

        Args:
            path (`str`): of the module in the model.
            tensor (`str`): `"weight"` or `"bias"`.

        Raises:
            MergeError: if the files lack it, or hold it in another shape than the model's or in no dtype for biases.
        """
        name = self.name(path, tensor)
        if name not in self.file_of:
            raise MergeError(
                f"{self.folder} has no tensor {name}, and its config.json says that there is one. {AGAIN}"
            )
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            found = file.get_slice(name)
            shape, kind = tuple(found.get_shape()), found.get_dtype()
        expected = tuple(getattr(self._skeleton.get_submodule(path), tensor).shape)
        if shape != expected:
            raise MergeError(
                f"{name} in {self.folder} has the shape {shape}, and its config.json says {expected}: weights and "
                f"configuration are of two models. {AGAIN}"
            )
        if kind not in FLOATS:
            raise MergeError(
                f"{name} in {self.folder} is stored as {kind}, which rounds biases away. Give the base in 16 or 32 "
                "bits."
            )
        return name, FLOATS[kind]

    def copy_with(
        self,
        add: dict[str, Tensor],
        create: dict[str, Tensor],
        folder: Path,
        link: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[str], list[str], dict[str, str], set[torch.dtype]]:
        """Copies the files to `folder` with changed and new biases in them.

        Args:
            add (`dict[str, Tensor]`): fp32, shape (n,), by module path: what is added to existing biases, which keep
                their dtype.
            create (`dict[str, Tensor]`): the same for biases that are to come, which go into a file of their own.
            folder (`Path`): where to, empty of weights.
            link (`bool`, *optional*, defaults to `False`): hard-link the files that do not change.
            dtype (`torch.dtype`, *optional*): that the model is loaded in. Biases that are to come are written in
                it or in the dtype of their weights, whichever holds the other.

        Returns:
            The names of the changed and of the new tensors, xxh3-128 of the source's files that were copied, and the
            dtypes of the changed and new tensors.

        Raises:
            MergeError: if the files do not fit the model.
            OSError: if a file cannot be read or written.
        """
        changed: dict[str, dict[str, Tensor]] = {}
        for path, delta in add.items():
            name, kept = self.entry(path, "bias")
            bias = self.tensor(path, "bias")
            total = bias.to(torch.promote_types(kept, torch.float32)) + delta
            changed.setdefault(self.file_of[name], {})[name] = _rounded(total, kept, name)
        added = {}
        for path, values in create.items():
            stored, name = self.entry(path, "weight")[1], self.name(path, "bias")
            if name in self.file_of:
                raise MergeError(f"{self.folder} has a {name}, and its config.json says that there is none. {AGAIN}")
            added[name] = _rounded(values, torch.promote_types(stored, dtype or stored), name)
        written = {tensor.dtype for tensors in (*changed.values(), added) for tensor in tensors.values()}

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
                    _link(source.resolve(), target)
                    continue
                hashes[shard] = pool.submit(xxh3, source)
                copies.append(pool.submit(copy_and_patch, source, target, changed.get(shard, {})))
            for copy_done in copies:
                copy_done.result()
        if added:
            last = _shard_name(count, count)
            write_tensors(folder / last, added, {"format": "pt"})
            weight_map = {name: new_name[shard] for name, shard in self.file_of.items()} | dict.fromkeys(added, last)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        elif self.index is not None:
            shutil.copyfile(self.index, folder / SAFE_WEIGHTS_INDEX_NAME)
        names = sorted(name for shard in changed.values() for name in shard)
        return names, sorted(added), {shard: future.result() for shard, future in hashes.items()}, written


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError(f"{index} is damaged: it has no weight_map from tensors to files. {AGAIN}")
    for name, file in weight_map.items():
        # Windows takes a drive before a colon, and either slash.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
            raise MergeError(
                f"{index} says that {name} is in {file!r}, which is no name of a safetensors file next to it. {AGAIN}"
            )
    return weight_map


def _names(file: Path) -> list[str]:
    refuse_outside(file, file.parent)
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise MergeError(f"{file} cannot be read ({error}): it is damaged or incomplete. {AGAIN}") from error


def _rounded(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = values.to(dtype)
    if not rounded.isfinite().all():
        raise MergeError(
            f"{name} would not be finite in {dtype}: the base is damaged, or the bias is beyond that dtype. Give the "
            "base in float32."
        )
    return rounded


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise OSError(
            f"{source} cannot be hard-linked to {target.parent} ({error.strerror}). Merge without link, which copies."
        ) from error


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def xxh3(file: Path) -> str:
    """The xxh3-128 of a file, read 4 MiB at a time."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as reading:
        while count := reading.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def copy_and_patch(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
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
