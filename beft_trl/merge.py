"""Folds an adapter into a plain Transformers checkpoint, file by file, without loading the model."""

import contextlib
import copy
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from .importance import SCORES_FILE, BiasScores
from .layout import build_skeleton, features, find_bias_sites
from .placement import place
from .weight_files import (
    AGAIN,
    DAMAGE,
    FLOATS,
    AdapterContent,
    CheckpointFiles,
    MergeError,
    first_line,
    read_adapter,
    read_json,
    refuse_outside,
    xxh3,
)


# The largest difference of a logit, relative to the largest logit, that rounding in a dtype explains.
# In bf16 that is much: on SmolLM2 the same adapter differs by 3e-2 between bf16 and fp32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
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
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
TEMPLATE_FILES = ("chat_template*",)


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

    Files are read from the folders of adapter and base only: a link or an index that leads out of them is refused.
    Those of a hub cache, which lead to its own blobs, are not.

    Args:
        adapter (`str` or `Path`): folder of the adapter, this package's or plain PEFT's.
        output (`str` or `Path`): folder to write, new or empty, and not in the base.
        base (`str` or `Path`, *optional*): folder of the base model, or its name on the hub; by default the one that
            the adapter names. Its weights in 16, 32 or 64 bits, in safetensors files.
        output_projection (`bool`, *optional*, defaults to `False`): turn a value bias into an output-projection bias
            if the value has a bias of its own, too.
        verify (`bool`, *optional*, defaults to `True`): run base plus adapter and the merged model on one prompt and
            compare their logits.
        link (`bool`, *optional*, defaults to `False`): hard-link the shards that do not change, instead of copying
            them.

    Returns:
        `MergeReport`: what was changed, by what rule, and how far the logits are.

    Raises:
        MergeError: if adapter, tokenizer and base do not fit or are damaged, the model has no place for the bias, or
            the logits differ. The output folder is then as it was.
        OSError: if a file cannot be read or written.
    """
    adapter, output = Path(adapter), Path(output)
    _check_output(output)
    content = read_adapter(adapter)
    base_folder = _base_folder(base or content.base_model)
    if Path(os.path.realpath(output)).is_relative_to(base_folder.resolve()):
        raise MergeError(f"The output folder {output} is in the base, {base_folder}: give a folder outside of it.")
    config = _read_config(base_folder)
    if getattr(config, "quantization_config", None):
        raise MergeError(
            f"{base_folder} holds quantised weights. A merge goes into the original full-precision weights: give the "
            "model that they were quantised from as base."
        )
    skeleton = _skeleton(config, base_folder)
    checkpoint = CheckpointFiles(base_folder, skeleton)
    files = _files_to_copy(base_folder, adapter)
    report = MergeReport(str(output))
    if content.saved_whole:
        if output_projection:
            raise MergeError(
                f"{adapter} holds modules that were trained whole ({min(content.saved_whole)} first), and those are "
                "merged with the model's own biases. Merge without output_projection."
            )
        with _whole_or_nothing(output) as partial:
            _copy_files(files, partial)
            _merge_task_model(content, adapter, base_folder, partial, report)
            _write_card(partial, adapter, base_folder, report)
        return report
    sites = find_bias_sites(skeleton)
    _check_fit(content.deltas, skeleton, adapter)
    plan = place(content.deltas, config, skeleton, sites, checkpoint, output_projection)

    report.rule = plan.rule
    with _whole_or_nothing(output) as partial:
        _copy_files(files, partial)
        _check_tokenizer(partial, plan.config, _embedding_rows(skeleton, checkpoint), adapter)
        loaded_in = config.dtype if isinstance(config.dtype, torch.dtype) else None
        written = checkpoint.copy_with(plan.add, plan.create, partial, link, loaded_in)
        report.changed, report.added, report.base_hashes, dtypes = written
        if verify:
            _verify(content, adapter, base_folder, config, partial, plan.config, report, dtypes)
        _write_card(partial, adapter, base_folder, report)
        _write_config(plan.config, base_folder, partial)
    return report


def _check_output(output: Path) -> None:
    """Refuses what is no new or empty folder."""
    try:
        if output.is_dir():
            reason = "is not empty" if any(output.iterdir()) else ""
        else:
            reason = "is a file, or a link to nothing" if os.path.lexists(output) else ""
    except OSError as error:
        raise _cannot_write(output, error) from error
    if reason:
        raise MergeError(f"The output folder {output} {reason}: nothing was written. Give a new folder.")


def _cannot_write(output: Path, error: OSError) -> OSError:
    return OSError(
        f"The output folder {output} cannot be written ({error.strerror or error}): nothing was written. Give a "
        "folder that you may write to, on a disk with free space."
    )


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end. Hidden, next to it: whatever stops the merge leaves no checkpoint.

    The lock next to it is released by the system when its process dies, however that happens.
    """
    target = Path(os.path.realpath(output))
    created = [parent for parent in target.parents if not parent.exists()]
    partial = target.parent / f"{_partial_prefix(target)}{uuid.uuid4().hex}"
    lock = FileLock(f"{partial}.lock")
    try:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            with contextlib.suppress(NotImplementedError):  # a file system without locks, where nothing is removed
                lock.acquire(timeout=0)
            partial.mkdir()
        except OSError as error:
            raise _cannot_write(output, error) from error
        yield partial
        try:
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except OSError as error:
            raise _cannot_write(output, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _release(lock)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    _release(lock)


def _release(lock: FileLock) -> None:
    lock.release()
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(output: Path) -> None:
    """What merges into this output left that were killed on this machine: their locks can be taken.

    Not all network file systems tell other machines of a lock, so that the name has the machine's name in it.
    """
    for partial in output.parent.glob(f"{glob.escape(_partial_prefix(output))}*"):
        if partial.is_dir() and os.path.lexists(f"{partial}.lock"):
            lock = FileLock(f"{partial}.lock")
            with contextlib.suppress(OSError, NotImplementedError):  # held, or not to be had
                lock.acquire(timeout=0)
                shutil.rmtree(partial, ignore_errors=True)
                _release(lock)


def _base_folder(base: str | Path | None) -> Path:
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


def _read_config(folder: Path) -> PreTrainedConfig:
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


def _skeleton(config: PreTrainedConfig, folder: Path) -> Any:
    try:
        return build_skeleton(config)
    except DAMAGE as error:
        raise MergeError(
            f"No model can be built from {folder / CONFIG_NAME} ({first_line(error)}): it is damaged. {AGAIN}"
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


def _files_to_copy(base: Path, adapter: Path) -> dict[str, Path]:
    """By their path in the output: all of the base but weights and card, and the adapter's own tokenizer over it."""
    files = {}
    skip = (*WEIGHT_FILES, CONFIG_NAME, "README.md", ".*")
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in skip)]
        linked = [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
        if linked:
            raise MergeError(f"{linked[0]} is a link to a folder: it is not followed. Put the folder itself there.")
        for path in (Path(folder, name) for name in names if not any(fnmatch(name, pattern) for pattern in skip)):
            refuse_outside(path, base)
            files[str(path.relative_to(base))] = path
    for pattern in (*TOKENIZER_FILES, *TEMPLATE_FILES):
        for path in adapter.glob(pattern):
            refuse_outside(path, adapter)
            if path.is_file():
                files[path.name] = path
    return files


def _copy_files(files: dict[str, Path], partial: Path) -> None:
    for name, source in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / name)


