"""From what a run goes on: a checkpoint, and all that speaks against it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .checkpoints import STATE_FILE, damage, last_complete_checkpoint, manifest_of, refuse_foreign_output, short
from .deltas import adapter_shapes
from .identity import FIXED, differences
from .importance import SCORES_FILE, BiasScores, recorded_learning_rates
from .spans import ranges
from .tuner import Deltas


class Resumed(NamedTuple):
    """What a run goes on from: the checkpoint, its selection and learning rates, and its optimizer steps."""

    checkpoint: str
    scores: BiasScores
    learning_rates: dict[str, float]
    steps: int


def find_checkpoint(
    asked: str | bool | None,
    args: Any,
    deltas: Deltas,
    layers: Iterable[int],
    run: dict[str, Any],
    engine: str,
    processes: int,
    trained: str | None = None,
) -> Resumed | None:
    """The checkpoint that a run goes on from, or `None` for one that starts, after all that speaks against it.

    Args:
        asked: `resume_from_checkpoint`.
        args: with the settings of [`BeftConfigMixin`].
        deltas: of the run's model.
        layers: numbers of the layers whose bias the run may train.
        run: what identifies the run, see [`identity.identify_run`].
        engine: its name in `engines.ENGINES`.
        processes: number of the run's processes.
        trained: the term that the trainer has trained already.

    Raises:
        ValueError: for an output folder or a checkpoint of a different run, or another user's ZeRO checkpoint.
    """
    checkpoint = checkpoint_to_resume(args.output_dir, asked)
    if checkpoint is None:
        if trained is None:
            base: Any = deltas.model.get_base_model()
            refuse_foreign_output(args.output_dir, base.name_or_path, args.bias_term)
        return None
    refuse_other_run(checkpoint, engine, processes, run, args.allow_changed_resume)
    if engine.startswith("zero"):
        refuse_foreign_pickles(checkpoint, args.trust_checkpoint)
    scores, rates = recorded_selection(checkpoint, trained or args.bias_term, layers, args.relative_learning_rate)
    refuse_other_tensors(checkpoint, adapter_shapes(deltas.model, scores.trained_sites(deltas.candidates)))
    return Resumed(checkpoint, scores, rates, steps_of(checkpoint))


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
    checkpoint: str | Path, bias_term: str, layers: Iterable[int], relative_learning_rate: float | None
) -> tuple[BiasScores, dict[str, float]]:
    """The scores of a checkpoint, and with them the selection, and the learning rates.

    Raises:
        ValueError: if it trains another term than `bias_term` or was given other layers than `layers`, or one of the
            two runs has relative learning rates and the other has none.
    """
    file = Path(checkpoint) / SCORES_FILE
    scores, rates = BiasScores.from_json(file), recorded_learning_rates(file)
    if bias_term not in ("auto", scores.selected):
        raise ValueError(
            f"{checkpoint} trains the {scores.selected} bias, and this run asks for bias_term={bias_term!r}. Resume "
            "with bias_term='auto' or the recorded one, or start anew in another output_dir."
        )
    if scores.layers and scores.layers != sorted(set(layers)):
        there = ranges(scores.layers)
        raise ValueError(
            f"{checkpoint} is of a run with the layers {there}, and bias_layers asks for {ranges(layers)}. Resume "
            f"with bias_layers={there!r}, or start anew in another output_dir."
        )
    if bool(rates) != (relative_learning_rate is not None):
        raise ValueError(
            f"{checkpoint} was trained {'with' if rates else 'without'} relative_learning_rate, and this run asks for "
            f"relative_learning_rate={relative_learning_rate}. Resume as it was written, or start anew in another "
            "output_dir."
        )
    return scores, rates


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
    manifest = manifest_of(checkpoint)
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
    told = "; ".join(f"{name}={short(there)} there, {short(here)} here" for name, (there, here) in changed.items())
    if fixed:
        remedy = "Biases trained on another base mean nothing on this one: give that base, or another output_dir."
    else:
        remedy = "Resume with its settings, start anew in another output_dir, or set allow_changed_resume=True."
    of_this_run = _newest_of(Path(checkpoint).parent, engine, processes, run)
    if of_this_run is not None:
        remedy += f" {of_this_run} is the newest of this run."
    raise ValueError(f"{checkpoint} is of another run: {told}. {remedy}")


def _newest_of(folder: Path, engine: str, processes: int, run: dict[str, Any]) -> str | None:
    for checkpoint in reversed(sort_checkpoints(str(folder)) if folder.is_dir() else []):
        if damage(checkpoint) is None:
            manifest = manifest_of(checkpoint)
            written = (manifest["engine"], manifest["processes"])
            if written == (engine, processes) and "run" in manifest and not differences(manifest["run"], run):
                return checkpoint
    return None


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
        kind = json.loads((Path(checkpoint) / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))["peft_type"]
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
