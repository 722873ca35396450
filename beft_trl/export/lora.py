"""An adapter as an ordinary PEFT LoRA of rank 1, for servers that apply LoRAs and know no bias."""

import copy
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..evaluation import NEW_TOKENS, encode_text
from ..identity import identify_base
from ..layout import find_bias_sites
from ..merge.base import check_fit, find_base, load_model, read_config, refuse_other_shapes
from ..merge.gguf import convert_lora, find_converter
from ..merge.output import check_output, whole_or_nothing
from ..merge.verify import with_adapter
from ..tuner import CAUSAL_LM, task_ending
from ..weight_files import PREFIX, MergeError, first_line, load_tokenizer, read_adapter, write_tensors
from .unit_vectors import HELD_OUT, UnitVectors, fit_to_adapter, fit_unit_vectors


# What an export may be off by: of the vectors in any layer, on texts that were not fitted, and of the loss in nats.
LARGEST_ERROR, LARGEST_LOSS = 0.1, 0.02
TRIED_TEXTS = 32
EXACT_DIFFERENCE = 1e-4  # of a logit, relative to the largest, that rounding in fp32 explains after a LayerNorm
REPORT_FILE = "beft_export.json"
GGUF_FILE = "adapter_model.gguf"
FORMATS = ("lora", "gguf")


@dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote, and how far it is from the adapter.

    Attributes:
        output: folder of the LoRA.
        vectors: file of the vectors that all adapters of this base share.
        exact: whether every vector follows from a LayerNorm.
        errors: root mean square of `a.x - 1` by the path of the projection, on texts that were not fitted.
        difference: largest difference of a logit over the texts, relative to the largest logit.
        equal_answers, answers: how many of the prompts have the same greedy tokens.
        loss, original_loss: nats for a token of what comes after the prompts, of the LoRA and of the adapter.
        gguf: file for llama.cpp, or `None` if none was asked for.
    """

    output: str
    vectors: str
    exact: bool
    errors: dict[str, float]
    difference: float
    equal_answers: int
    answers: int
    loss: float
    original_loss: float
    gguf: str | None = None


def export_lora(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    texts: Sequence[tuple[str, str]] | None = None,
    vectors: str | Path | None = None,
    force: bool = False,
    file_format: str = "lora",
    llama_cpp: str | Path | None = None,
) -> ExportReport:
    """Writes a LoRA of rank 1 that gives the model of base and adapter: `B` is the bias, `A` a vector with `A x = 1`.

    After a LayerNorm such a vector exists. After an RMSNorm it is fitted to `texts`, once for a base model and from
    there for each adapter, whose biases move the inputs of later layers. `vectors` keeps the first and some of the
    texts, so that later adapters of that base need none.

    Args:
        adapter (`str` or `Path`): folder of the adapter, this package's or plain PEFT's.
        output (`str` or `Path`): folder to write, new or empty.
        base (`str` or `Path`, *optional*): folder of the base model, or its name on the hub; by default the one that
            the adapter names.
        texts (`Sequence[tuple[str, str]]`, *optional*): prompts with their answers, or texts cut in two, a few
            hundred of the adapter's task. Every fourth is not fitted, and 32 of these are what loss and answers are
            measured on.
        vectors (`str` or `Path`, *optional*): the file that keeps the vectors. Default: one in the cache of the hub,
            named by the base.
        force (`bool`, *optional*, defaults to `False`): write it although it is off by more than `LARGEST_ERROR` or
            `LARGEST_LOSS`.
        file_format (`str`, *optional*, defaults to `"lora"`): `"gguf"` adds a GGUF of it, for `llama-server --lora`.
        llama_cpp (`str` or `Path`, *optional*): folder of llama.cpp's source, whose converter writes the GGUF.
            Default: that of the environment variable `LLAMA_CPP`.

    Returns:
        `ExportReport`: how far the LoRA is from the adapter.

    Raises:
        MergeError: if adapter and base do not fit or are damaged, there are no texts, the LoRA is too far off, or
            there is no converter for a GGUF.
        ValueError: for another format.
    """
    if file_format not in FORMATS:
        raise ValueError(f"The format {file_format!r} is not known: give one of {', '.join(FORMATS)}.")
    adapter, output = Path(adapter), Path(output)
    check_output(output)
    converter = find_converter(llama_cpp) if file_format == "gguf" else None
    content = read_adapter(adapter)
    if content.saved_whole:
        raise MergeError(
            f"{adapter} holds modules that were trained whole ({min(content.saved_whole)} first), which a LoRA of "
            "rank 1 cannot be. Merge it: beft merge."
        )
    folder = find_base(base or content.base_model)
    config = read_config(folder)
    on_gpu = torch.accelerator.is_available()
    dtype: Any = "auto" if on_gpu else torch.float32
    model, loading = load_model(folder, config, dtype=dtype)
    refuse_other_shapes(loading, folder, model)
    if task_ending(model) != CAUSAL_LM:
        raise MergeError(
            f"{type(model).__name__} does not generate text, and what is exported is for servers of text."
        )
    check_fit(content.deltas, model, adapter)
    if on_gpu:
        model = model.to(torch.accelerator.current_accelerator())
    encoded = _encode(texts, adapter, folder) if texts else []
    about = identify_base(model, str(folder))
    identity = "-".join(each for each in (about["base_files"], about["base_biases"]) if each)
    file = Path(vectors) if vectors else Path(HF_HOME) / "beft_trl" / f"{identity}.safetensors"
    shared = _shared_vectors(model, sorted(content.deltas), encoded, identity, file)
    known = encoded or shared.texts
    tried = known[::HELD_OUT][:TRIED_TEXTS]
    adapted = with_adapter(copy.deepcopy(model), adapter, content)
    expected = _behaviour(adapted, tried, "adapter")
    fitted, errors = fit_to_adapter(shared, adapted.get_base_model(), sorted(content.deltas), known)
    del adapted
    with whole_or_nothing(output) as partial:
        _write(partial, content.deltas, fitted, model, content.base_model or str(folder))
        found = _behaviour(_loaded(model, partial, content.deltas), tried, "LoRA")
        exact = shared.exact >= content.deltas.keys()
        report = _compare(found, expected, tried, str(output), str(file), exact, errors)
        if not force:
            _refuse(report, model.dtype)
        record = {name: value for name, value in asdict(report).items() if name not in ("output", "vectors", "gguf")}
        (partial / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(report, adapter, folder), encoding="utf-8")
        if converter is not None:
            convert_lora(converter, partial, folder, partial / GGUF_FILE)
            report = replace(report, gguf=str(output / GGUF_FILE))
    return report


def _encode(texts: Sequence[tuple[str, str]], adapter: Path, base: Path) -> list[tuple[list[int], int]]:
    """The texts as tokens, and how many of them are the prompt; those of a single token are left out."""
    try:
        tokenizer = load_tokenizer(base, adapter)
    except (OSError, ValueError) as error:
        raise MergeError(f"{first_line(error)} Put the base's tokenizer into {adapter}.") from error
    encoded = [encode_text(tokenizer, prompt, prompt + answer) for prompt, answer in texts]
    return [(tokens, min(start, len(tokens) - 1)) for tokens, start in encoded if len(tokens) > 1]


def _shared_vectors(
    model: Any, needed: list[str], texts: list[tuple[list[int], int]], identity: str, file: Path
) -> UnitVectors:
    if file.exists():
        kept = UnitVectors.load(file)
        if kept.base != identity:
            raise MergeError(f"{file} holds the vectors of another base model. Name another file.")
        if set(needed) <= kept.vectors.keys():
            return kept
    if not texts:
        raise MergeError(
            f"No vectors are kept for this base yet ({file}), and they are fitted to text. Give a few hundred rows, "
            "such as those of the run: --rows FILE."
        )
    modules = sorted({site.module for site in find_bias_sites(model)} | set(needed))
    found = fit_unit_vectors(model, modules, texts, identity)
    found.save(file)
    return found


def _write(folder: Path, deltas: dict[str, Tensor], vectors: dict[str, Tensor], model: Any, base: str) -> None:
    tensors = {}
    for path, delta in deltas.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = vectors[path][None].contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = delta[:, None].contiguous()
    transposed = {isinstance(model.get_submodule(path), Conv1D) for path in deltas}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=1,
        lora_alpha=1,
        fan_in_fan_out=transposed == {True},
        inference_mode=True,
        **_targets(list(deltas)),
    )
    write_tensors(folder / ADAPTER_SAFE_WEIGHTS_NAME, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))


def _targets(paths: list[str]) -> dict[str, Any]:
    """Names of modules and numbers of layers, which servers read, or whole paths where these do not tell."""
    found = [re.fullmatch(r"(?:.*\.)?(\w+)\.(\d+)\..*?(\w+)", path) for path in paths]
    lists = {match[1] for match in found if match}
    if len(lists) != 1 or None in found:
        return {"target_modules": sorted(paths)}
    return {
        "target_modules": sorted({match[3] for match in found if match}),
        "layers_to_transform": sorted({int(match[2]) for match in found if match}),
        "layers_pattern": lists.pop(),
    }


def _loaded(base: Any, folder: Path, deltas: dict[str, Tensor]) -> PeftModel:
    """The LoRA as PEFT loads it, with a layer for each delta and no other."""
    model = PeftModel.from_pretrained(base, str(folder))
    layers = {name.removeprefix(PREFIX) for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    stored = {name.split(".lora_")[0].removeprefix(PREFIX) for name in get_peft_model_state_dict(model)}
    if not layers == stored == set(deltas):
        other = min(layers ^ set(deltas))
        raise MergeError(
            f"A LoRA cannot name the projections of this adapter without {other}: neither the end of a name nor its "
            "layer tells them apart. Merge the adapter instead: beft merge."
        )
    return model


@torch.no_grad()
def _behaviour(model: Any, texts: list[tuple[list[int], int]], whose: str) -> list[tuple[Tensor, Tensor]]:
    """For each text the logits at the tokens after its prompt, and the greedy tokens after it."""
    model.eval()
    found = []
    for tokens, prompt in tqdm(texts, desc=f"Answers of the {whose}", unit="text", leave=False, disable=None):
        given = torch.tensor([tokens], device=model.device)
        logits = model(input_ids=given).logits[0, max(prompt - 1, 0) : -1].float().cpu()
        answer = model.generate(
            input_ids=given[:, : max(prompt, 1)], attention_mask=torch.ones_like(given[:, : max(prompt, 1)]),
            max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=model.generation_config.pad_token_id or 0,
        )  # fmt: skip
        found.append((logits, answer[0].cpu()))
    return found


def _compare(
    found: list[tuple[Tensor, Tensor]],
    expected: list[tuple[Tensor, Tensor]],
    texts: list[tuple[list[int], int]],
    output: str,
    file: str,
    exact: bool,
    errors: dict[str, float],
) -> ExportReport:
    labels = torch.cat([torch.tensor(tokens[max(prompt, 1) :]) for tokens, prompt in texts])
    mine, theirs = torch.cat([each[0] for each in found]), torch.cat([each[0] for each in expected])
    return ExportReport(
        output=output,
        vectors=file,
        exact=exact,
        errors=errors,
        difference=((mine - theirs).abs().max() / theirs.abs().max()).item(),
        equal_answers=sum(torch.equal(mine[1], theirs[1]) for mine, theirs in zip(found, expected, strict=True)),
        answers=len(texts),
        loss=functional.cross_entropy(mine, labels).item(),
        original_loss=functional.cross_entropy(theirs, labels).item(),
    )


def _refuse(report: ExportReport, dtype: torch.dtype) -> None:
    path = max(report.errors, key=report.errors.__getitem__)
    off = report.loss - report.original_loss
    remedy = "Give more rows, or rows that are more like what it will be asked; merge it instead; or --force."
    if not report.errors[path] <= LARGEST_ERROR:
        raise MergeError(
            f"No vector makes one of the inputs of {path}: the best is off by {report.errors[path]:.1%} on texts that "
            f"were not fitted, and {LARGEST_ERROR:.0%} is the most. {remedy}"
        )
    if report.exact and dtype == torch.float32 and report.difference > EXACT_DIFFERENCE:
        raise MergeError(
            f"The LoRA should be the adapter to rounding, and its logits are off by {report.difference:.1e} of the "
            "largest: report this model, and merge the adapter instead, or --force."
        )
    if not off <= LARGEST_LOSS or math.isnan(report.difference):
        raise MergeError(
            f"The LoRA has a loss of {report.loss:.3f} where the adapter has {report.original_loss:.3f}, and "
            f"{LARGEST_LOSS} is the most that it may lose. {remedy}"
        )


def _card(report: ExportReport, adapter: Path, base: Path) -> str:
    how = "exact, after a LayerNorm" if report.exact else "fitted to text, after an RMSNorm"
    return f"""---
base_model: {base}
library_name: peft
tags:
- beft
- lora
---

# {adapter.resolve().name} as a LoRA of rank 1

The BEFT adapter `{adapter}` of `{base}` for servers that apply LoRAs. `lora_B` is the bias, `lora_A` a vector whose
product with every input of the projection is one ({how}).

- largest error of that product, root mean square of a layer: {max(report.errors.values()):.2%}
- largest difference of a logit: {report.difference:.1e} of the largest
- equal greedy answers: {report.equal_answers} of {report.answers}
- loss: {report.loss:.4f}, of the adapter itself {report.original_loss:.4f}
"""
