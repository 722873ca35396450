"""The Axolotl plugin: `plugins: [beft_trl.axolotl.BeftPlugin]` and `adapter: beft` in an Axolotl YAML."""

import atexit
import difflib
import os
import time
from typing import Any, Literal

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from pydantic import BaseModel, Field, create_model, model_validator
from torch import nn
from transformers import PreTrainedModel


try:
    from axolotl.integrations.base import AdapterCapabilities, BasePlugin
    from axolotl.loaders.model import ModelLoader
    from axolotl.utils import environment
except ImportError as error:
    raise ImportError(
        f"beft_trl.axolotl needs Axolotl 0.19 or later, which knows adapters of plugins ({error}). Install it with "
        "pip install axolotl, in an environment of its own."
    ) from error

from .arguments import give_enough_steps
from .compat.engines import is_split
from .config import CHOICES, SETTINGS, BeftConfigMixin, check_values
from .deltas import gather_deltas
from .engines import NO_FSDP
from .layout import find_bias_sites, sites_of_term
from .mixin import BeftTrainerMixin
from .spans import sites_in, spec_of
from .tuner import attach_deltas, beft_config, delta, load_adapter


# What excludes `adapter: beft`, with the reason and the remedy.
CONFLICTS = {
    "unfrozen_parameters": "it would train parts of the frozen base, and freeze the biases. Leave it out.",
    "rl": "Axolotl (0.21) makes these trainers of a plugin without a model, and without the plugin's settings. Use "
    "BeftDPOTrainer, BeftKTOTrainer or BeftGRPOTrainer of beft_trl in a script.",
    "fsdp": NO_FSDP,
    "fsdp_config": NO_FSDP,
    "relora": "it restarts LoRA matrices, and there are none.",
    "reward_model": "a reward head is trained next to the biases, and would not be saved.",
    "process_reward_model": "a reward head is trained next to the biases, and would not be saved.",
    "gptq": "a GPTQ base has not been shown to work. Use load_in_8bit or load_in_4bit.",
    "qat": "it replaces the layers that hold the biases.",
}


class _CheckedArgs(BaseModel):
    """What Axolotl's schema is given of the plugin's keys, which `BeftArgs` adds."""

    @model_validator(mode="before")
    @classmethod
    def check_beft(cls, data: Any) -> Any:
        """Refuses unknown `beft_` keys, and settings that exclude the adapter, which Axolotl would take in silence."""
        keys = [key for key in data if key.startswith("beft_")]
        known = list(FIELD_OF)
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"{key} is no setting" + (f": did you mean {near[0]}?" if near else "."))
        if data.get("adapter") != "beft":
            if any(data[key] is not None for key in keys):
                raise ValueError(f"{keys[0]} has no effect without adapter: beft. Set it, or leave the key out.")
            return data
        try:
            check_values({field: data[key] for key, field in FIELD_OF.items() if data.get(key) is not None})
        except ValueError as error:
            raise ValueError(f"beft_{error}") from None  # which begins with the field
        for key, reason in CONFLICTS.items():
            if data.get(key):
                raise ValueError(f"{key} and adapter: beft exclude each other: {reason}")
        return data


FIELD_OF = {f"beft_{name}": name for name in SETTINGS}  # the plugin's keys, and the fields of a configuration


def _fields() -> dict[str, Any]:
    kinds: dict[str, Any] = {name: each.type for name, each in SETTINGS.items()}
    kinds["bias_layers"] = str | int | list[int | str]
    kinds |= {name: Literal[tuple(choices)] for name, choices in CHOICES.items()}
    about = {name: {"description": each.metadata["help"]} for name, each in SETTINGS.items()}
    return {
        key: (kinds[name] | None, Field(default=None, json_schema_extra=about[name])) for key, name in FIELD_OF.items()
    }


BeftArgs = create_model("BeftArgs", __base__=_CheckedArgs, __doc__="The plugin's keys.", **_fields())


