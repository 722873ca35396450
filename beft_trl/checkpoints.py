"""What a run finds in its output folder: complete checkpoints, which have a manifest, and results of other runs."""

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from .identity import differences
from .importance import SCORES_FILE, BiasScores


# Not accelerate's logger, which wants a running accelerator: checkpoints are also looked at without one.
logger = logging.getLogger(__name__)

MANIFEST_FILE = "beft_checkpoint.json"
LOCK_FILE = "_beft.lock"  # the Trainer uploads no file whose name begins with an underscore
STATE_FILE = "trainer_state.json"


def check_writable(output_dir: str | Path) -> None:
    """Raises OSError if no file can be written to `output_dir`, or to where it would be made."""
    folder = Path(output_dir).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir} cannot be written ({error.strerror}): nothing was loaded or trained. Give a "
            "folder that you may write to, on a disk with free space."
        ) from error


@contextlib.contextmanager
def output_lock(output_dir: str | Path) -> Iterator[None]:
    """Holds the output folder for one run. The lock goes with the process that holds it, however that ends.

    Raises:
        RuntimeError: if another process holds it.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output_dir) / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"Another run is writing to output_dir {output_dir}: the two would mix their checkpoints. Nothing was "
            "trained. Wait for it, stop it, or give this run another output_dir."
        ) from None
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning(f"{output_dir} cannot be locked ({error}): see to it that no other run writes there.")
    try:
        yield
    finally:
        lock.release()


def mark_complete(checkpoint: str | Path, engine: str, processes: int, run: dict[str, Any]) -> None:
    """Writes the manifest, when every process has written its files: their sizes and hashes, and what wrote them.

    Args:
        checkpoint (`str` or `Path`): folder of the checkpoint.
        engine (`str`): name of the engine that can resume it, see `engines.ENGINES`.
        processes (`int`): number of processes that wrote it.
        run (`dict`): what identifies the run, see [`identity.identify_run`].
    """
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"engine": engine, "processes": processes, "run": run, "files": files}
    partial = folder / f".{MANIFEST_FILE}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST_FILE)


def manifest_of(checkpoint: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: if there is none, or a damaged one, with the reason.
    """
    try:
        manifest = json.loads((Path(checkpoint) / MANIFEST_FILE).read_text(encoding="utf-8"))
        sizes = [(file["bytes"], file["sha256"]) for file in manifest["files"].values()]
        known = isinstance(manifest["engine"], str) and isinstance(manifest["processes"], int)
        complete = {ADAPTER_SAFE_WEIGHTS_NAME, STATE_FILE, SCORES_FILE} <= manifest["files"].keys()
        if not (sizes and known and complete and isinstance(manifest.get("run", {}), dict)):
            raise ValueError(f"{MANIFEST_FILE} is damaged")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST_FILE}: it was not written to the end, or not by a BEFT run") from None
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST_FILE} is damaged") from None
    return manifest


def damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, or `None` if it is."""
    folder = Path(checkpoint)
    try:
        files = manifest_of(folder)["files"]
    except ValueError as error:
        return str(error)
    for path in folder.glob("*.pt*"):
        if path.is_dir():
            return f"{path.name} is a folder"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
        if path.parent == folder and path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{name} is no file of PyTorch's"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; a warning names those that were passed over for it."""
    checkpoints = sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints):
        reason = damage(checkpoint)
        if reason is None:
            if passed_over:
                logger.warning(f"Resuming from {checkpoint}: passed over {'; '.join(passed_over)}.")
            return checkpoint
        passed_over.append(f"{checkpoint}, since {reason}")
    if passed_over:
        logger.warning(f"No complete checkpoint in {output_dir}: passed over {'; '.join(passed_over)}.")
    return None


def refuse_foreign_output(output_dir: str | Path, base_model: str, bias_term: str) -> None:
    """Raises ValueError if the folder, or the newest checkpoint in it, is of another base model or term."""
    folder = Path(output_dir)
    last = last_complete_checkpoint(folder)
    for found in (folder, Path(last)) if last else (folder,):
        trained = any(found.glob("adapter_model.*"))
        if trained and (found / SCORES_FILE).is_file():
            recorded = BiasScores.from_json(found / SCORES_FILE)
            if recorded.base_model == base_model and bias_term in ("auto", recorded.selected):
                continue
            other = f"the {recorded.selected} bias of {recorded.base_model or 'an unnamed model'}"
        elif trained or any(found.glob("model*.safetensors")):
            other = "a model that no BEFT run wrote"
        else:
            continue
        raise ValueError(
            f"output_dir {folder} already holds a different run: {other}, in {found}. Give an empty or new "
            "output_dir, or resume that run with its own settings."
        )


def warn_of_other_runs(output_dir: str | Path, run: dict[str, Any]) -> None:
    """Warns before a run starts anew next to checkpoints of another one, which it would not resume from."""
    for checkpoint in reversed(sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []):
        with contextlib.suppress(ValueError):
            changed = differences(manifest_of(checkpoint).get("run", {}), run)
            if changed:
                told = ", ".join(f"{name}={short(there)}" for name, (there, _) in changed.items())
                logger.warning(
                    f"{checkpoint} is of another run ({told}). This one starts anew next to it. Give each run an "
                    "output_dir of its own."
                )
                return


def refuse_broken_loss(loss: float, step: int, output_dir: str | Path) -> None:
    """Raises FloatingPointError for the loss of a step that is NaN or infinite, with the last complete checkpoint."""
    if not math.isfinite(loss):
        last = last_complete_checkpoint(output_dir)
        raise FloatingPointError(
            f"The loss is {loss} at step {step}. Stopped before the optimizer step; "
            f"{f'the last checkpoint is {last}' if last else 'no checkpoint was written yet'}. Lower learning_rate, "
            "or look at the rows of this step."
        )


def short(value: Any) -> str:
    """A value in at most 60 characters, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sha256(path: Path) -> str:
    # A checkpoint of deltas is small: its largest file is the tokenizer.
    return hashlib.sha256(path.read_bytes()).hexdigest()
