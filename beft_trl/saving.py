"""What a run writes: adapter, scores, heat map, card and checkpoints, each whole or not at all."""

import copy
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from . import report
from .checkpoints import last_complete_checkpoint, mark_complete
from .compat.engines import whole_shape
from .deltas import deltas_as_state_dict
from .engines import engine_of
from .importance import SCORES_FILE, BiasScores
from .tuner import ADAPTER_NAME, Deltas, parameters_saved_whole, projection, task_ending
from .weight_files import let_others_read


def remove(path: Path) -> None:
    """Removes a folder, a file or a link, if there is one."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def whole_or_nothing(folder: Path, pictures: Iterable[str] = ()) -> Iterator[Path]:
    """A folder whose files go into `folder` when all are written, the adapter last: a run that is killed meanwhile
    leaves no adapter without its scores. `pictures` of these names are removed if they are not written anew.
    """
    staged = folder / "_partial"
    remove(staged)  # of a run that was killed here
    staged.mkdir(parents=True)
    try:
        yield staged
        for name in pictures:
            if not (staged / name).is_file():
                remove(folder / name)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == ADAPTER_SAFE_WEIGHTS_NAME):
            target = folder / path.name
            if path.is_dir():
                remove(target)
            if path.name == ADAPTER_SAFE_WEIGHTS_NAME:
                let_others_read(path, like=folder / ADAPTER_CONFIG_NAME)
            path.replace(target)
    finally:
        remove(staged)


@contextmanager
def complete_or_none(trainer: Any, checkpoint: Path, run: dict[str, Any]) -> Iterator[None]:
    """Inside, a trainer writes a checkpoint; after it, that is complete or gone, and only then old ones are deleted.

    Every process enters it. `run` identifies the run, see [`identity.identify_run`].

    Raises:
        OSError: for a checkpoint that could not be written, with the reason and the last one that is complete.
    """
    args = trainer.args
    if args.should_save:
        remove(checkpoint)  # what a run that was killed here left of it
    trainer.accelerator.wait_for_everyone()
    # The Trainer would delete old checkpoints before this one is known to be complete.
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        with deltas_as_state_dict(trainer.model):
            yield
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark_complete(checkpoint, engine_of(args), args.world_size, run)
    except (OSError, RuntimeError, SafetensorError) as error:
        remove(checkpoint)
        last = last_complete_checkpoint(checkpoint.parent)
        raise OSError(
            f"{checkpoint} could not be written ({error}) and was removed. "
            + (f"{last} is complete: free some space and resume from it." if last else "Free some space.")
        ) from error
    finally:
        args.save_total_limit = limit
    if args.should_save:
        rotate_checkpoints(str(checkpoint.parent), limit, trainer.state.best_model_checkpoint, use_mtime=True)
    trainer.accelerator.wait_for_everyone()


def refuse_broken_deltas(state_dict: Mapping[str, Tensor], step: int) -> None:
    """Raises FloatingPointError for what is trained and not finite after optimizer step `step`."""
    if not all(values.isfinite().all() for values in state_dict.values()):
        raise FloatingPointError(
            f"The bias deltas are not finite after step {step}, so they are not saved. Lower learning_rate and resume "
            "from the last checkpoint."
        )


@contextmanager
def default_adapter_only(model: PeftModel) -> Iterator[None]:
    """Leaves the adapter out of `save_pretrained` that TRL calls "ref", its copy for the reference model."""
    save: Any = partial(model.save_pretrained, selected_adapters=[ADAPTER_NAME])
    model.save_pretrained = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained


def write_description(
    folder: Path,
    deltas: Deltas,
    scores: BiasScores,
    learning_rates: Mapping[str, float],
    pictures: Mapping[str, bytes | None],
) -> None:
    """Writes what stands next to an adapter: the scores, the pictures that there are, by the names of their files, and
    the configuration of a task model.
    """
    if parameters_saved_whole(deltas.model):
        _task_config(deltas.model).save_pretrained(folder)
    scores.to_json(folder / SCORES_FILE, learning_rates)
    for name, picture in pictures.items():
        if picture is not None:
            (folder / name).write_bytes(picture)


def draw_scores(deltas: Deltas, scores: BiasScores, learning_rates: Mapping[str, float]) -> bytes:
    """The heat map of a run's scores, with the learning rates of what it trains if they are relative."""
    sites = deltas.sites if learning_rates else []
    return report.heat_map(scores, {site.layer: learning_rates[site.module] for site in sites})


def card_of(deltas: Deltas, scores: BiasScores, learning_rates: Mapping[str, float], **about: Any) -> ModelCard:
    """The model card of a run, see [`report.model_card`], with `about` as its name, dataset and tags."""
    model: Any = deltas.model
    return report.model_card(
        scores,
        *sizes(deltas),
        learning_rates=learning_rates,
        auto_class=f"AutoModel{task_ending(model.get_base_model())}",
        saved_whole=model.peft_config[ADAPTER_NAME].modules_to_save or (),
        plain_peft=not any(isinstance(projection(model, site.module), Conv1D) for site in deltas.sites),
        **about,
    )


def sizes(deltas: Deltas) -> tuple[int, int]:
    """Trained parameters, without the zero part of fused layers' deltas, and all parameters."""
    whole = parameters_saved_whole(deltas.model).values()
    trained = sum(len(site.rows) for site in deltas.sites) + sum(math.prod(whole_shape(each)) for each in whole)
    return trained, deltas.model.get_nb_trainable_parameters()[1]


def _task_config(model: Any) -> Any:
    """The configuration of the task model, whose labels the base model's own does not have."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model.get_base_model()).__name__]
    if hasattr(config, "quantization_config"):  # of this run's base: the adapter serves in any precision
        del config.quantization_config
    return config
