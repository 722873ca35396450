"""What Transformers keeps to itself, and the methods of its trainers and of TRL's that the package overrides."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_utils import set_zero3_state
from transformers.utils import cached_file


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


def forget_input_gradients(model: Any) -> None:
    """Takes the hooks off by which the embeddings' output requires a gradient.

    PEFT, TRL and Transformers each ask for them with gradient checkpointing, and `disable_input_require_grads` knows
    only those of the last (Transformers 5.23). This goes when it takes off all of them.
    """
    model.disable_input_require_grads()
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                del module._forward_hooks[number]


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built within have no weights, under ZeRO-3 either.

    There `from_config` would split and initialise the weights, which ends in "Cannot copy out of meta tensor"
    (Transformers 5.23, `set_zero3_state`). This goes when it leaves weights on the meta device as they are.
    """
    with torch.device("meta"), set_zero3_state():
        yield


def check_attention(model: Any, implementation: str) -> None:
    """Raises what `from_pretrained` raises for an `attn_implementation` that the model cannot have."""
    with without_weights():
        type(model)._from_config(model.config, attn_implementation=implementation)


def as_one_device(args: Any) -> None:
    """Lets settings count the batch of one device, whatever devices there are (Transformers 5.23, `_n_gpu`)."""
    args._n_gpu = 1