def _embedding_rows(skeleton: Any, checkpoint: CheckpointFiles) -> int:
    """Rows of the base's embedding: those of its configuration, which its files must have, too."""
    embedding = skeleton.get_input_embeddings()
    path = next(path for path, module in skeleton.named_modules() if module is embedding)
    if checkpoint.has(path, "weight"):
        checkpoint.entry(path, "weight")
    return len(embedding.weight)


def _check_tokenizer(partial: Path, config: PreTrainedConfig, rows: int, adapter: Path) -> None:
    """Refuses a tokenizer with tokens that the merged model has no embedding for, and one that does not load.

    Args:
        partial (`Path`): the merged model's folder, with its tokenizer's files and no weights.
        config (`PreTrainedConfig`): of the merged model.
        rows (`int`): of its embedding.
        adapter (`Path`): the adapter's folder, whose tokenizer came over the base's.
    """
    if not any(path for pattern in TOKENIZER_FILES for path in partial.glob(pattern)):
        return
    own = any(path.is_file() for pattern in TOKENIZER_FILES for path in adapter.glob(pattern))
    try:
        vocabulary = AutoTokenizer.from_pretrained(partial, config=config, trust_remote_code=False).get_vocab()
    except Exception as error:  # tokenizers raises nothing more special
        settings = partial / "tokenizer_config.json"
        if not own or (settings.is_file() and "auto_map" in read_json(settings, AGAIN)):
            return  # the base's own, which a merge does not make worse, or one that needs code of its own
        raise MergeError(
            f"The tokenizer in {adapter} does not load ({first_line(error)}). Repair it, or remove its files: the "
            "base has one."
        ) from error
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        raise MergeError(
            f"The tokenizer in {adapter if own else 'the base'} has {len(beyond)} tokens ({beyond[0][1]!r} first) "
            f"beyond the {rows} rows of the base's embedding. Give a base whose embedding was resized and trained for "
            "them, or take them out of the tokenizer."
        )


