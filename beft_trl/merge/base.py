"""The base model of a merge: its folder, configuration and shapes, and the models that a merge loads."""

import os
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..layout import build_skeleton, features
from ..weight_files import AGAIN, DAMAGE, FLOATS, MergeError, first_line, read_json


# Weights that are not merged: not copied, nor downloaded.
OTHER_WEIGHT_FILES = (
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)


def find_base(base: str | Path | None) -> Path:
    if not base:
        raise MergeError("The adapter does not say what its base model was: give it as base.")
    folder = Path(base)
    if folder.is_file():
        raise MergeError(f"The base {base} is a file: give the folder of a model, or its name on the hub.")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(base), ignore_patterns=list(OTHER_WEIGHT_FILES)))
        except Exception as error:  # the hub's errors have no common ancestor
            raise MergeError(
                f"The base model {base} is neither a folder nor a model of the hub that can be reached "
                f"({first_line(error)}). Give its folder as base."
            ) from error
    if os.path.lexists(folder / ADAPTER_CONFIG_NAME):
        raise MergeError(
            f"The base {folder} holds an adapter itself, which Transformers would load instead of its weights. Give "
            "the folder of the plain model, or merge that adapter first."
        )
    return folder


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a base or a task model."""
    if not os.path.lexists(folder / CONFIG_NAME):
        raise MergeError(f"{folder} has no {CONFIG_NAME}: give the folder of a Transformers model.")
    names = read_json(folder / CONFIG_NAME, AGAIN).get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise MergeError(f"{folder / CONFIG_NAME} is damaged: its architectures are {names!r}. {AGAIN}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except DAMAGE as error:
        raise MergeError(
            f"{folder / CONFIG_NAME} is no configuration of a model that Transformers "
            f"{transformers.__version__} knows ({first_line(error)}). {AGAIN}"
        ) from error
    if config.dtype is not None and config.dtype not in FLOATS.values():
        raise MergeError(
            f"{folder / CONFIG_NAME} says that the model is in {config.dtype}, which rounds biases away. Give the "
            "base in 16 or 32 bits."
        )
    return config


def skeleton_in(config: PreTrainedConfig, folder: Path) -> Any:
    try:
        return build_skeleton(config)
    except DAMAGE as error:
        raise MergeError(
            f"No model can be built from {folder / CONFIG_NAME} ({first_line(error)}): it is damaged. {AGAIN}"
        ) from error


def check_fit(deltas: dict[str, Tensor], skeleton: nn.Module, adapter: Path) -> None:
    for path, delta in deltas.items():
        try:
            size = features(skeleton.get_submodule(path))[1]
        except AttributeError:
            raise MergeError(
                f"{adapter} and the base do not match: the adapter has a delta for {path}, and "
                f"{type(skeleton).__name__} has no linear layer there. Give the base that it was trained on."
            ) from None
        if size != len(delta):
            raise MergeError(
                f"{adapter} and the base do not match: the delta of {path} has {len(delta)} values, the layer has "
                f"{size} outputs. Give the base that it was trained on."
            )


def load_model(
    folder: Path, config: PreTrainedConfig, default: str = "AutoModelForCausalLM", **kwargs: Any
) -> tuple[Any, dict[str, set[str]]]:
    """The model of a folder, and which of its tensors are missing, unexpected or of other shapes than it has."""
    architecture: Any = getattr(transformers, (config.architectures or [default])[0], None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        architecture = getattr(transformers, default)
    kwargs = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True} | kwargs
    if not (folder / CONFIG_NAME).is_file():
        # A merged folder gets its configuration at the very end, and Transformers looks there for this one.
        kwargs["generation_config"] = GenerationConfig()
    try:
        model, loading = architecture.from_pretrained(folder, config=config, **kwargs)
        # Those of other shapes come with both shapes.
        names = {each if isinstance(each, str) else each[0] for each in loading["mismatched_keys"]}
        return model, {kind: set(found) for kind, found in loading.items()} | {"mismatched_keys": names}
    except ImportError:
        raise  # of a package that is not installed, with how to get it
    except DAMAGE as error:
        raise MergeError(
            f"{folder} does not load as {architecture.__name__} ({first_line(error)}). Its files are damaged, or its "
            f"{CONFIG_NAME} is of another model. {AGAIN}"
        ) from error


def refuse_other_shapes(loading: dict[str, set[str]], base: Path, model: Any) -> None:
    if loading["mismatched_keys"]:
        raise MergeError(
            f"{base} does not load into {type(model).__name__}: {min(loading['mismatched_keys'])} is of "
            f"another shape than {CONFIG_NAME} says. {AGAIN}"
        )
