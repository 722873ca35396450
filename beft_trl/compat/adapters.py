"""What PEFT and TRL keep to themselves."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


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
    "BeftModel",
    "Conv1DWithDelta",
    "beft_tuner",
    "reference_copied",
    "set_targets",
    "switched_off",
]

REFERENCE_NAME = "ref"  # TRL's name for a frozen copy of the adapter
METRICS = ("_metrics", "_logs")  # how the names of the containers end that TRL's trainers fill in place


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


@contextmanager
def switched_off(layers: Iterable[Any]) -> Iterator[None]:
    """Inside, BEFT layers give what their base layers give (PEFT 0.21, `_disable_adapters`)."""
    layers = list(layers)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def set_targets(model: Any, adapter_name: str, modules: list[str]) -> None:
    """Says which modules an adapter is in. Lists: PEFT (0.21) would write a set to the adapter's file in any order."""
    model.base_model.targeted_module_names = modules
    model.peft_config[adapter_name].target_modules = modules


@contextmanager
def reference_copied(model: Any, adapter_name: str) -> Iterator[None]:
    """Inside, a reference adapter that TRL adds to `model` has the deltas of the one that is trained.

    TRL (1.16) copies parameters with `.default.` in their names, and the name of a delta ends with `.default`: the
    reference would be the plain base. It is copied as it is added, since `precompute_ref_log_probs=True` uses it
    before the trainer is made. This goes when TRL copies by adapter.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    add_adapter = model.add_adapter

    def add_copied(name: str, *args: Any, **kwargs: Any) -> None:
        add_adapter(name, *args, **kwargs)
        for module in model.modules():
            if name == REFERENCE_NAME and isinstance(module, BeftLayer) and name in module.beft_bias:
                module.beft_bias[name].data.copy_(module.beft_bias[adapter_name].data)

    model.add_adapter = add_copied  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model.add_adapter
