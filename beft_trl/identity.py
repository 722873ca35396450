"""What identifies a run: its base model, its data and its settings, as plain values that a checkpoint keeps."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import CONFIG_NAME

from .compat.engines import is_split
from .compat.models import local_file, revision_of


SAMPLED_ROWS = 1024
SAMPLED_ELEMENTS = 64  # of each parameter
SAMPLED_PARTS, PART_BYTES = 64, 4096  # of each file
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")
# The beginnings of the names of settings that do not change what is trained: where and how often a run reports,
# evaluates and saves, what it computes in and with, and what is recorded elsewhere (term, dtype, engine).
WITHOUT_EFFECT = (
    "output_dir", "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "include_",
    "eval_", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "bf16_full_eval",
    "fp16_full_eval", "save_", "enable_jit_checkpoint", "push_to_hub", "hub_", "do_", "debug", "skip_memory_metrics",
    "resume_from_checkpoint", "restore_callback_states", "allow_changed_resume", "trust_checkpoint",
    "ignore_data_skip", "local_rank", "use_cpu", "ddp_", "fsdp", "deepspeed", "parallelism_config", "full_determinism",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "dataset_num_proc", "gradient_checkpointing",
    "activation_", "torch_compile", "torch_empty_cache_steps", "use_cache", "use_liger_kernel", "tf32",
    "model_init_kwargs", "trust_remote_code", "bias_term", "bias_layers", "score_", "cache_frozen_layers",
)  # fmt: skip
# What a checkpoint must share with a run in any case: its deltas mean nothing on another base.
FIXED = ("base_files", "base_biases", "base_weights", "quantization")


def identify_run(model: Any, args: Any, dataset: Any, base: dict[str, str | None]) -> dict[str, Any]:
    """What makes a run this run, in values that JSON keeps.

    Args:
        model (`PreTrainedModel`): the base model.
        args (`TrainingArguments`): the settings.
        dataset: the training rows as the trainer takes them.
        base (`dict`): what [`identify_base`] gave before the model trained.

    Returns:
        `dict`: `base_model`, `revision`, what `base` holds, `dtype`, `quantization`, `rows`, `data` (a hash of up to
        1,024 rows, `None` for a stream) and every setting that can change the result.
    """
    rows, data = _data(dataset)
    settings = {name: value for name, value in args.to_dict().items() if not name.startswith(WITHOUT_EFFECT)}
    identity = {
        "base_model": model.name_or_path,
        "revision": revision_of(model.config),
        **base,
        "dtype": str(model.dtype),
        "quantization": quantization_of(model.config),
        "rows": rows,
        "data": data,
        **settings,
    }
    return json.loads(json.dumps(identity, default=str))


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The configuration that a model was quantised with, as plain values; `None` for one that was not."""
    quantization: Any = getattr(config, "quantization_config", None)
    return quantization.to_diff_dict() if hasattr(quantization, "to_diff_dict") else quantization


def differences(recorded: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two runs: name, and the two values. What only one of them knows does not count.

    A base model is the same if its files are, or else its weights in memory, or else its name.
    """
    tellers = ("base_files", "base_weights", "base_model")
    teller = next((name for name in tellers if None not in (recorded.get(name), current.get(name))), None)
    passed_over = {*tellers, "revision"} - {teller, "revision" if teller == "base_model" else teller}
    shared = [name for name in current if name in recorded and name not in passed_over]
    unknown = ("data", "rows", "revision", "base_biases")
    return {
        name: (recorded[name], current[name])
        for name in shared
        if recorded[name] != current[name] and not (name in unknown and None in (recorded[name], current[name]))
    }


def identify_base(model: Any, name: str | None = None) -> dict[str, str | None]:
    """Hashes that tell a base model from another one of its shapes, taken before it trains.

    Args:
        model (`PreTrainedModel`): the base model.
        name (`str`, *optional*): name or path that it was loaded by, if the trainer loaded it.

    Returns:
        `dict`: for a model that was named `base_files`, of some bytes of each weight file, and `base_biases`, of all
        biases in them, `None` if there are none; `base_weights`, of some elements of each frozen parameter, `None` if
        they are split by ZeRO-3 or not loaded.
    """
    revision = revision_of(model.config)
    return {
        "base_files": _hash_files(name, revision) if name else None,
        "base_biases": _hash_biases(name, revision) if name else None,
        "base_weights": _hash_weights(model),
    }


def _hash_files(name: str, revision: str | None) -> str | None:
    config = local_file(name, CONFIG_NAME, revision)
    if config is None:
        return None
    digest = xxhash.xxh3_128()
    folder = Path(config).parent
    for file in sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for part in range(SAMPLED_PARTS):
                stream.seek(part * size // SAMPLED_PARTS)
                digest.update(stream.read(PART_BYTES))
    return digest.hexdigest()


def _hash_biases(name: str, revision: str | None) -> str | None:
    """Of all biases: a model with an adapter merged into it has those of the base no more, and nothing else is new."""
    config = local_file(name, CONFIG_NAME, revision)
    if config is None:
        return None
    digest, count = xxhash.xxh3_128(), 0
    for file in sorted(Path(config).parent.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(file, "pt") as tensors:  # a damaged one does not load anyway
            for bias in sorted(filter(lambda each: each.endswith(".bias"), tensors.keys())):
                digest.update(bias.encode())
                digest.update(tensors.get_tensor(bias).flatten().view(torch.uint8).numpy().tobytes())
                count += 1
    return digest.hexdigest() if count else None


def _hash_weights(model: nn.Module) -> str | None:
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if is_split(parameter) or parameter.is_meta:
            return None
        if parameter.requires_grad or not parameter.numel():
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[torch.tensor(spread(len(flat), SAMPLED_ELEMENTS), device=flat.device)]
        digest.update(f"{name.replace('.base_layer', '')}{tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _data(dataset: Any) -> tuple[int | None, str | None]:
    """Number of rows, and a hash of up to `SAMPLED_ROWS` of them, evenly spaced."""
    if not hasattr(dataset, "__len__"):
        return None, None
    count = len(dataset)
    index = spread(count, SAMPLED_ROWS)
    if isinstance(dataset, Dataset):
        # As Arrow holds them: a transform may draw something else each time.
        sample: Any = dataset.with_format("arrow")[index].to_pydict()
    elif isinstance(dataset, Sequence):
        sample = [dataset[row] for row in index]
    else:
        return count, None  # rows of a Dataset of PyTorch's may be made when they are asked for
    return count, xxhash.xxh3_128(json.dumps(sample, default=_plain).encode()).hexdigest()


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices of `count`, from the first to the last. In whole numbers: fp32 has none above 2**24."""
    wanted = min(count, wanted)
    return [number * (count - 1) // max(wanted - 1, 1) for number in range(wanted)]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