class BeftPlugin(BasePlugin):
    """Trains through Axolotl's own trainer, collators and packing, by the mixin that TRL's trainer has, too."""

    def register(self, cfg: dict) -> None:
        # As it was written: Axolotl fills in one epoch later.
        self.length_given = cfg.get("num_epochs") is not None or cfg.get("max_steps") is not None
        _load_for_beft()
        if cfg.get("adapter") == "beft":
            _join_processes_on_a_cpu(bool(cfg.get("deepspeed")))

    def get_input_args(self) -> str:
        return "beft_trl.axolotl.BeftArgs"

    def get_training_args_mixin(self) -> str:
        return "beft_trl.config.BeftConfigMixin"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        if cfg.adapter != "beft":
            return None
        settings = {field: cfg[key] for key, field in FIELD_OF.items() if cfg[key] is not None}
        if not self.length_given:
            settings |= {"num_train_epochs": None, "max_steps": -1}  # Axolotl counts those of one epoch
        # Axolotl does not say that there is no accelerator, and Transformers refuses bf16 without being told.
        return settings if torch.accelerator.is_available() else {**settings, "use_cpu": True}

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="beft")]

    def post_model_build(self, cfg: Any, model: PreTrainedModel) -> None:
        if cfg.adapter == "beft" and (cfg.load_in_8bit or cfg.load_in_4bit):
            _check_quantised(model, 8 if cfg.load_in_8bit else 4)

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter != "beft":
            return None
        sites = sites_in(find_bias_sites(model), spec_of(cfg.beft_bias_layers or BeftConfigMixin.bias_layers))
        term = cfg.beft_bias_term or "auto"
        candidates = sites if term == "auto" else sites_of_term(sites, term)
        if config_only:
            return None, beft_config(candidates)
        if cfg.lora_model_dir:
            adapted = load_adapter(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            adapted = attach_deltas(model, candidates)
        return adapted, adapted.peft_config["default"]

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if cfg.adapter != "beft":
            return None
        from axolotl.core.trainers import AxolotlTrainer

        class BeftAxolotlTrainer(BeftTrainerMixin, AxolotlTrainer):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                give_enough_steps(self)

            def create_accelerator_and_postprocess(self) -> None:
                if _launched_on_a_cpu():
                    # Axolotl would make it anew, without gloo.
                    self.args.accelerator_config.use_configured_state = True
                super().create_accelerator_and_postprocess()

            def train(self, *args: Any, **kwargs: Any) -> Any:
                output = super().train(*args, **kwargs)
                # With scores, heat map and card; Axolotl then saves the adapter once more, from the model itself,
                # where DeepSpeed may hold 16-bit copies of the biases.
                self.save_model(self.args.output_dir)
                if not any(is_split(parameter) for parameter in self.model.parameters()):
                    _keep_fp32(self.model, self.trained_sites)
                return output

        return BeftAxolotlTrainer


def _load_for_beft() -> None:
    """Lets Axolotl's loader do for `adapter: beft` what it does for `lora` and `qlora`, and do it on a CPU, too.

    It builds the bitsandbytes configuration only for these two names and loads in full precision otherwise
    (axolotl/loaders/model.py, `_set_quantization_config`); and under a launcher it puts the model on the accelerator
    of its rank, also if there is none. Seen in Axolotl 0.19 and 0.21. This goes when it asks for a capability and for
    the device instead.
    """
    if hasattr(ModelLoader, "_knows_beft"):
        return
    original = ModelLoader._set_quantization_config

    def set_quantization_config(self: Any) -> None:
        if self.cfg.adapter != "beft":
            return original(self)
        if self.model_kwargs.get("device_map") and not torch.accelerator.is_available():
            self.model_kwargs["device_map"] = {"": "cpu"}
        self.cfg.adapter = "qlora" if self.cfg.load_in_4bit else "lora"
        try:
            return original(self)
        finally:
            self.cfg.adapter = "beft"

    ModelLoader._set_quantization_config = set_quantization_config
    ModelLoader._knows_beft = True


def _join_processes_on_a_cpu(deepspeed: bool) -> None:
    """Makes accelerate's state before Axolotl does, which would know neither gloo nor DeepSpeed."""
    if not _launched_on_a_cpu():
        return
    _ask_cuda_about_no_peer()
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=not deepspeed, backend="gloo")
    # Time for gloo's threads to let go of the last tensors before the interpreter shuts down, see `run.leave`.
    atexit.register(time.sleep, 0.5)


def _ask_cuda_about_no_peer() -> None:
    """Answers for Axolotl whether two devices reach each other, where there is none.

    It asks CUDA, and expects only the error of a torch that is built without it. One that is built for CUDA raises
    another on a machine without a driver, "Found no NVIDIA driver", which ends the run. Seen in Axolotl 0.19 and 0.21
    with torch 2.13 (axolotl/utils/environment.py, `check_cuda_p2p_support`). This goes when it asks only where a
    GPU is.
    """
    environment.check_cuda_p2p_support = lambda: True


def _launched_on_a_cpu() -> bool:
    return int(os.environ.get("LOCAL_RANK", -1)) >= 0 and not torch.accelerator.is_available()


def _check_quantised(model: nn.Module, bits: int) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear8bitLt if bits == 8 else Linear4bit
    bare = [site.module for site in find_bias_sites(model) if not isinstance(model.get_submodule(site.module), kind)]
    if bare:
        raise RuntimeError(
            f"load_in_{bits}bit was asked for, and {bare[0]} is a {type(model.get_submodule(bare[0])).__name__}: the "
            "base would be trained against unquantised. Leave load_in_8bit and load_in_4bit out, or report this."
        )


def _keep_fp32(model: PeftModel, sites: Any) -> None:
    for site, values in gather_deltas(model, sites).items():
        parameter = delta(model, site)
        whole = parameter.data.float()
        whole[0, site.rows.to(whole.device)] = values.to(whole.device)
        parameter.data = whole
