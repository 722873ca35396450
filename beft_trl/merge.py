"""Folds an adapter into a plain Transformers checkpoint, file by file, without loading the model."""

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedConfig
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .importance import SCORES_FILE, BiasScores
from .layout import BiasSite, build_skeleton, features, find_bias_sites, output_projection


PREFIX, SUFFIX = "base_model.model.", ".beft_bias"
# Config fields that give the projections of an architecture their biases.
SWITCHES = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "bias", "use_bias")
# The largest difference of a logit, relative to the largest logit, that rounding in the checkpoint's dtype explains.
# In bf16 that is much: on SmolLM2 the same adapter differs by 3e-2 between bf16 and fp32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
PROMPT = (
    "When the rain had stopped, she opened the window and wrote down what she still remembered of the long journey."
)
WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


class MergeError(ValueError):
    """An adapter that cannot be merged, with the reason and what would work. Nothing was written."""


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


@dataclass
class _Plan:
    """Biases by module path, in fp32, to `add` to existing ones and to `create`, and the config that has them."""

    rule: str
    config: PreTrainedConfig
    add: dict[str, Tensor]
    create: dict[str, Tensor]


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
    report = MergeReport(str(output))
    if content.saved_whole:
        with _whole_or_nothing(output) as partial:
            _copy_files(base_folder, partial, adapter)
            _merge_task_model(content, adapter, base_folder, partial, report)
            _write_card(partial, adapter, base_folder, report)
        return report
    config = AutoConfig.from_pretrained(base_folder)
    if getattr(config, "quantization_config", None):
        raise MergeError(
            f"{base_folder} holds quantised weights. A merge goes into the original full-precision weights: give the "
            "model that they were quantised from as base."
        )
    skeleton = build_skeleton(config)
    sites = find_bias_sites(skeleton)
    _check_fit(content.deltas, skeleton, adapter)
    checkpoint = _Checkpoint(base_folder, skeleton)
    plan = _plan(content.deltas, config, skeleton, sites, checkpoint, output_projection)

    report.rule = plan.rule
    with _whole_or_nothing(output) as partial:
        _write_weights(plan, checkpoint, partial, report, link)
        _copy_files(base_folder, partial, adapter)
        if verify:
            _verify(adapter, base_folder, partial, plan.config, report)
        _write_card(partial, adapter, base_folder, report)
        plan.config.save_pretrained(partial)
    return report


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end. Hidden, beside it: whatever stops the merge leaves no checkpoint."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass
class AdapterContent:
    """What an adapter's folder holds.

    Attributes:
        deltas: fp32, shape (n,), by the path of their module.
        saved_whole: tensors of modules that were trained whole, such as a task's head, by name.
        base_model: name or path of the base model, where the adapter says it.
    """

    deltas: dict[str, Tensor]
    saved_whole: dict[str, Tensor]
    base_model: str | None


def read_adapter(folder: Path) -> AdapterContent:
    """Reads the folder of an adapter.

    Raises:
        MergeError: where the folder holds no BEFT adapter, or a damaged one.
    """
    if not (folder / "adapter_config.json").is_file():
        raise MergeError(f"{folder} holds no adapter_config.json: give the folder that a BEFT run wrote.")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config["peft_type"]
        tensors = load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MergeError(
            f"The adapter in {folder} cannot be read ({error}): it is damaged or incomplete. Take another checkpoint."
        ) from error
    saved = [f".{module}." for module in config.get("modules_to_save") or ()]
    deltas, saved_whole, foreign = {}, {}, []
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and name.endswith(SUFFIX):
            deltas[path.removesuffix(SUFFIX)] = tensor.float().flatten()
        elif any(module in f".{path}" for module in saved):
            saved_whole[path] = tensor
        else:
            foreign.append(name)
    if kind != "BEFT" or foreign or not deltas:
        found = f"its type is {kind}" if kind != "BEFT" else f"it holds {', '.join(foreign[:2]) or 'no tensor'}"
        raise MergeError(f"{folder} is no BEFT adapter: {found}. Merge others with PEFT's own merge_and_unload.")
    broken = next((path for path, values in (deltas | saved_whole).items() if not values.isfinite().all()), None)
    if broken:
        raise MergeError(f"{broken} in {folder} is not finite: the run broke. Take an earlier checkpoint.")
    return AdapterContent(deltas, saved_whole, config.get("base_model_name_or_path"))


