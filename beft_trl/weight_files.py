"""Weights as files: what is in an adapter's folder and a checkpoint's, and a copy of one with other biases."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


PREFIX, SUFFIX = "base_model.model.", ".beft_bias"
# By the names that safetensors has for them: what holds a bias without rounding a delta away.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What Transformers, PEFT and safetensors raise on damaged files; these have no ancestor of their own.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
AGAIN = "Download the model again."


class MergeError(ValueError):
    """An adapter that cannot be merged, with the reason and what would work. Nothing was written."""


@dataclass
class AdapterContent:
    """What an adapter's folder holds.

    Attributes:
        deltas: fp32, shape (n,), by the path of their module.
        saved_whole: tensors of modules that were trained whole, such as a task's head, by name.
        base_model: name or path of the base model, if the adapter says it.
    """

    deltas: dict[str, Tensor]
    saved_whole: dict[str, Tensor]
    base_model: str | None


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuses a file that a link leads out of its folder. The links of a hub cache lead to its own blobs.

    Args:
        path (`Path`): the file.
        folder (`Path`): of the base model or the adapter, which it must be in.

    Raises:
        MergeError: with the file, and where it leads.
    """
    if path.is_symlink() and not path.exists():
        raise MergeError(f"{path} is a link to {os.readlink(path)}, which is not there. Put the file itself there.")
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        homes.append(home.parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(each) for each in homes):
        raise MergeError(
            f"{path} leads out of its folder, to {path.resolve()}: it is not read. Put the file itself there."
        )


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The object that a JSON file of a base model or an adapter holds.

    Args:
        file (`Path`): the file.
        remedy (`str`): what to do if it is damaged, as a sentence.

    Raises:
        MergeError: if the file is no JSON object, or a link leads out of its folder.
    """
    refuse_outside(file, file.parent)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{file} cannot be read ({error}): it is damaged or incomplete. {remedy}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{file} holds a {type(content).__name__}, and must hold names with values. {remedy}")
    return content


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its type, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def read_adapter(folder: Path) -> AdapterContent:
    """Reads the folder of an adapter.

    Args:
        folder (`Path`): of an adapter that this package or plain PEFT wrote.

    Returns:
        `AdapterContent`: its tensors, and its base model's name.

    Raises:
        MergeError: if the folder holds no BEFT adapter, or a damaged one.
    """
    remedy = "Take another checkpoint."
    if not folder.is_dir():
        raise MergeError(f"There is no folder {folder}: give the folder of an adapter that a BEFT run wrote.")
    if not os.path.lexists(folder / "adapter_config.json"):
        raise MergeError(f"{folder} holds no adapter_config.json: give the folder that a BEFT run wrote.")
    config = read_json(folder / "adapter_config.json", remedy)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    modules = config.get("modules_to_save") or []
    if kind != "BEFT":
        raise MergeError(
            f"{folder} is no BEFT adapter: its type is {kind}. Merge others with PEFT's own merge_and_unload."
        )
    for name, value, fits in (
        ("base_model_name_or_path", base, base is None or isinstance(base, str)),
        ("modules_to_save", modules, isinstance(modules, list) and all(isinstance(each, str) for each in modules)),
    ):
        if not fits:
            raise MergeError(f"{folder / 'adapter_config.json'} is damaged: its {name} is {value!r}. {remedy}")
    weights = folder / ADAPTER_SAFE_WEIGHTS_NAME
    refuse_outside(weights, folder)
    try:
        tensors = load_file(weights)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MergeError(f"{weights} cannot be read ({error}): it is damaged or incomplete. {remedy}") from error
    saved = [f".{module}." for module in modules]
    deltas, saved_whole, foreign = {}, {}, []
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and name.endswith(SUFFIX):
            if tensor.shape[:-1] != (1,) or not tensor.numel() or tensor.dtype not in FLOATS.values():
                raise MergeError(
                    f"{name} in {folder} is of shape {tuple(tensor.shape)} in {tensor.dtype}, and the delta of a bias "
                    f"is one row of floating-point numbers. {remedy}"
                )
            deltas[path.removesuffix(SUFFIX)] = tensor.float().flatten()
        elif any(module in f".{path}" for module in saved):
            saved_whole[path] = tensor
        else:
            foreign.append(name)
    if foreign or not deltas:
        raise MergeError(
            f"{folder} is no BEFT adapter: it holds {', '.join(foreign[:2]) or 'no delta'}. Merge others with PEFT's "
            "own merge_and_unload."
        )
    named = {f"The delta of {path}": values for path, values in deltas.items()} | saved_whole
    broken = next((name for name, values in named.items() if not values.double().isfinite().all()), None)
    if broken:
        raise MergeError(f"{broken} in {folder} is not finite: the run broke. Take an earlier checkpoint.")
    return AdapterContent(deltas, saved_whole, base)


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

    def has(self, path: str, tensor: str) -> bool:
        """Whether the files hold a tensor of the module at `path`, as far as its name tells."""
        try:
            return self.name(path, tensor) in self.file_of
        except MergeError:
            return False

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


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read if the process's umask lets them.

    `save_file` of safetensors (0.8) lets only its owner, and a server often runs as another user.
    """
    file.write_bytes(save(dict(tensors), metadata))


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


def xxh3(file: Path, size: int = 1 << 22) -> str:
    """The xxh3-128 of a file, read `size` bytes at a time."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(size))
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
