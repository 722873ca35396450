"""Many adapters over one base: loaded, swapped, summed, and another one for each row of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .compat.adapters import BeftLayer, BeftModel, beft_tuner, switched_off


BASE = "__base__"  # PEFT's name for no adapter


class MixingBeftModel(BeftModel):
    """PEFT's BEFT model with `adapter_names` for mixed batches, as its LoRA has them, and `add_weighted_adapter`.

    PEFT (0.21) ignores `adapter_names` for BEFT without a word. This goes when it takes them.
    """

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        layers = [module for module in self.modules() if isinstance(module, BeftLayer)]
        _check_names(self, layers, names)
        beams = kwargs.get("num_beams") or 1
        rows = [name for name in names for _ in range(beams)]
        hooks = []
        with switched_off(layers):
            try:
                for layer in layers:
                    hooks.append(layer.register_forward_hook(_adding(layer, rows)))
                for module in self.modules():  # heads, and others that were trained whole
                    if isinstance(module, ModulesToSaveWrapper):
                        hooks.append(module.register_forward_pre_hook(_naming(rows), with_kwargs=True))
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter whose biases are a weighted sum of others: a mean of runs costs what one of them does.

        Args:
            adapters (`Sequence[str]`): names of loaded adapters.
            weights (`Sequence[float]`): one for each.
            adapter_name (`str`): of the new one.

        Raises:
            ValueError: for names that are not there, a name that is taken, another number of weights, or adapters
                that hold modules that were trained whole, such as a head.
        """
        unknown = sorted(set(adapters) - self.peft_config.keys())
        if unknown or not adapters:
            raise ValueError(f"There is no adapter {', '.join(unknown) or 'given'}: give some of {_listed(self)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: give another name.")
        if len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: give one for each.")
        configs: dict[str, Any] = self.peft_config
        whole = next((each for each in adapters if configs[each].modules_to_save), None)
        if whole is not None:
            raise ValueError(
                f"The adapter {whole!r} holds modules that were trained whole, such as a head, and only biases are "
                "summed. Give adapters of biases only."
            )
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, BeftLayer) and any(each in module.beft_bias for each in adapters)
        }
        configs[adapter_name] = replace(configs[adapters[0]], target_modules=sorted(layers))
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            parts = [
                weight * layer.beft_bias[each].data
                for each, weight in zip(adapters, weights, strict=True)
                if each in layer.beft_bias
            ]
            # Not copied into what PEFT made, which has the dtype of the base.
            layer.beft_bias[adapter_name].data = torch.stack(parts).sum(0)


def add_adapter(model: PeftModel, folder: str, adapter_name: str) -> None:
    """Loads another adapter, in the time that its own tensors take: the thousandth costs what the second does.

    PEFT's `load_adapter`, to which it falls back, goes over the adapters that are there.

    Args:
        model (`PeftModel`): with a BEFT adapter.
        folder (`str`): of the new one, or its name on the hub.
        adapter_name (`str`): of the new one.

    Raises:
        ValueError: for a name that is taken, or an adapter of another kind.
    """
    if adapter_name in model.peft_config:
        raise ValueError(f"There is an adapter {adapter_name!r} already: give another name, or use swap_adapter.")
    config, biases = _read(folder)
    layers = _layers(model)
    if any(name not in layers or len(layers[name].beft_bias) == 0 for name in biases):
        with beft_tuner():
            model.load_adapter(folder, adapter_name)
        return
    config.inference_mode = True
    model.peft_config[adapter_name] = config
    for name, values in biases.items():
        like = next(iter(layers[name].beft_bias.values()))
        layers[name].beft_bias[adapter_name] = nn.Parameter(values.to(like), requires_grad=False)


def swap_adapter(model: PeftModel, folder: str, adapter_name: str = "default") -> None:
    """Puts the biases of another adapter into one that is loaded, in place: no module is made anew.

    Args:
        model (`PeftModel`): with a BEFT adapter.
        folder (`str`): of the other one, or its name on the hub.
        adapter_name (`str`, *optional*, defaults to `"default"`): of the one that is replaced.

    Raises:
        ValueError: if the other has biases at other modules, or the one to replace is merged into the base or holds
            modules that were trained whole, such as a head. The model is then as it was.
    """
    _, biases = _read(folder)
    configs: dict[str, Any] = model.peft_config
    if adapter_name in configs and configs[adapter_name].modules_to_save:
        raise ValueError(
            f"The adapter {adapter_name!r} holds modules that were trained whole, such as a head, which would stay: "
            "load the other as another adapter, with add_adapter."
        )
    held = {
        name: layer.beft_bias[adapter_name]
        for name, layer in _layers(model).items()
        if adapter_name in layer.beft_bias
    }
    other = sorted(biases.keys() ^ held.keys())
    other += sorted(name for name in biases.keys() & held.keys() if biases[name].shape != held[name].shape)
    if other:
        raise ValueError(
            f"{folder} and the adapter {adapter_name!r} have biases at other modules ({other[0]} first): load it as "
            "another adapter, with add_adapter."
        )
    if any(adapter_name in layer.merged_adapters for layer in _layers(model).values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into the base, which would keep its biases: call unmerge_adapter "
            "before replacing them."
        )
    with torch.no_grad():
        for name, parameter in held.items():
            parameter.copy_(biases[name])


def _read(folder: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration of an adapter, and its biases by the path of their module."""
    config = PeftConfig.from_pretrained(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "BEFT":
        raise ValueError(f"{folder} is a {kind} adapter: give a BEFT adapter.")
    weights = load_peft_weights(folder, "cpu")
    return config, {name.removesuffix(".beft_bias"): values for name, values in weights.items()}


def _layers(model: PeftModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BeftLayer)}


def _adding(layer: Any, names: Sequence[str]) -> Any:
    """A hook that adds to each row of a batch the bias of its own adapter, a gather and an addition."""
    known = [name for name in dict.fromkeys(names) if name in layer.beft_bias]
    size = layer.out_features
    like: Tensor = next(iter(layer.beft_bias.values()))
    table = torch.cat([like.new_zeros(1, size), *(layer.beft_bias[name].detach() for name in known)])
    place = {name: number for number, name in enumerate(known, 1)}
    index = torch.tensor([place.get(name, 0) for name in names], device=table.device)
    biases = table[index].unsqueeze(1)

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if len(output) != len(names):
            raise ValueError(f"{len(names)} adapter_names for a batch of {len(output)} rows: give one for each row.")
        return (output + biases).to(output.dtype)

    return add


def _naming(names: Sequence[str]) -> Any:
    """A hook for a module that was trained whole: each row gets the output of its adapter's copy."""
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})


def _check_names(model: Any, layers: Sequence[Any], names: Any) -> None:
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"adapter_names={names!r} is no list: give a name for each row of the batch.")
    if model.training:
        raise ValueError("adapter_names are for inference, and the model is in training mode: model.eval().")
    if any(layer.merged for layer in layers):
        raise ValueError("An adapter is merged into the base: call unmerge_adapter before mixing others.")
    unknown = sorted({*names} - {BASE} - model.peft_config.keys())
    if unknown:
        raise ValueError(f"There is no adapter {', '.join(unknown)}: give some of {_listed(model)}, or {BASE!r}.")


def _listed(model: Any) -> str:
    return ", ".join(model.peft_config)