def _merge_task_model(content: AdapterContent, adapter: Path, base: Path, partial: Path, report: MergeReport) -> None:
    """Merges an adapter with a task's head, in memory: the encoders that have one are small."""
    config = _read_config(adapter if os.path.lexists(adapter / CONFIG_NAME) else base)
    merged, loading = _load(base, config, "AutoModel", dtype=config.dtype or "auto")
    state = merged.state_dict()
    unknown = content.saved_whole.keys() - state.keys()
    if unknown:
        raise MergeError(
            f"{adapter} holds {min(unknown)}, which {type(merged).__name__} does not have. Put the configuration of "
            f"the task model, which names its class, beside the adapter: model.config.save_pretrained('{adapter}')."
        )
    for name, values in content.saved_whole.items():
        if values.shape != state[name].shape:
            raise MergeError(
                f"{name} has the shape {tuple(values.shape)} in {adapter}, and {tuple(state[name].shape)} in "
                f"{type(merged).__name__}. Give the configuration and the base that it was trained with."
            )
    before = {name: state[name].clone() for name in content.saved_whole}
    untrained = loading["missing_keys"] - content.saved_whole.keys()
    if untrained:
        raise MergeError(
            f"{min(untrained)} of {type(merged).__name__} is neither in {base} nor in {adapter}, so it would be "
            "random. Give the base that the adapter was trained on."
        )
    _refuse_other_shapes(loading, base, merged)
    _check_fit(content.deltas, merged, adapter)
    _check_tokenizer(partial, config, len(merged.get_input_embeddings().weight), adapter)
    bias_free = [path for path in content.deltas if merged.get_submodule(path).bias is None]
    if bias_free:
        raise MergeError(
            f"{type(merged).__name__} has no bias where this adapter needs one ({bias_free[0]} first). Keep the "
            "adapter: PEFT applies it as it is."
        )
    prompt = _prompt(partial, config)
    expected = _logits(_with_adapter(copy.deepcopy(merged), adapter, content), prompt, base)
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
    again, _ = _load(partial, _read_config(partial), "AutoModel")
    report.difference = _difference(_logits(again, prompt, partial), expected, base)
    _refuse_difference(report.difference, _dtypes(merged))


