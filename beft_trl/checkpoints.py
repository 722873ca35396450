"""What a run finds in its output folder: complete checkpoints, which have a manifest, and results of other runs."""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from .importance import SCORES_FILE, BiasScores


# Not accelerate's logger, which wants a running accelerator: checkpoints are also looked at without one.
logger = logging.getLogger(__name__)

MANIFEST_FILE = "beft_checkpoint.json"


def check_writable(output_dir: str | Path) -> None:
    """Raises OSError where no file can be written to `output_dir`, or to where it would be made."""
    folder = Path(output_dir).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir} cannot be written ({error.strerror}): nothing was loaded or trained. Give a "
            "folder that you may write to, on a disk with free space."
        ) from error


def mark_complete(checkpoint: str | Path, engine: str, processes: int) -> None:
    """Writes the manifest, when every process has written its files: their sizes and hashes, and what wrote them.

    Args:
        checkpoint: folder of the checkpoint.
        engine: name of the engine that can resume it, see `engines.ENGINES`.
        processes: number of processes that wrote it.
    """
    folder = Path(checkpoint)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"engine": engine, "processes": processes, "files": files}
    partial = folder / f".{MANIFEST_FILE}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST_FILE)


def damage(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, or `None` where it is."""
    folder = Path(checkpoint)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}: it was not written to the end, or not by a BEFT run"
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is damaged"
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


def checkpoint_to_resume(output_dir: str | Path, asked: str | bool | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, `True` being the newest complete one.

    Raises:
        ValueError: where there is none.
    """
    word = str(asked or False).lower()  # a recipe gives "true" and "false" as text
    if word == "false":
        return None
    if word != "true":
        return str(asked)
    last = last_complete_checkpoint(output_dir)
    if last is None:
        raise ValueError(
            f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint. Give the path of one, or "
            "start anew without it."
        )
    return last


def recorded_scores(checkpoint: str | Path, bias_term: str, relative_learning_rate: float | None) -> BiasScores:
    """The scores, and with them the selection and the learning rates, of a checkpoint.

    Raises:
        ValueError: where it trains another term than `bias_term`, or one of the two runs has relative learning rates
            and the other has none.
    """
    scores = BiasScores.from_json(Path(checkpoint) / SCORES_FILE)
    if bias_term not in ("auto", scores.selected):
        raise ValueError(
            f"{checkpoint} trains the {scores.selected} bias, and this run asks for bias_term={bias_term!r}. Resume "
            "with bias_term='auto' or the recorded one, or start anew in another output_dir."
        )
    if bool(scores.learning_rates) != (relative_learning_rate is not None):
        raise ValueError(
            f"{checkpoint} was trained {'with' if scores.learning_rates else 'without'} relative_learning_rate, and "
            f"this run asks for relative_learning_rate={relative_learning_rate}. Resume as it was written, or "
            "start anew in another output_dir."
        )
    return scores


def refuse_foreign_output(output_dir: str | Path, base_model: str, bias_term: str) -> None:
    """Raises ValueError where the folder, or the newest checkpoint in it, is of another base model or term."""
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


def refuse_other_engine(checkpoint: str | Path, engine: str, processes: int) -> None:
    """Raises ValueError where a checkpoint is damaged or its optimizer states are laid out for another engine."""
    reason = damage(checkpoint)
    if reason is not None:
        raise ValueError(
            f"{checkpoint} cannot be resumed: {reason}. Use resume_from_checkpoint=True for the newest complete one."
        )
    manifest: dict[str, Any] = json.loads((Path(checkpoint) / MANIFEST_FILE).read_text(encoding="utf-8"))
    written = (manifest["engine"], manifest["processes"])
    if written != (engine, processes):
        raise ValueError(
            f"{checkpoint} was written by {written[0]} on {written[1]} process(es), and this run is {engine} on "
            f"{processes}: optimizer states and batches are split otherwise. Resume as it was written, or start anew "
            "in another output_dir."
        )


def _sha256(path: Path) -> str:
    # A checkpoint of deltas is small: its largest file is the tokenizer.
    return hashlib.sha256(path.read_bytes()).hexdigest()
