"""Folds an adapter into a plain Transformers checkpoint, file by file, without loading the model."""

import contextlib
import copy
import glob
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from .importance import SCORES_FILE, BiasScores
from .layout import build_skeleton, features, find_bias_sites
from .placement import place
from .weight_files import AdapterContent, CheckpointFiles, MergeError, read_adapter, refuse_outside, xxh3


# The largest difference of a logit, relative to the largest logit, that rounding in the checkpoint's dtype explains.
# In bf16 that is much: on SmolLM2 the same adapter differs by 3e-2 between bf16 and fp32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
PROMPT = (
    "When the rain had stopped, she opened the window and wrote down what she still remembered of the long journey."
)
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
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", *OTHER_WEIGHT_FILES)
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


@dataclass
class MergeReport:
    """What `merge_adapter` did.

    Attributes:
        output: the merged checkpoint's folder.
        rule: how the deltas were put into the checkpoint, as a sentence.
        changed, added: names of the tensors that are new in value, or new.
        base_hashes: xxh3-128 of the base's weight files that were copied.
        difference: largest difference of a logit between the merged model and base plus adapter, relative to the
            largest logit; `None` where nothing was verified.
        quantized_difference: the same between the merged model and the quantised base that the adapter was trained
            on; `None` where it was not quantised.
    """

    output: str
    rule: str = ""
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    base_hashes: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    quantized_difference: float | None = None


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    output_projection: bool = False,
    verify: bool = True,
    link: bool = False,
) -> MergeReport:
    """Writes a Transformers checkpoint that has the adapter's deltas in its biases and needs neither PEFT nor this
    package.

    A native bias takes the delta, summed in fp32; a bias-free model whose configuration has a switch for biases gets
    it turned on, and zeros for the others; else the value bias becomes `W_o b_v`, the bias of the output projection
    (exact, since attention probabilities sum to one), or a Mistral without sliding window becomes a Llama.

    Args:
        adapter: folder of the adapter, this package's or plain PEFT's.
        output: folder to write, new or empty.
        base: folder of the base model, or its name on the hub; by default the one that the adapter names. Its weights
            in full precision, in safetensors files.
        output_projection: turn a value bias into an output-projection bias where the value has a bias of its own, too.
        verify: run base plus adapter and the merged model on one prompt and compare their logits.
        link: hard-link the shards that do not change, instead of copying them.

    Raises:
        MergeError: where adapter and base do not fit, the model has no place for the bias, or the logits differ. The
            output folder is then as it was.
        OSError: where a file cannot be read or written.
    """
    adapter, output = Path(adapter), Path(output)
    if output.exists() and any(output.iterdir()):
        raise MergeError(f"The output folder {output} is not empty: nothing was written. Give a new folder.")
    content = read_adapter(adapter)
    base_folder = _base_folder(base or content.base_model)
    config = AutoConfig.from_pretrained(base_folder)
    if getattr(config, "quantization_config", None):
        raise MergeError(
            f"{base_folder} holds quantised weights. A merge goes into the original full-precision weights: give the "
            "model that they were quantised from as base."
        )
    report = MergeReport(str(output))
    if content.saved_whole:
        with _whole_or_nothing(output) as partial:
            _copy_files(base_folder, partial, adapter)
            _merge_task_model(content, adapter, base_folder, partial, report)
            _write_card(partial, adapter, base_folder, report)
        return report
    skeleton = build_skeleton(config)
    sites = find_bias_sites(skeleton)
    _check_fit(content.deltas, skeleton, adapter)
    _check_tokenizer(adapter, skeleton)
    checkpoint = CheckpointFiles(base_folder, skeleton)
    plan = place(content.deltas, config, skeleton, sites, checkpoint, output_projection)

    report.rule = plan.rule
    with _whole_or_nothing(output) as partial:
        written = checkpoint.copy_with(plan.add, plan.create, partial, link)
        report.changed, report.added, report.base_hashes = written
        _copy_files(base_folder, partial, adapter)
        if verify:
            dtypes = {checkpoint.dtype(path) for path in (*plan.add, *plan.create)}
            _verify(adapter, base_folder, partial, plan.config, report, dtypes)
        _write_card(partial, adapter, base_folder, report)
        plan.config.save_pretrained(partial)
    return report


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end. Hidden, beside it: whatever stops the merge leaves no checkpoint."""
    _remove_leftovers(output)
    partial = output.parent / f"{_partial_prefix(output)}{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"The output folder {output} cannot be written ({error.strerror}): nothing was written. Give a folder "
            "that you may write to, on a disk with free space."
        ) from error
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(output: Path) -> None:
    """What merges into this output left that were killed on this machine."""
    prefix = _partial_prefix(output)
    for path in output.parent.glob(f"{glob.escape(prefix)}*") if output.parent.is_dir() else ():
        process = path.name.removeprefix(prefix)
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _base_folder(base: str | Path | None) -> Path:
    if not base:
        raise MergeError("The adapter does not say what its base model was: give it as base.")
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(str(base), ignore_patterns=list(OTHER_WEIGHT_FILES)))
    except Exception as error:  # the hub's errors have no common ancestor
        reason = str(error).splitlines()[0]
        raise MergeError(
            f"The base model {base} is neither a folder nor a model of the hub that can be reached ({reason}). Give "
            "its folder as base."
        ) from error


def _check_fit(deltas: dict[str, Tensor], skeleton: nn.Module, adapter: Path) -> None:
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


def _copy_files(base: Path, partial: Path, adapter: Path) -> None:
    """Everything of the base but weights and card, and the adapter's own tokenizer and template over it."""
    skip = shutil.ignore_patterns(*WEIGHT_FILES, CONFIG_NAME, "README.md", ".*")
    for path in base.rglob("*"):
        if path.is_symlink():
            refuse_outside(path, base)
    shutil.copytree(base, partial, ignore=skip, dirs_exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for path in adapter.glob(pattern):
            if path.is_file():
                refuse_outside(path, adapter)
                shutil.copyfile(path, partial / path.name)


def _check_tokenizer(adapter: Path, model: Any) -> None:
    """Refuses the adapter's tokenizer if it has tokens that the merged model would have no embedding for."""
    if not (adapter / "tokenizer_config.json").is_file():
        return
    try:
        vocabulary = AutoTokenizer.from_pretrained(adapter).get_vocab()
    except Exception:  # whatever its class raises: a tokenizer that does not load is not compared
        return
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        raise MergeError(
            f"The tokenizer in {adapter} has {len(beyond)} tokens beyond the {rows} of the base ({beyond[0][1]!r} "
            "first), which would have no embedding. Give the base that it was trained on, with its resized embedding."
        )


def _merge_task_model(content: AdapterContent, adapter: Path, base: Path, partial: Path, report: MergeReport) -> None:
    """Merges an adapter with a task's head, in memory: the encoders that have one are small."""
    config = AutoConfig.from_pretrained(adapter if (adapter / CONFIG_NAME).is_file() else base)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    merged, loading = architecture.from_pretrained(
        base, config=config, dtype=config.dtype or "auto", output_loading_info=True
    )
    before = {name: values.clone() for name, values in merged.state_dict().items() if name in content.saved_whole}
    unknown = content.saved_whole.keys() - before.keys()
    if unknown:
        raise MergeError(
            f"{adapter} holds {min(unknown)}, which {type(merged).__name__} does not have. Put the configuration of "
            f"the task model, which names its class, beside the adapter: model.config.save_pretrained('{adapter}')."
        )
    untrained = loading["missing_keys"] - content.saved_whole.keys()
    if untrained:
        raise MergeError(
            f"{min(untrained)} of {type(merged).__name__} is neither in {base} nor in {adapter}, so it would be "
            "random. Give the base that the adapter was trained on."
        )
    _check_fit(content.deltas, merged, adapter)
    _check_tokenizer(adapter, merged)
    bias_free = [path for path in content.deltas if merged.get_submodule(path).bias is None]
    if bias_free:
        raise MergeError(
            f"{type(merged).__name__} has no bias where this adapter needs one ({bias_free[0]} first). Keep the "
            "adapter: PEFT applies it as it is."
        )
    from .tuner import load_adapter  # and with it PEFT

    prompt = _prompt(partial, config)
    expected = _logits(load_adapter(copy.deepcopy(merged), str(adapter)), prompt)
    with torch.no_grad():
        for path, delta in content.deltas.items():
            merged.get_submodule(path).bias.add_(delta)
    merged.load_state_dict(content.saved_whole, strict=False)
    merged.save_pretrained(partial)
    report.rule = "The deltas are added to the model's own biases, and the head that was trained is put in."
    report.added = sorted(loading["missing_keys"])
    moved = {name for name, values in content.saved_whole.items() if not torch.equal(values, before[name])}
    report.changed = sorted({f"{path}.bias" for path in content.deltas} | moved - loading["missing_keys"])
    report.base_hashes = {file.name: xxh3(file) for file in sorted(base.glob("*.safetensors"))}
    report.difference = _difference(_logits(architecture.from_pretrained(partial, dtype="auto"), prompt), expected)
    _refuse_difference(report.difference, {parameter.dtype for parameter in merged.parameters()})


def _verify(
    adapter: Path,
    base: Path,
    partial: Path,
    config: PreTrainedConfig,
    report: MergeReport,
    dtypes: set[torch.dtype],
) -> None:
    architecture = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    merged, info = architecture.from_pretrained(partial, config=config, dtype="auto", output_loading_info=True)
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise MergeError(
            f"The merged checkpoint does not load into {type(merged).__name__}: {wrong[0]} is missing, unexpected or "
            "of another shape. It was removed: keep the adapter, and report this model."
        )
    prompt = _prompt(partial, config)
    found = _logits(merged, prompt)
    del merged
    from .tuner import load_adapter  # and with it PEFT, which a merge alone does without

    original = AutoConfig.from_pretrained(base)
    whole = getattr(transformers, (original.architectures or ["AutoModelForCausalLM"])[0])
    expected = _logits(load_adapter(whole.from_pretrained(base, dtype="auto"), str(adapter)), prompt)
    report.difference = _difference(found, expected)
    # In files of mixed dtypes the biases round as their own layers do.
    _refuse_difference(report.difference, dtypes)
    scores = adapter / SCORES_FILE
    quantization = BiasScores.from_json(scores).quantization if scores.is_file() else None
    if quantization is not None:
        quantized = whole.from_pretrained(base, quantization_config=BitsAndBytesConfig(**quantization))
        report.quantized_difference = _difference(found, _logits(load_adapter(quantized, str(adapter)), prompt))


def _refuse_difference(difference: float, dtypes: set[torch.dtype]) -> None:
    dtype = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.0))
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not difference <= tolerance:
        raise MergeError(
            f"The merged model's logits differ from those of base plus adapter by {difference:.1e} of the largest, "
            f"and rounding in {dtype} explains {tolerance:.0e}. The output was removed: keep the adapter, and "
            "report this model."
        )


