"""The engines and precisions that work together, what each asks for, and what is refused."""

import os
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.utils import is_bitsandbytes_available


logger = get_logger(__name__)

# Every cell of the two works, some on a `condition`, which `refuse_cell` enforces.
ENGINES = {
    "single": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offloaded",
}
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "8bit": "8-bit", "4bit": "4-bit"}
SPLIT_AT_LOADING = ("zero3", "zero3_offload")
OFFLOADED = ("optimizer", "param")
NO_FSDP = "it has not been shown to keep fp32 biases next to frozen weights. Use DeepSpeed ZeRO-3."


def engine_of(args: TrainingArguments) -> str:
    """The name in `ENGINES` of the engine that `args` and the launcher ask for.

    Raises:
        ValueError: for an engine that is not among them.
    """
    plugin = args.deepspeed_plugin
    zero = plugin.hf_ds_config.config.get("zero_optimization", {}) if plugin is not None else None
    return name_engine(args.world_size, zero, bool(args.fsdp))


def name_engine(processes: int, zero: dict[str, Any] | None, fsdp: bool) -> str:
    """The name in `ENGINES` of an engine.

    Args:
        processes: number of processes.
        zero: `zero_optimization` of DeepSpeed's configuration, or `None` without DeepSpeed.
        fsdp: whether it is FSDP.

    Raises:
        ValueError: for FSDP and ZeRO's stage 0.
    """
    if fsdp:
        raise ValueError(
            f"FSDP is not supported: {NO_FSDP} It splits the weights too: beft train RECIPE --launch zero3."
        )
    if zero is None:
        return "ddp" if processes > 1 else "single"
    stage = zero.get("stage", 0)
    if stage == 0:
        raise ValueError(
            "DeepSpeed with zero_stage 0 is plain data parallel training: use beft train RECIPE --launch ddp, or "
            "zero_stage 1."
        )
    devices = [(zero.get(f"offload_{what}") or {}).get("device") for what in OFFLOADED]
    return f"zero{stage}" + ("_offload" if stage == 3 and set(devices) - {None, "none"} else "")


def precision_of(quantization: BitsAndBytesConfig | None, dtype: Any) -> str:
    """The name in `PRECISIONS` of a base loaded in `dtype` (a torch dtype or its name) with `quantization`."""
    if quantization is not None and getattr(quantization, "load_in_8bit", False):
        return "8bit"
    if quantization is not None and getattr(quantization, "load_in_4bit", False):
        return "4bit"
    return "bf16" if _name(dtype) == "bfloat16" else "fp32"


def slow_16_bits(device: torch.device) -> bool:
    """Whether `device` is a processor without instructions for bf16 and fp16, which it multiplies number by number.

    On an x86 CPU with only AVX2 that takes many times as long as fp32.
    """
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX")


def refuse_separate_processes(together: int) -> None:
    """Raises RuntimeError if a launcher started more processes than those that train together."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != together:
        raise RuntimeError(
            f"{launched} processes were launched, but they do not form one distributed run: each would train by "
            "itself. On a CPU set use_cpu=True and ddp_backend='gloo'."
        )


def warn_of_slow_16_bits(dtype: torch.dtype, args: TrainingArguments) -> None:
    """Warns of weights of `dtype`, or settings, with which a step takes many times as long as it could."""
    if slow_16_bits(args.device) and (dtype.itemsize == 2 or args.bf16 or args.fp16):
        logger.warning(
            f"dtype={dtype}, bf16={args.bf16} and fp16={args.fp16} on a processor without instructions for 16 bits: "
            "a step takes many times as long as in fp32. Use dtype=float32 and bf16=False."
        )


def condition(engine: str, precision: str) -> str | None:
    """What else a cell asks of the recipe, or `None`."""
    if engine in SPLIT_AT_LOADING and precision == "bf16":
        return "`bf16: true`"
    if engine in SPLIT_AT_LOADING and precision == "4bit":
        return "`bnb_4bit_quant_storage` equal to `dtype`"
    return None


def require_packages(engine: str, precision: str = "fp32") -> None:
    """Raises ImportError if a cell needs a package that is not installed."""
    if precision in ("8bit", "4bit") and not is_bitsandbytes_available():
        raise ImportError(
            f"{PRECISIONS[precision]} base weights need bitsandbytes, which is not installed: "
            "pip install 'beft-trl[quantization]'."
        )
    if engine.startswith("zero") and not is_deepspeed_available():
        raise ImportError(
            f"{ENGINES[engine]} needs DeepSpeed, which is not installed: pip install 'beft-trl[deepspeed]'."
        )


def refuse_cell(engine: str, args: TrainingArguments, quantization: BitsAndBytesConfig | None, dtype: Any) -> None:
    """Refuses, before any weight is loaded, a recipe that misses a condition of its cell.

    Raises:
        ImportError: if the cell needs a package that is not installed.
        ValueError: for another condition.
    """
    precision = precision_of(quantization, dtype)
    require_packages(engine, precision)
    needed = condition(engine, precision)
    if needed is None:
        return
    if precision == "bf16" and not args.bf16:
        raise ValueError(
            f"dtype=bfloat16 with bf16=False under {ENGINES[engine]}: DeepSpeed creates the split weights in the "
            "precision of its own configuration, so they would be fp32 without a word. Set bf16: true, or use "
            "dtype=float32."
        )
    storage = _name(getattr(quantization, "bnb_4bit_quant_storage", None))
    if precision == "4bit" and storage != _name(dtype):
        raise ValueError(
            f"4-bit weights stored as {storage} under {ENGINES[engine]} with dtype={_name(dtype)}: ZeRO-3 splits only "
            f"floating-point storage. Set bnb_4bit_quant_storage: {_name(dtype)}, or use ZeRO-2, which takes "
            "any."
        )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"
