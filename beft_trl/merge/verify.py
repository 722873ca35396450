"""Whether a merged model computes what base and adapter do: their logits on one prompt."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from ..importance import SCORES_FILE, BiasScores
from ..weight_files import AGAIN, DAMAGE, AdapterContent, MergeError, first_line, read_json
from .base import load_model, refuse_other_shapes
from .output import MergeReport


# The largest difference of a logit, relative to the largest logit, that rounding in a dtype explains.
# In bf16 that is much: on SmolLM2 the same adapter differs by 3e-2 between bf16 and fp32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
PROMPT = (
    "When the rain had stopped, she opened the window and wrote down what she still remembered of the long journey."
)


def compare_logits(
    content: AdapterContent,
    adapter: Path,
    base: Path,
    original: PreTrainedConfig,
    partial: Path,
    config: PreTrainedConfig,
    report: MergeReport,
    written: set[torch.dtype],
    left_out: set[str],
) -> None:
    """Compares the logits of base plus adapter with those of the merged model. The base is looked at first.

    Args:
        content, adapter: the adapter, and its folder.
        base, original: the base's folder and configuration.
        partial, config: the merged model's folder and configuration.
        report: is given the differences.
        written: the dtypes of the changed and new tensors.
        left_out: paths of biases that are zero and not in the files.
    """
    prompt = make_prompt(partial, config)
    plain, loading = load_model(base, original)
    refuse_other_shapes(loading, base, plain)
    if loading["missing_keys"]:
        raise MergeError(
            f"{base} does not load into {type(plain).__name__}: {min(loading['missing_keys'])} is missing. {AGAIN}"
        )
    expected = logits_of(with_adapter(plain, adapter, content), prompt, base)
    del plain
    merged, found = load_model(partial, config)
    unexpected = found["unexpected_keys"] - loading["unexpected_keys"]
    missing = found["missing_keys"] - {f"{path}.bias" for path in left_out}
    wrong = missing | found["mismatched_keys"] | unexpected
    if wrong:
        raise MergeError(
            f"The merged checkpoint does not load into {type(merged).__name__}: {min(wrong)} is missing, unexpected "
            "or of another shape, and the base loads. It was removed: keep the adapter, and report this model."
        )
    logits, dtypes = logits_of(merged, prompt, partial), dtypes_of(merged)
    del merged
    report.difference = largest_difference(logits, expected, base)
    # In files of mixed dtypes, a bias may be stored in a coarser one than the model is loaded in.
    refuse_difference(report.difference, dtypes | written)
    scores = adapter / SCORES_FILE
    if scores.is_file():
        read_json(scores, "Take another checkpoint, or remove this file.")
        quantization = BiasScores.from_json(scores).quantization
        if quantization is not None:
            report.quantized_difference = _quantized_difference(
                quantization, content, adapter, base, original, prompt, logits
            )


def _quantized_difference(
    quantization: Any,
    content: AdapterContent,
    adapter: Path,
    base: Path,
    config: PreTrainedConfig,
    prompt: Tensor,
    logits: Tensor,
) -> float:
    remedy = "Take another checkpoint, or merge without verifying."
    bits = ("load_in_8bit", "load_in_4bit")
    if not isinstance(quantization, dict) or not any(quantization.get(name) is True for name in bits):
        raise MergeError(
            f"{adapter / SCORES_FILE} says that the base was quantised by {quantization!r}, which is neither 8-bit "
            f"nor 4-bit. {remedy}"
        )
    try:
        settings = BitsAndBytesConfig(**quantization)
    except DAMAGE as error:
        raise MergeError(
            f"{adapter / SCORES_FILE} says that the base was quantised by {quantization!r}, which bitsandbytes does "
            f"not take ({first_line(error)}). {remedy}"
        ) from error
    quantized, _ = load_model(base, config, quantization_config=settings)
    return largest_difference(logits, logits_of(with_adapter(quantized, adapter, content), prompt, base), base)


def with_adapter(model: Any, adapter: Path, content: AdapterContent) -> Any:
    """The model with the adapter as PEFT applies it."""
    from ..tuner import load_adapter  # and with it PEFT, which a merge without it does not need

    try:
        adapted = load_adapter(model, str(adapter))
    except DAMAGE as error:
        raise MergeError(
            f"PEFT cannot load the adapter in {adapter} onto {type(model).__name__} ({first_line(error)}): its "
            f"{ADAPTER_CONFIG_NAME} does not fit the model or its tensors. Take another checkpoint."
        ) from error
    whole: Any = adapted.get_base_model()
    passed_over = [path for path in content.deltas if not hasattr(whole.get_submodule(path), "beft_bias")]
    if passed_over:
        raise MergeError(
            f"{adapter} has a delta for {passed_over[0]}, which the target_modules of its {ADAPTER_CONFIG_NAME} leave "
            "out: PEFT would not apply it. Take another checkpoint."
        )
    return adapted


def refuse_difference(difference: float, dtypes: set[torch.dtype]) -> None:
    dtype = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 1.0))
    tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    if not difference <= tolerance:
        raise MergeError(
            f"The merged model's logits differ from those of base plus adapter by {difference:.1e} of the largest, "
            f"and rounding in {dtype} explains {tolerance:.0e}. The output was removed: keep the adapter, and "
            "report this model."
        )


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def make_prompt(folder: Path, config: PreTrainedConfig) -> Tensor:
    """A sentence: on tokens in no order, the rounding of a 16-bit model grows to the size of its logits."""
    text_config = config.get_text_config()
    length = min(32, getattr(text_config, "max_position_embeddings", None) or 32)
    with contextlib.suppress(Exception):  # a folder without a tokenizer, of whatever kind it is
        tokens = AutoTokenizer.from_pretrained(folder, config=config)(PROMPT, return_tensors="pt").input_ids
        if len(tokens.unique()) > 8:
            return tokens[:, :length]
    return torch.arange(2, 2 + length).remainder(text_config.vocab_size)[None]


@torch.no_grad()
def logits_of(model: nn.Module, prompt: Tensor, folder: Path) -> Tensor:
    """The model's first output: logits, of tokens or classes, or the starts of answers."""
    try:
        return model.eval()(input_ids=prompt.to(next(model.parameters()).device))[0].float().cpu()
    except DAMAGE as error:
        raise MergeError(
            f"The model in {folder} does not run on this machine ({first_line(error)}), so that the merge cannot be "
            "verified. Look at its files, or merge without verifying."
        ) from error


def largest_difference(found: Tensor, expected: Tensor, base: Path) -> float:
    if not expected.isfinite().all():
        raise MergeError(
            f"The logits of {base} with the adapter are not finite: the base is damaged, or its dtype does not hold "
            f"them. {AGAIN}"
        )
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)