def _prompt(folder: Path, config: PreTrainedConfig) -> Tensor:
    """A sentence: on tokens in no order, the rounding of a 16-bit model grows to the size of its logits."""
    with contextlib.suppress(Exception):  # a folder without a tokenizer, of whatever kind it is
        tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        if len(tokens.unique()) > 8:
            return tokens
    return torch.arange(2, 34).remainder(config.get_text_config().vocab_size)[None]


@torch.no_grad()
def _logits(model: nn.Module, prompt: Tensor) -> Tensor:
    """The model's first output: logits, of tokens or classes, or the starts of answers."""
    return model.eval()(input_ids=prompt.to(next(model.parameters()).device))[0].float().cpu()


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _write_card(partial: Path, adapter: Path, base: Path, report: MergeReport) -> None:
    sha256 = hashlib.sha256((adapter / ADAPTER_SAFE_WEIGHTS_NAME).read_bytes()).hexdigest()
    shards = [f"- `{shard}` of the base: xxh3-128 `{digest}`" for shard, digest in report.base_hashes.items()]
    lines = [
        "---\nlibrary_name: transformers\ntags:\n- beft\n---\n",
        f"# {adapter.resolve().name}, merged\n",
        f"`{base}` with the BEFT adapter `{adapter}` folded in. {report.rule} It is a plain Transformers checkpoint: "
        f"{len(report.changed)} tensors of the base were changed and {len(report.added)} added.\n",
        f"- `{ADAPTER_SAFE_WEIGHTS_NAME}` of the adapter: sha256 `{sha256}`",
        *(shards or ["- the base's weights are hard links to its own files"]),
    ]
    if report.difference is not None:
        lines.append(f"\nLargest difference of a logit to base plus adapter: {report.difference:.1e} of the largest.")
    if report.quantized_difference is not None:
        lines.append(
            "The adapter was trained on a quantised base, which this one is not: its logits differ by up to "
            f"{report.quantized_difference:.1e} of the largest."
        )
    (partial / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
