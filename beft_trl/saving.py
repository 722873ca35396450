"""What a run writes: adapter, scores, heat map, card, and checkpoints that are complete or removed."""

import copy
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

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
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.bias_scores is not None:
            folder = Path(output_dir or self.args.output_dir)
            if parameters_saved_whole(self.model):
                self._task_config().save_pretrained(folder)
            self.bias_scores.to_json(folder / SCORES_FILE)
            if self.bias_scores.method is not None:
                # Drawn once: every checkpoint takes it along.
                self._heat_map = self._heat_map or report.heat_map(self.bias_scores)
                (folder / report.HEAT_MAP_FILE).write_bytes(self._heat_map)
            self._model_card(folder.name).save(folder / "README.md")

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
                mark_complete(checkpoint, engine_of(self.args), self.args.world_size)
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
