"""What a run finds in its output folder: complete checkpoints, which have a manifest, and results of other runs."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from .identity import FIXED, differences
from .importance import SCORES_FILE, BiasScores, recorded_learning_rates


# Not accelerate's logger, which wants a running accelerator: checkpoints are also looked at without one.
logger = logging.getLogger(__name__)

MANIFEST_FILE = "beft_checkpoint.json"
LOCK_FILE = "_beft.lock"  # the Trainer uploads no file whose name begins with an underscore
STATE_FILE, ADAPTER_CONFIG = "trainer_state.json", "adapter_config.json"


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


def _manifest(checkpoint: str | Path) -> dict[str, Any]:
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
        files = _manifest(folder)["files"]
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


def checkpoint_to_resume(output_dir: str | Path, asked: str | bool | None) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, `True` being the newest complete one.

    Raises:
        ValueError: if there is none.
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


def recorded_selection(
    checkpoint: str | Path, bias_term: str, relative_learning_rate: float | None
) -> tuple[BiasScores, dict[str, float]]:
    """The scores of a checkpoint, and with them the selection, and the learning rates.

    Raises:
        ValueError: if it trains another term than `bias_term`, or one of the two runs has relative learning rates
            and the other has none.
    """
    file = Path(checkpoint) / SCORES_FILE
    scores, rates = BiasScores.from_json(file), recorded_learning_rates(file)
    if bias_term not in ("auto", scores.selected):
        raise ValueError(
            f"{checkpoint} trains the {scores.selected} bias, and this run asks for bias_term={bias_term!r}. Resume "
            "with bias_term='auto' or the recorded one, or start anew in another output_dir."
        )
    if bool(rates) != (relative_learning_rate is not None):
        raise ValueError(
            f"{checkpoint} was trained {'with' if rates else 'without'} relative_learning_rate, and this run asks for "
            f"relative_learning_rate={relative_learning_rate}. Resume as it was written, or start anew in another "
            "output_dir."
        )
    return scores, rates


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


def refuse_other_run(
    checkpoint: str | Path, engine: str, processes: int, run: dict[str, Any], allow_changes: bool = False
) -> None:
    """Refuses to resume what another run wrote.

    Args:
        checkpoint (`str` or `Path`): folder of the checkpoint.
        engine (`str`): name of this run's engine.
        processes (`int`): number of this run's processes.
        run (`dict`): what identifies this run, see [`identity.identify_run`].
        allow_changes (`bool`, *optional*, defaults to `False`): take what may differ, such as the number of steps.

    Raises:
        ValueError: if the checkpoint is damaged, laid out for another engine, or of another run: what differs.
    """
    reason = damage(checkpoint)
    if reason is not None:
        raise ValueError(
            f"{checkpoint} cannot be resumed: {reason}. Use resume_from_checkpoint=True for the newest complete one."
        )
    manifest = _manifest(checkpoint)
    written = (manifest["engine"], manifest["processes"])
    if written != (engine, processes):
        raise ValueError(
            f"{checkpoint} was written by {written[0]} on {written[1]} process(es), and this run is {engine} on "
            f"{processes}: optimizer states and batches are split otherwise. Resume as it was written, or start anew "
            "in another output_dir."
        )
    if "run" not in manifest:
        if allow_changes:
            return
        raise ValueError(
            f"{checkpoint} does not say which base, data and settings it was trained with: it was written by a "
            "version before 0.2. Set allow_changed_resume=True if they are those of this run."
        )
    changed = differences(manifest["run"], run)
    fixed = [name for name in changed if name in FIXED]
    if not changed or (allow_changes and not fixed):
        return
    told = "; ".join(f"{name}={_short(there)} there, {_short(here)} here" for name, (there, here) in changed.items())
    if fixed:
        remedy = "Biases trained on another base mean nothing on this one: give that base, or another output_dir."
    else:
        remedy = "Resume with its settings, start anew in another output_dir, or set allow_changed_resume=True."
    of_this_run = _newest_of(Path(checkpoint).parent, engine, processes, run)
    if of_this_run is not None:
        remedy += f" {of_this_run} is the newest of this run."
    raise ValueError(f"{checkpoint} is of another run: {told}. {remedy}")


def warn_of_other_runs(output_dir: str | Path, run: dict[str, Any]) -> None:
    """Warns before a run starts anew next to checkpoints of another one, which it would not resume from."""
    for checkpoint in reversed(sort_checkpoints(str(output_dir)) if Path(output_dir).is_dir() else []):
        with contextlib.suppress(ValueError):
            changed = differences(_manifest(checkpoint).get("run", {}), run)
            if changed:
                told = ", ".join(f"{name}={_short(there)}" for name, (there, _) in changed.items())
                logger.warning(
                    f"{checkpoint} is of another run ({told}). This one starts anew next to it. Give each run an "
                    "output_dir of its own."
                )
                return


def _newest_of(folder: Path, engine: str, processes: int, run: dict[str, Any]) -> str | None:
    for checkpoint in reversed(sort_checkpoints(str(folder)) if folder.is_dir() else []):
        if damage(checkpoint) is None:
            manifest = _manifest(checkpoint)
            written = (manifest["engine"], manifest["processes"])
            if written == (engine, processes) and "run" in manifest and not differences(manifest["run"], run):
                return checkpoint
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_foreign_pickles(checkpoint: str | Path, trusted: bool) -> None:
    """Refuses a ZeRO checkpoint that another user could have written: DeepSpeed unpickles it, which runs its code.

    Raises:
        ValueError: if a file of it does not belong to this user, unless it is `trusted`.
    """
    if trusted or not hasattr(os, "geteuid"):
        return
    folder = Path(checkpoint)
    for path in (folder, *folder.rglob("*")):
        if path.lstat().st_uid != os.geteuid():
            raise ValueError(
                f"{path} belongs to another user, and DeepSpeed runs the code in a checkpoint when it loads it. Set "
                "trust_checkpoint=True if you know who wrote it."
            )


def refuse_other_tensors(checkpoint: str | Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuses a checkpoint whose adapter would not load whole into the model: PEFT passes over what does not fit.

    Args:
        checkpoint (`str` or `Path`): folder of the checkpoint.
        expected (`dict`): shapes of the tensors that the run trains, by their names in the adapter's file.

    Raises:
        ValueError: if tensors are missing, of another shape, or too many.
    """
    file = Path(checkpoint) / ADAPTER_SAFE_WEIGHTS_NAME
    try:
        kind = json.loads((Path(checkpoint) / ADAPTER_CONFIG).read_text(encoding="utf-8"))["peft_type"]
        if kind != "BEFT":
            raise ValueError(f"its type is {kind}")
        with safe_open(file, "pt") as adapter:
            names = adapter.keys()
            found = {name: tuple(adapter.get_slice(name).get_shape()) for name in names}
            broken = next((name for name in names if not adapter.get_tensor(name).isfinite().all()), None)
        if broken:
            raise ValueError(f"{broken} is not finite")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): take another checkpoint.") from error
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        there, here = found.get(wrong[0], "missing"), expected.get(wrong[0], "none")
        raise ValueError(
            f"{file} does not fit the model: {len(wrong)} of {len({*found, *expected})} tensors differ, first "
            f"{wrong[0]}, {there} in the file and {here} in the model. Give the base and the term that it was trained "
            "with, or start anew in another output_dir."
        )


def steps_of(checkpoint: str | Path) -> int:
    """The number of optimizer steps after which a checkpoint was written.

    Raises:
        ValueError: if its state is damaged.
    """
    file = Path(checkpoint) / STATE_FILE
    try:
        step = json.loads(file.read_text(encoding="utf-8"))["global_step"]
        TrainerState.load_from_json(str(file))
        if not isinstance(step, int) or step < 0:
            raise TypeError(f"global_step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}): take another checkpoint.") from error
    return step


def _sha256(path: Path) -> str:
    # A checkpoint of deltas is small: its largest file is the tokenizer.
    return hashlib.sha256(path.read_bytes()).hexdigest()
