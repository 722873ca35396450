"""The base model of a recipe, looked at before anything of it is loaded: its configuration, and its weight files."""

import os
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..demo import DEMO_MODEL
from ..layout import find_bias_sites, skeleton_of
from ..merge.checkpoint_files import CheckpointFiles
from ..weight_files import AGAIN, DAMAGE, first_line


SAFE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
PICKLED = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def refuse_missing_model(name: str, revision: str = "main") -> None:
    """Refuses a base model that is not there, before a tokenizer, a configuration or weights are asked for.

    Args:
        name (`str`): a folder, or a name on the hub.
        revision (`str`, *optional*, defaults to `"main"`): on the hub.

    Raises:
        OSError: with how to make the demo's model, if it is that one.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            raise FileNotFoundError(f"model_name_or_path={name!r} has no {CONFIG_NAME}: give the folder of a model.")
        return
    if os.path.normpath(name) == str(DEMO_MODEL):
        raise FileNotFoundError(f"The demo's model is not in {name} yet. Make it: python -m beft_trl.demo")
    if is_path(name):
        raise FileNotFoundError(f"model_name_or_path={name!r} is no folder. Give a folder, or a model of the hub.")
    try:
        cached_file(name, CONFIG_NAME, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"model_name_or_path={name!r} is no folder here, and the hub gave no {CONFIG_NAME}: {reason}"
        ) from error


def is_path(name: str) -> bool:
    """Whether a name that is no folder cannot be one of the hub either."""
    more_than_a_name = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return not name or more_than_a_name or os.path.exists(name)


def base_skeleton(name: str, args: Any) -> Any:
    """The base model without weights.

    Args:
        name (`str`): of the model, or its folder.
        args (`TrainingArguments`): with `model_init_kwargs`.

    Raises:
        ImportError: for weights that are quantised by a package which is not installed.
        OSError, ValueError: for a configuration that makes no model.
    """
    try:
        skeleton = skeleton_of(name, args)
        _check_quantization(name, getattr(skeleton.config, "quantization_config", None))
        with suppress(OSError):  # there is none, or none that Transformers reads: it goes on without
            GenerationConfig.from_pretrained(name)
        return skeleton
    except (OSError, ValueError, ImportError):  # these say themselves what is wrong
        raise
    except DAMAGE as error:
        raise ValueError(
            f"The {CONFIG_NAME} of {name}, with model_init_kwargs, makes no model ({first_line(error)}). {AGAIN}"
        ) from error


def _check_quantization(name: str, quantization: Any) -> None:
    if quantization is None:
        return
    try:
        AutoHfQuantizer.from_config(quantization).validate_environment(device_map=None)
    except DAMAGE as error:
        raise ValueError(f"{name} is quantised in a way that cannot be read here: {first_line(error)}.") from error


def check_weights(name: str, args: Any, skeleton: Any) -> None:
    """Refuses a local folder whose weights are missing, damaged or those of another model.

    Transformers itself gives a tensor that is missing random values.

    Args:
        name (`str`): of the model, or its folder.
        args (`TrainingArguments`): with `model_init_kwargs`.
        skeleton (`PreTrainedModel`): the model without weights.

    Raises:
        OSError, ValueError: with the file and what is wrong with it.
    """
    folder = Path(name)
    if not folder.is_dir() or "gguf_file" in (args.model_init_kwargs or {}):
        return
    if any(path.is_symlink() for path in folder.glob("*.safetensors*")):
        return  # a merge reads no links out of a folder, and so does what it checks files with; a run does
    if any(os.path.lexists(folder / file) for file in SAFE):
        _check_files(CheckpointFiles(folder, skeleton), skeleton)
    elif not any((folder / file).is_file() for file in PICKLED):
        raise FileNotFoundError(f"{folder} has no {SAFE_WEIGHTS_NAME} and no other weights of a model. {AGAIN}")
    else:
        for file in folder.glob("pytorch_model*.bin"):
            _check_pickle(file)


def _check_pickle(file: Path) -> None:
    try:
        torch.load(file, map_location="meta", weights_only=True)  # reads no numbers
    except (*DAMAGE, UnpicklingError, EOFError) as error:
        raise ValueError(f"{file} is no weight file of PyTorch's ({first_line(error)}). {AGAIN}") from error


def _check_files(files: CheckpointFiles, skeleton: Any) -> None:
    """Refuses files without some of the projections' tensors, or with some of other sizes."""
    if not files.file_of:
        raise ValueError(f"{files.folder} has weight files without tensors. {AGAIN}")
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return  # packed weights have names and sizes of their own
    modules = {site.module: site.has_bias for site in find_bias_sites(skeleton)}
    if not any(files.has_weight(module) for module in modules):
        return  # names that Transformers converts as it loads
    for module, has_bias in modules.items():
        for tensor in ("weight", "bias")[: 1 + has_bias]:
            files.entry(module, tensor)
    files.check_embedding()