def _verify(
    content: AdapterContent,
    adapter: Path,
    base: Path,
    original: PreTrainedConfig,
    partial: Path,
    config: PreTrainedConfig,
    report: MergeReport,
    written: set[torch.dtype],
) -> None:
    """Compares the logits of base plus adapter with those of the merged model. The base is looked at first.

    Args:
        content, adapter: the adapter, and its folder.
        base, original: the base's folder and configuration.
        partial, config: the merged model's folder and configuration.
        report: is given the differences.
        written: the dtypes of the changed and new tensors.
    """
    prompt = _prompt(partial, config)
    plain, loading = _load(base, original)
    _refuse_other_shapes(loading, base, plain)
    if loading["missing_keys"]:
        raise MergeError(
            f"{base} does not load into {type(plain).__name__}: {min(loading['missing_keys'])} is missing. {AGAIN}"
        )
    expected = _logits(_with_adapter(plain, adapter, content), prompt, base)
    del plain
    merged, found = _load(partial, config)
    unexpected = found["unexpected_keys"] - loading["unexpected_keys"]
    wrong = found["missing_keys"] | found["mismatched_keys"] | unexpected
    if wrong:
        raise MergeError(
            f"The merged checkpoint does not load into {type(merged).__name__}: {min(wrong)} is missing, unexpected "
            "or of another shape, and the base loads. It was removed: keep the adapter, and report this model."
        )
    logits, dtypes = _logits(merged, prompt, partial), _dtypes(merged)
    del merged
    report.difference = _difference(logits, expected, base)
    # In files of mixed dtypes, a bias may be stored in a coarser one than the model is loaded in.
    _refuse_difference(report.difference, dtypes | written)
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
    quantized, _ = _load(base, config, quantization_config=settings)
    return _difference(logits, _logits(_with_adapter(quantized, adapter, content), prompt, base), base)


def _load(
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


def _refuse_other_shapes(loading: dict[str, set[str]], base: Path, model: Any) -> None:
    if loading["mismatched_keys"]:
        raise MergeError(
            f"{base} does not load into {type(model).__name__}: {min(loading['mismatched_keys'])} is of "
            f"another shape than {CONFIG_NAME} says. {AGAIN}"
        )


def _with_adapter(model: Any, adapter: Path, content: AdapterContent) -> Any:
    """The model with the adapter as PEFT applies it."""
    from .tuner import load_adapter  # and with it PEFT, which a merge alone does without

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


def _refuse_difference(difference: float, dtypes: set[torch.dtype]) -> None:
    dtype = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 1.0))
    tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
    if not difference <= tolerance:
        raise MergeError(
            f"The merged model's logits differ from those of base plus adapter by {difference:.1e} of the largest, "
            f"and rounding in {dtype} explains {tolerance:.0e}. The output was removed: keep the adapter, and "
            "report this model."
        )


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _prompt(folder: Path, config: PreTrainedConfig) -> Tensor:
    """A sentence: on tokens in no order, the rounding of a 16-bit model grows to the size of its logits."""
    text_config = config.get_text_config()
    length = min(32, getattr(text_config, "max_position_embeddings", None) or 32)
    with contextlib.suppress(Exception):  # a folder without a tokenizer, of whatever kind it is
        tokens = AutoTokenizer.from_pretrained(folder, config=config)(PROMPT, return_tensors="pt").input_ids
        if len(tokens.unique()) > 8:
            return tokens[:, :length]
    return torch.arange(2, 2 + length).remainder(text_config.vocab_size)[None]


@torch.no_grad()
def _logits(model: nn.Module, prompt: Tensor, folder: Path) -> Tensor:
    """The model's first output: logits, of tokens or classes, or the starts of answers."""
    try:
        return model.eval()(input_ids=prompt.to(next(model.parameters()).device))[0].float().cpu()
    except DAMAGE as error:
        raise MergeError(
            f"The model in {folder} does not run on this machine ({first_line(error)}), so that the merge cannot be "
            "verified. Look at its files, or merge without verifying."
        ) from error


def _difference(found: Tensor, expected: Tensor, base: Path) -> float:
    if not expected.isfinite().all():
        raise MergeError(
            f"The logits of {base} with the adapter are not finite: the base is damaged, or its dtype does not hold "
            f"them. {AGAIN}"
        )
    largest = expected.abs().max().item()
    return (found - expected).abs().max().item() / (largest or 1.0)


def _write_config(config: PreTrainedConfig, base: Path, partial: Path) -> None:
    """Writes the configuration, with what an old base's says on generation, which Transformers takes out of it."""
    record = json.loads(config.to_json_string())
    old = read_json(base / CONFIG_NAME, AGAIN)
    on_generation = GenerationConfig().to_dict().keys() - {"transformers_version"}
    record |= {name: old[name] for name in sorted(old.keys() & on_generation) if name not in record}
    (partial / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
