"""The engines and precisions that work together, what each asks for, and what is refused."""

from typing import Any

from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_available
from transformers.utils import is_bitsandbytes_available


# Every cell of the two works on some condition; `matrix()` renders them and `refuse_cell` enforces them.
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


def engine_of(args: TrainingArguments) -> str:
    """The name in `ENGINES` of the engine that `args` and the launcher ask for.

    Raises:
        ValueError: for FSDP, which is not among them.
    """
    if args.fsdp:
        raise ValueError(
            "FSDP is not supported: it has not been shown to keep fp32 deltas beside frozen weights. Use DeepSpeed "
            "ZeRO-3, which splits the weights too: --config_file recipes/accelerate_configs/zero3.yaml."
        )
    plugin = args.deepspeed_plugin
    if plugin is None:
        return "ddp" if args.world_size > 1 else "single"
    if plugin.zero_stage == 0:
        raise ValueError(
            "DeepSpeed with zero_stage 0 is plain data parallel training: use recipes/accelerate_configs/ddp.yaml, or "
            "zero_stage 1."
        )
    zero = plugin.hf_ds_config.config.get("zero_optimization", {})
    offload = any(
        (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")
    )
    return f"zero{plugin.zero_stage}" + ("_offload" if offload and plugin.zero_stage == 3 else "")


def precision_of(quantization: BitsAndBytesConfig | None, dtype: Any) -> str:
    """The name in `PRECISIONS` of a base loaded in `dtype` (a torch dtype or its name) with `quantization`."""
    if quantization is not None and getattr(quantization, "load_in_8bit", False):
        return "8bit"
    if quantization is not None and getattr(quantization, "load_in_4bit", False):
        return "4bit"
    return "bf16" if _name(dtype) == "bfloat16" else "fp32"


def condition(engine: str, precision: str) -> str | None:
    """What a cell asks of the recipe beside its engine and precision, or `None`."""
    if engine in SPLIT_AT_LOADING and precision == "bf16":
        return "`bf16: true`"
    if engine in SPLIT_AT_LOADING and precision == "4bit":
        return "`bnb_4bit_quant_storage` equal to `dtype`"
    return None


def refuse_cell(engine: str, args: TrainingArguments, quantization: BitsAndBytesConfig | None, dtype: Any) -> None:
    """Refuses, before any weight is loaded, a recipe that misses a condition of its cell.

    Raises:
        ImportError: where the cell needs a package that is not installed.
        ValueError: for another condition.
    """
    precision = precision_of(quantization, dtype)
    if precision in ("8bit", "4bit") and not is_bitsandbytes_available():
        raise ImportError(
            f"{PRECISIONS[precision]} base weights need bitsandbytes, which is not installed: "
            "pip install 'beft-trl[quantization]'."
        )
    if engine.startswith("zero") and not is_deepspeed_available():
        raise ImportError(
            f"{ENGINES[engine]} needs DeepSpeed, which is not installed: pip install 'beft-trl[deepspeed]'."
        )
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
            f"floating-point storage. Set bnb_4bit_quant_storage: {_name(dtype)}, or use ZeRO-2 "
            "(recipes/accelerate_configs/zero2.yaml), which takes any."
        )


def matrix() -> str:
    """The table of the README: precisions by engines, with each cell's condition."""
    notes: list[str] = []
    lines = [f"| base weights | {' | '.join(ENGINES.values())} |", "|---|" + "---|" * len(ENGINES)]
    for precision, name in PRECISIONS.items():
        cells = []
        for engine in ENGINES:
            needed = condition(engine, precision)
            if needed and needed not in notes:
                notes.append(needed)
            cells.append(f"yes ({notes.index(needed) + 1})" if needed else "yes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    conditions = "; ".join(f"({number}) with {note}" for number, note in enumerate(notes, 1))
    return "\n".join(lines) + f"\n\n{conditions}."


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"
