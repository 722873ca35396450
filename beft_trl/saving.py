"""What a run writes: adapter, scores, heat map, card, and checkpoints that are complete or removed."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from . import report
from .checkpoints import last_complete_checkpoint, mark_complete
from .deltas import adapter_state_dict, deltas_as_state_dict
from .engines import engine_of
from .importance import SCORES_FILE, BiasScores
from .layout import BiasSite
from .tuner import ADAPTER_NAME, parameters_saved_whole, projection, task_ending


class SavingMixin:
    """The part of [`BeftTrainerMixin`] that writes the output folder."""

    bias_scores: BiasScores | None
    _sites: list[BiasSite]
    _identity: dict[str, Any]
    _heat_map: bytes | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter with its scores, heat map and model card. Every process calls it."""
        if self.bias_scores is None:
            raise RuntimeError("There is no bias to save yet: call train() first, it selects the one to train.")
        # The Trainer would gather the frozen base from the engine too, and the deltas in the engine's 16 bits.
        self._save(output_dir or self.args.output_dir, state_dict=adapter_state_dict(self.model, self._sites))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not all(values.isfinite().all() for values in (state_dict or {}).values()):
            raise FloatingPointError(
                f"The bias deltas are not finite after step {self.state.global_step}, so they are not saved. Lower "
                "learning_rate and resume from the last checkpoint."
            )
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        with _whole_or_nothing(folder) as staged, _default_adapter_only(self.model):
            super()._save(str(staged), state_dict)
            if self.bias_scores is None:
                return
            if parameters_saved_whole(self.model):
                self._task_config().save_pretrained(staged)
            self.bias_scores.to_json(staged / SCORES_FILE)
            if self.bias_scores.method is not None:
                # Drawn once: every checkpoint takes it along.
                self._heat_map = self._heat_map or report.heat_map(self.bias_scores)
                (staged / report.HEAT_MAP_FILE).write_bytes(self._heat_map)
            self._model_card(folder.name).save(staged / "README.md")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a run that was killed here left of it
        self.accelerator.wait_for_everyone()
        # The Trainer would delete old checkpoints before this one is known to be complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with deltas_as_state_dict(self.model):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint, engine_of(self.args), self.args.world_size, self._identity)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            last = last_complete_checkpoint(checkpoint.parent)
            raise OSError(
                f"{checkpoint} could not be written ({error}) and was removed. "
                + (f"{last} is complete: free some space and resume from it." if last else "Free some space.")
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(str(checkpoint.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the model card to `args.output_dir`, see [`report.model_card`]."""
        if self.is_world_process_zero() and self.bias_scores is not None:
            tags = [tags] if isinstance(tags, str) else tags
            self._model_card(model_name, dataset_name, tags).save(Path(self.args.output_dir) / "README.md")

    def _task_config(self) -> PreTrainedConfig:
        """The configuration of the task model, whose labels the base model's own does not have."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model.get_base_model()).__name__]
        if hasattr(config, "quantization_config"):  # of this run's base: the adapter serves in any precision
            del config.quantization_config
        return config

    def _model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None):
        assert self.bias_scores is not None
        return report.model_card(
            self.bias_scores,
            *self._sizes(),
            model_name=model_name,
            dataset_name=dataset_name,
            tags=[*getattr(self, "_tag_names", []), *(tags or [])],
            auto_class=f"AutoModel{task_ending(self.model.get_base_model())}",
            saved_whole=self.model.peft_config[ADAPTER_NAME].modules_to_save or (),
            plain_peft=not any(isinstance(projection(self.model, site.module), Conv1D) for site in self._sites),
        )

    def _sizes(self) -> tuple[int, int]:
        """Trained parameters, without the zero part of fused layers' deltas, and all parameters."""
        # Under ZeRO-3 a parameter is empty between its uses.
        whole = [values.numel() or values.ds_numel for values in parameters_saved_whole(self.model).values()]
        return sum(len(site.rows) for site in self._sites) + sum(whole), self.model.get_nb_trainable_parameters()[1]


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder whose files go into `folder` when all are written, the adapter last: a run that is killed meanwhile
    leaves no adapter without its scores.
    """
    staged = folder / "_partial"
    shutil.rmtree(staged, ignore_errors=True)  # of a run that was killed here
    staged.mkdir(parents=True)
    try:
        yield staged
        for path in sorted(staged.iterdir(), key=lambda path: path.name == ADAPTER_SAFE_WEIGHTS_NAME):
            target = folder / path.name
            if path.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            path.replace(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _default_adapter_only(model: PeftModel) -> Iterator[None]:
    """Leaves the adapter out of `save_pretrained` that TRL calls "ref", its copy for the reference model."""
    save: Any = partial(model.save_pretrained, selected_adapters=[ADAPTER_NAME])
    model.save_pretrained = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained
