"""Private and undocumented symbols of other packages, and nothing else: each with the version it was seen in, and when
it goes. The methods of their trainers that the package overrides are named in `OVERRIDDEN`.

tests/test_compat.py has a test for each, which fails by its name if a release renames it. Axolotl's are in
`axolotl.py`, the only module that imports it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints
from transformers.utils import cached_file


try:
    from peft import BeftConfig
    from peft.tuners.beft import BeftLayer, BeftModel, Linear
except ImportError as error:
    raise ImportError(
        f"beft_trl needs PEFT 0.20 or later, which has a BEFT tuner, and PEFT {version('peft')} is installed: pip "
        "install --upgrade peft."
    ) from error


__all__ = [
    "BeftConfig",
    "BeftLayer",
    "DataDependentOutputException",
    "FakeTensorMode",
    "TorchDispatchMode",
    "WeakIdKeyDictionary",
    "rotate_checkpoints",
    "sort_checkpoints",
    "tree_leaves",
]

# Methods of upstream trainers that the package overrides, or calls although they are private. Transformers 5.23, TRL
# 1.16.
OVERRIDDEN = {
    "Trainer": (
        "_get_output_dir",
        "_move_model_to_device",
        "_save",
        "_save_checkpoint",
        "_set_signature_columns_if_needed",
        "get_decay_parameter_names",
        "set_initial_training_values",
    ),
    "SFTTrainer": ("_prepare_dataset",),
}


# accelerate


def forget_preparation(model: nn.Module, accelerator: Accelerator) -> None:
    """Takes off what `accelerator.prepare` put around the forward pass, and its mark that it was there.

    With the mark and without the autocast wrapper, accelerate would leave the model as it is in the next run, which
    then computes in fp32; and after an evaluation it would leave out DDP. Seen in accelerate 1.15. This goes when its
    `unwrap_model` takes the mark off too.
    """
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)


# DeepSpeed

# How a parameter finds its fp32 copy in the engine: under ZeRO-1 and 2, and under ZeRO-3. DeepSpeed 0.19.
_MASTER_LINKS = ("_hp_mapping", "_z3_optimizer")


def is_split(parameter: Any) -> bool:
    """Whether ZeRO-3 has split a parameter, which is then empty between its uses (DeepSpeed 0.19, `ds_id`)."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, of the whole one if ZeRO-3 has split it (DeepSpeed 0.19, `ds_shape`)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def has_fp32_copy(parameter: Any) -> bool:
    """Whether a DeepSpeed engine holds an fp32 copy of a parameter.

    Raises:
        RuntimeError: if the parameter is in 16 bits, which only an engine does to a delta, and no copy is found.
    """
    held = any(hasattr(parameter, link) for link in _MASTER_LINKS)
    if not held and parameter.dtype.itemsize < torch.float32.itemsize:
        raise RuntimeError(
            f"A trained parameter is in {parameter.dtype}, and no fp32 copy of it was found: this version of "
            "DeepSpeed keeps them elsewhere, and what would be saved is rounded. Use DeepSpeed 0.19."
        )
    return held


def forget_engine(model: nn.Module) -> None:
    """Takes the links to a destroyed DeepSpeed engine off the parameters: its fp32 copies are stale, or freed."""
    for parameter in model.parameters():
        for link in _MASTER_LINKS:
            if hasattr(parameter, link):
                delattr(parameter, link)


# bitsandbytes


def keep_4bit_trainable(model: nn.Module) -> None:
    """Keeps the weights of bitsandbytes' 4-bit layers in the layout that gradients can pass.

    On a CPU with AVX512-BF16, `Linear4bit` packs its weights for inference at its first forward in eval mode, and a
    training step after an evaluation fails on them. Seen in bitsandbytes 0.50. This goes when it can train on packed
    weights.

    Raises:
        ValueError: if weights are packed already. bitsandbytes unpacks them to other values.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of this model ({name} first) were packed for inference when it answered in "
                    "eval mode on this CPU, and cannot be trained on any more. Load the model again and make the "
                    "trainer before anything is evaluated."
                )


# PEFT


class Conv1DWithDelta(Linear):
    """PEFT's BEFT layer around GPT-2's `Conv1D`, a linear layer whose weight is stored transposed."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BeftConfig):
        # PEFT's own initialisers take only `nn.Linear`; this is what they do to one (PEFT 0.21).
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.beft_bias = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        layer: Any = self.get_base_layer()
        self.in_features, self.out_features = layer.nx, layer.nf
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)


@contextmanager
def beft_tuner() -> Iterator[None]:
    """PEFT's BEFT tuner with `Conv1D` layers, and without its warning for every layer without a bias.

    The warning says that the layer cannot be merged, which `merge_adapter` does. The part on `Conv1D` goes when PEFT's
    `BeftModel._create_new_module` takes it (PEFT 0.21).
    """
    create = BeftModel._create_new_module

    def create_on_conv1d_too(config: BeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(layer, Conv1D):
            return Conv1DWithDelta(target, adapter_name, config)
        return create(config, adapter_name, target, **kwargs)

    BeftModel._create_new_module = staticmethod(create_on_conv1d_too)  # type: ignore[method-assign,assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected that the base layer has no bias term")
            yield
    finally:
        BeftModel._create_new_module = staticmethod(create)  # type: ignore[method-assign]


def set_targets(model: Any, adapter_name: str, modules: list[str]) -> None:
    """Says which modules an adapter is in. Lists: PEFT (0.21) would write a set to the adapter's file in any order."""
    model.base_model.targeted_module_names = modules
    model.peft_config[adapter_name].target_modules = modules


# TRL

REFERENCE_NAME = "ref"  # TRL's name for a frozen copy of the adapter
METRICS = ("_metrics", "_logs")  # how the names of the containers end that TRL's trainers fill in place


def copy_to_reference(model: nn.Module, adapter_name: str) -> None:
    """Gives TRL's reference adapter the deltas of the one that is trained, in place.

    TRL (1.16) copies parameters with `.default.` in their names, and the name of a delta ends with `.default`: the
    reference would be the plain base. This goes when it copies by adapter.
    """
    for module in model.modules():
        if isinstance(module, BeftLayer) and REFERENCE_NAME in module.beft_bias:
            module.beft_bias[REFERENCE_NAME].data.copy_(module.beft_bias[adapter_name].data)


# Transformers

# Arguments of `from_pretrained` that are no fields of the configuration, though it would take them.
LOADING_ONLY = ("quantization_config", "device_map", "attn_implementation", "dtype")
# Those that `PreTrainedModel.from_pretrained` takes without naming them in its signature (Transformers 5.23).
LOADING = (
    *LOADING_ONLY, "adapter_kwargs", "adapter_name", "allow_all_kernels", "device_mesh", "distributed_config",
    "experts_implementation", "from_flax", "from_tf", "generation_config", "gguf_file", "kernel_config", "key_mapping",
    "low_cpu_mem_usage", "max_memory", "mirror", "offload_buffers", "offload_folder", "offload_state_dict",
    "output_loading_info", "proxies", "state_dict", "subfolder", "torch_dtype", "tp_plan", "tp_size", "tqdm_class",
    "trust_remote_code", "use_kernels", "variant",
)  # fmt: skip


def local_file(name: str, file: str, revision: str | None) -> str | None:
    """The path of a file of a model, in its folder or in the hub's cache; `None` if it is not on this machine."""
    where: Any = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    return cached_file(name, file, **where)


def revision_of(config: Any) -> str | None:
    """The commit of the hub that a configuration was loaded from (Transformers 5.23, `_commit_hash`)."""
    return getattr(config, "_commit_hash", None)


def learnt_columns(trainer: Any) -> list[str]:
    """The columns of its rows that a trainer gives to the model (Transformers 5.23, `_signature_columns`)."""
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns


def check_attention(model: Any, implementation: str) -> None:
    """Raises what `from_pretrained` raises for an `attn_implementation` that the model cannot have."""
    with torch.device("meta"):
        type(model)._from_config(model.config, attn_implementation=implementation)


def as_one_device(args: Any) -> None:
    """Lets settings count the batch of one device, whatever devices there are (Transformers 5.23, `_n_gpu`)."""
    args._n_gpu = 1
