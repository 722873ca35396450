"""Weights as files: what is in an adapter's folder, and what is wrong with a file."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME


PREFIX, SUFFIX = "base_model.model.", ".beft_bias"  # of the names in an adapter's file, around a module's path
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
    if not os.path.lexists(folder / ADAPTER_CONFIG_NAME):
        raise MergeError(f"{folder} holds no {ADAPTER_CONFIG_NAME}: give the folder that a BEFT run wrote.")
    config = read_json(folder / ADAPTER_CONFIG_NAME, remedy)
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
            raise MergeError(f"{folder / ADAPTER_CONFIG_NAME} is damaged: its {name} is {value!r}. {remedy}")
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


def load_tokenizer(base: str | Path, adapter: str | Path | None = None, **options: Any) -> Any:
    """The tokenizer in the folder of an adapter, or else that of its base; `options` are those of `from_pretrained`.

    Raises:
        OSError, ValueError: if it is not there, or damaged.
    """
    name = adapter if adapter is not None and any(Path(adapter).glob("tokenizer*")) else base
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):  # these say themselves what is wrong
        raise
    except DAMAGE as error:
        raise ValueError(f"The tokenizer of {name} cannot be read ({first_line(error)}).") from error


def let_others_read(file: Path, like: Path) -> None:
    """Gives a file of PEFT's or Transformers' the mode of another one: safetensors (0.8) lets only the owner read it,
    and a server often runs as another user.
    """
    shutil.copymode(like, file)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read if the process's umask lets them, see [`let_others_read`]."""
    file.write_bytes(save(dict(tensors), metadata))
