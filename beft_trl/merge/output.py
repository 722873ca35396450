"""The folder that a merge writes: all of it or nothing, and what is in it next to the weights."""

import contextlib
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

from filelock import FileLock
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from ..weight_files import AGAIN, MergeError, read_json, refuse_outside
from .base import OTHER_WEIGHT_FILES


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
            largest logit; `None` if nothing was verified.
        quantized_difference: the same between the merged model and the quantised base that the adapter was trained
            on; `None` if it was not quantised.
        gguf: file for llama.cpp, or `None` if none was asked for.
    """

    output: str
    rule: str = ""
    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    base_hashes: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    quantized_difference: float | None = None
    gguf: str | None = None


def check_output(output: Path) -> None:
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
def whole_or_nothing(output: Path) -> Iterator[Path]:
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


def files_to_copy(base: Path, adapter: Path | None = None) -> dict[str, Path]:
    """By their path in the output: all of the base but weights and card, and an adapter's own tokenizer over it."""
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
        for path in adapter.glob(pattern) if adapter is not None else ():
            refuse_outside(path, path.parent)
            if path.is_file():
                files[path.name] = path
    return files


def copy_files(files: dict[str, Path], partial: Path) -> None:
    for name, source in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial / name)


def write_config(config: PreTrainedConfig, base: Path, partial: Path) -> None:
    """Writes the configuration, with what an old base's says on generation, which Transformers takes out of it.

    Transformers 5 has the rotary base and its scaling only in `rope_parameters`. Readers of the older form, such as
    mlx-lm, would pass over them and take their own default: they are written in both.
    """
    record = json.loads(config.to_json_string())
    rotary = record.get("rope_parameters") or {}
    record |= {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
    if "rope_theta" in rotary and rotary.get("rope_type", "default") != "default":
        record["rope_scaling"] = rotary
    old = read_json(base / CONFIG_NAME, AGAIN)
    on_generation = GenerationConfig().to_dict().keys() - {"transformers_version"}
    record |= {name: old[name] for name in sorted(old.keys() & on_generation) if name not in record}
    (partial / CONFIG_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_card(partial: Path, adapter: Path, base: Path, report: MergeReport) -> None:
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