def _base_folder(base: str | Path | None) -> Path:
    if not base:
        raise MergeError("The adapter does not say what its base model was: give it as base.")
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(str(base), ignore_patterns=["*.bin", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]))
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


class _Checkpoint:
    """The weight files of a folder, and where a module's tensors are in them."""

    def __init__(self, folder: Path, skeleton: Any):
        self.folder = folder
        self._base_prefix = f"{skeleton.base_model_prefix}."
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        if index.is_file():
            self.file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SAFE_WEIGHTS_NAME).is_file():
            with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        else:
            raise MergeError(
                f"{folder} has no model.safetensors and no index of safetensors shards. Load the model with "
                "Transformers and write it with save_pretrained first."
            )
        self.shards = sorted(set(self.file_of.values()))
        missing = [shard for shard in self.shards if not (folder / shard).is_file()]
        if missing:
            raise MergeError(f"{folder} lacks {missing[0]}, which its index names. Download the model again.")

    def name(self, path: str, tensor: str) -> str:
        """The name in the files of a tensor of the module at `path`; weights tell it for biases that are to come.

        Files may leave out or add the base model's prefix, and keep an older order of a name's parts.
        """
        for candidate in (path, path.removeprefix(self._base_prefix), f"{self._base_prefix}{path}"):
            if f"{candidate}.weight" in self.file_of:
                return f"{candidate}.{tensor}"
        parts = path.split(".")
        near = [
            name.removesuffix(".weight")
            for name in self.file_of
            if name.endswith(".weight") and sorted(name.split(".")[:-1]) == sorted(parts)
        ]
        if len(near) == 1:
            return f"{near[0]}.{tensor}"
        raise MergeError(
            f"{self.folder} has no tensor {path}.weight: its names are not those of the model's modules. Load the "
            "model with Transformers and write it with save_pretrained first."
        )

    def tensor(self, path: str, tensor: str) -> Tensor:
        name = self.name(path, tensor)
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    def dtype(self, path: str) -> torch.dtype:
        name = self.name(path, "weight")
        with safe_open(self.folder / self.file_of[name], "pt") as file:
            return file.get_slice(name)[:0].dtype


def _plan(
    deltas: dict[str, Tensor],
    config: PreTrainedConfig,
    skeleton: nn.Module,
    sites: list[BiasSite],
    checkpoint: _Checkpoint,
    to_output: bool,
) -> _Plan:
    """The first rule that has a place for every delta."""
    biases = _biases(skeleton)
    if not to_output and deltas.keys() <= biases:
        return _Plan("The deltas are added to the model's own biases.", config, deltas, {})
    variants = list(_with_biases(config, skeleton))
    if not to_output:
        for rule, variant, created in variants:
            if deltas.keys() <= biases | created:
                add = {path: delta for path, delta in deltas.items() if path in biases}
                return _Plan(rule, variant, add, _filled(created, deltas, skeleton))
    folded = _fold(deltas, skeleton, sites, checkpoint)
    if folded is not None:
        rule = "The value bias is added to the bias of the output projection, as W_o b_v."
        if folded.keys() <= biases:
            return _Plan(rule, config, folded, {})
        for switched, variant, created in variants:
            if folded.keys() <= biases | created:
                return _Plan(f"{rule} {switched}", variant, {}, _filled(created, folded, skeleton))
    name = type(skeleton).__name__
    if to_output:
        raise MergeError(
            f"The bias of this adapter cannot become an output-projection bias in {name}: that takes a value bias and "
            "an output projection with a bias, behind plain softmax attention. Merge without output_projection."
        )
    raise MergeError(
        f"{name} has no bias where this adapter needs one ({next(iter(deltas))} first), no configuration switch that "
        "creates it, and no output-projection bias that could stand for a value bias. Keep the adapter: PEFT and "
        "servers that load PEFT adapters apply it as it is."
    )


def _filled(created: set[str], values: dict[str, Tensor], skeleton: nn.Module) -> dict[str, Tensor]:
    """All biases that a switch creates: the values where there are any, else zeros."""
    return {
        path: values[path] if path in values else torch.zeros(features(skeleton.get_submodule(path))[1])
        for path in created
    }


def _biases(model: nn.Module) -> set[str]:
    return {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}


