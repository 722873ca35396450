"""What accelerate, DeepSpeed and bitsandbytes keep to themselves."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn


def forget_preparation(model: nn.Module, accelerator: Accelerator) -> None:
    """Takes off what `accelerator.prepare` put around the forward pass, and its mark that it was there.

    With the mark and without the autocast wrapper, accelerate would leave the model as it is in the next run, which
    then computes in fp32; and after an evaluation it would leave out DDP. Seen in accelerate 1.15. This goes when its
    `unwrap_model` takes the mark off too.
    """
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)


# How a parameter finds its fp32 copy in the engine: under ZeRO-1 and 2, and under ZeRO-3. DeepSpeed 0.19.
_MASTER_LINKS = ("_hp_mapping", "_z3_optimizer")


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 has split a parameter, which is then empty between its uses (DeepSpeed 0.19, `ds_id`)."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, of the whole one if ZeRO-3 has split it (DeepSpeed 0.19, `ds_shape`)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def has_fp32_copy(parameter: Any) -> bool:
    """Whether a DeepSpeed engine holds an fp32 copy of a parameter.

    Raises:
        RuntimeError: if the parameter is in 16 bits, which only an engine does to a delta, and no copy is found.
    """
    held = any(hasattr(parameter, link) for link in _MASTER_LINKS)
    if not held and parameter.dtype.itemsize < torch.float32.itemsize:
        raise RuntimeError(
            f"A trained parameter is in {parameter.dtype}, and no fp32 copy of it was found: this version of "
            "DeepSpeed keeps them elsewhere, and what would be saved is rounded. Use DeepSpeed 0.19."
        )
    return held


def forget_engine(model: nn.Module) -> None:
    """Takes the links to a destroyed DeepSpeed engine off the parameters: its fp32 copies are stale, or freed."""
    for parameter in model.parameters():
        for link in _MASTER_LINKS:
            if hasattr(parameter, link):
                delattr(parameter, link)


def keep_4bit_trainable(model: nn.Module) -> None:
    """Keeps the weights of bitsandbytes' 4-bit layers in the layout that gradients can pass.

    On a CPU with AVX512-BF16, `Linear4bit` packs its weights for inference at its first forward in eval mode, and a
    training step after an evaluation fails on them. Seen in bitsandbytes 0.50. This goes when it can train on packed
    weights.

    Raises:
        ValueError: if weights are packed already. bitsandbytes unpacks them to other values.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of this model ({name} first) were packed for inference when it answered in "
                    "eval mode on this CPU, and cannot be trained on any more. Load the model again and make the "
                    "trainer before anything is evaluated."
                )