def _with_biases(config: PreTrainedConfig, skeleton: nn.Module) -> Iterator[tuple[str, PreTrainedConfig, set[str]]]:
    """Configurations that build the same model with more biases: a sentence on it, itself, and the new biases."""
    names = set(skeleton.state_dict())
    candidates = []
    for switch in SWITCHES:
        if getattr(config.get_text_config(), switch, None) is False:
            variant = copy.deepcopy(config)
            setattr(variant.get_text_config(), switch, True)
            candidates.append((f"The biases are created by {switch}=True in the config.", variant))
    if config.model_type == "mistral" and config.sliding_window is None:
        fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "sliding_window")}
        variant = LlamaConfig(**{**fields, "attention_bias": True, "architectures": ["LlamaForCausalLM"]})
        candidates.append(("The model, a Mistral without sliding window, is written as a Llama with biases.", variant))
    for rule, variant in candidates:
        created = set(build_skeleton(variant).state_dict()) - names
        if created and all(name.endswith(".bias") for name in created):
            yield rule, variant, {name.removesuffix(".bias") for name in created}


def _fold(
    deltas: dict[str, Tensor], skeleton: nn.Module, sites: list[BiasSite], checkpoint: _Checkpoint
) -> dict[str, Tensor] | None:
    """`W_o b_v` by the path of the output projection, or `None` where it would not be exact.

    Source: https://arxiv.org/abs/2302.08626, section 3; with grouped queries each value head stands for its group.
    """
    rows = {site.module: site.rows for site in sites if site.term == "value"}
    folded = {}
    for path, delta in deltas.items():
        attention: Any = skeleton.get_submodule(path.rpartition(".")[0])
        found = output_projection(attention)
        if path not in rows or found is None or hasattr(attention, "sinks"):
            return None
        value = delta[rows[path]]
        if delta.count_nonzero() != value.count_nonzero():
            return None  # the adapter trains another term, too
        name = f"{path.rpartition('.')[0]}.{found[0]}"
        size = features(found[1])[0]
        head = getattr(attention, "v_head_dim", None) or getattr(attention, "head_dim", None)
        if size != len(value):
            if not head or size % len(value) or len(value) % head:
                return None
            value = value.view(-1, 1, head).expand(-1, size // len(value), -1).flatten()
        weight = checkpoint.tensor(name, "weight").float()
        folded[name] = value @ weight if weight.shape[0] == size and weight.shape[1] != size else weight @ value
    return folded


def _write_weights(plan: _Plan, checkpoint: _Checkpoint, partial: Path, report: MergeReport, link: bool) -> None:
    changed: dict[str, dict[str, Tensor]] = {}
    for path, delta in plan.add.items():
        name = checkpoint.name(path, "bias")
        bias = checkpoint.tensor(path, "bias")
        changed.setdefault(checkpoint.file_of[name], {})[name] = (bias.float() + delta).to(bias.dtype)
    added = {}
    for path, values in plan.create.items():
        added[checkpoint.name(path, "bias")] = values.to(checkpoint.dtype(path))
    report.changed = sorted(name for shard in changed.values() for name in shard)
    report.added = sorted(added)

    count = len(checkpoint.shards) + bool(added)
    new_name = {shard: _shard_name(number, count) for number, shard in enumerate(checkpoint.shards, 1)}
    if not added:
        new_name = {shard: shard for shard in checkpoint.shards}
    with ThreadPoolExecutor() as pool:
        hashes = {}
        copies = []
        for shard in checkpoint.shards:
            source, target = checkpoint.folder / shard, partial / new_name[shard]
            if link and shard not in changed:
                os.link(source.resolve(), target)
                continue
            hashes[shard] = pool.submit(_hash, source)
            copies.append(pool.submit(_copy_and_patch, source, target, changed.get(shard, {})))
        for copy_done in copies:
            copy_done.result()
        report.base_hashes = {shard: future.result() for shard, future in hashes.items()}
    if added:
        last = _shard_name(count, count)
        save_file(added, partial / last, metadata={"format": "pt"})
        weight_map = {name: new_name[shard] for name, shard in checkpoint.file_of.items()} | dict.fromkeys(added, last)
        size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    elif (checkpoint.folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        shutil.copyfile(checkpoint.folder / SAFE_WEIGHTS_INDEX_NAME, partial / SAFE_WEIGHTS_INDEX_NAME)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _hash(file: Path, size: int = 1 << 22) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(size))
    with open(file, "rb", buffering=0) as reading:
        while count := reading.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _copy_and_patch(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    shutil.copyfile(source, target)  # in the kernel, so that the bytes do not pass through this process
    _patch(target, tensors)


def _patch(file: Path, tensors: dict[str, Tensor]) -> None:
    """Overwrites tensors of a safetensors file by others of their shape and dtype. Its header stays as it is.

    Format: https://huggingface.co/docs/safetensors, 8 bytes with the header's length, the header in JSON, the data.
    """
    if not tensors:
        return
    with open(file, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in tensors.items():
            start, end = header[name]["data_offsets"]
            data = save({name: tensor.contiguous()})
            stream.seek(8 + length + start)
            stream.write(data[len(data) - (end - start) :])


def _copy_files(base: Path, partial: Path, adapter: Path) -> None:
    """Everything of the base but weights and card, and the adapter's own tokenizer and template over it."""
    skip = shutil.ignore_patterns(*WEIGHT_FILES, CONFIG_NAME, "README.md", ".*")
    shutil.copytree(base, partial, ignore=skip, dirs_exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for path in adapter.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, partial / path.name)


def _merge_task_model(content: AdapterContent, adapter: Path, base: Path, partial: Path, report: MergeReport) -> None:
    """Merges an adapter with a task's head, in memory: the encoders that have one are small."""
    if not (adapter / CONFIG_NAME).is_file():
        raise MergeError(
            f"{adapter} holds {next(iter(content.saved_whole))} of a task model, and not the configuration of that "
            f"model. Write it there: model.config.save_pretrained({str(adapter)!r})."
        )
    config = AutoConfig.from_pretrained(adapter)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        raise MergeError(f"{adapter / CONFIG_NAME} names no architecture of Transformers: {config.architectures}.")
    merged = architecture.from_pretrained(base, config=config, dtype=config.dtype or "auto")
    _check_fit(content.deltas, merged, adapter)
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
    unknown = merged.load_state_dict(content.saved_whole, strict=False).unexpected_keys
    if unknown:
        raise MergeError(f"{adapter} and the base do not match: {type(merged).__name__} has no {unknown[0]}.")
    merged.save_pretrained(partial)
    report.rule = "The deltas are added to the model's own biases, and the head that was trained is put in."
    report.changed = sorted(f"{path}.bias" for path in content.deltas)
    report.added = sorted(content.saved_whole)
    report.base_hashes = {file.name: _hash(file) for file in sorted(base.glob("*.safetensors"))}
    report.difference = _difference(_logits(architecture.from_pretrained(partial, dtype="auto"), prompt), expected)
    _refuse_difference(report.difference, merged.dtype)


def _verify(adapter: Path, base: Path, partial: Path, config: PreTrainedConfig, report: MergeReport) -> None:
    architecture = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    merged, info = architecture.from_pretrained(partial, config=config, dtype="auto", output_loading_info=True)
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        raise MergeError(
            f"The merged checkpoint does not load into {type(merged).__name__}: {wrong[0]} is missing, unexpected or "
            "of another shape. It was removed: keep the adapter, and report this model."
        )
    dtype, prompt = merged.dtype, _prompt(partial, config)
    found = _logits(merged, prompt)
    del merged
    from .tuner import load_adapter  # and with it PEFT, which a merge alone does without

    original = AutoConfig.from_pretrained(base)
    whole = getattr(transformers, (original.architectures or ["AutoModelForCausalLM"])[0])
    expected = _logits(load_adapter(whole.from_pretrained(base, dtype="auto"), str(adapter)), prompt)
    report.difference = _difference(found, expected)
    _refuse_difference(report.difference, dtype)
    scores = adapter / SCORES_FILE
    quantization = BiasScores.from_json(scores).quantization if scores.is_file() else None
    if quantization is not None:
        quantized = whole.from_pretrained(base, quantization_config=BitsAndBytesConfig(**quantization))
        report.quantized_difference = _difference(found, _logits(load_adapter(quantized, str(adapter)), prompt))


def _refuse_difference(difference: float, dtype: torch.dtype) -> None:
    if not difference <= TOLERANCE[dtype]:
        raise MergeError(
            f"The merged model's logits differ from those of base plus adapter by {difference:.1e} of the largest, "
            f"and rounding in {dtype} explains {TOLERANCE[dtype]:.0e}. The output was removed: keep the adapter, and "
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
