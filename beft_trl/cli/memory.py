"""How much memory a training step takes, found by running it on tensors without data."""

import weakref
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from ..compat.tracing import (
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    WeakIdKeyDictionary,
    tree_leaves,
)
from ..data.labels import IGNORED
from ..engines import SPLIT_AT_LOADING


# What a process holds next to tensors: interpreter and libraries, and on a GPU the context and the workspaces of its
# libraries. Measured as the resident memory of an idle trainer, and read off `nvidia-smi`, in round figures.
RUNTIME = {"cpu": 800 * 2**20, "cuda": 700 * 2**20}
# The most parameters that DeepSpeed's ZeRO-3 keeps gathered, `stage3_max_live_parameters`.
ZERO3_LIVE = 10**9
BLOCK_4BIT, NESTED_BLOCK_4BIT = 64, 256  # weights per scale, and scales per second scale, in bitsandbytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a scoring step, which trains more biases than any other.

    Attributes:
        runtime: interpreter, libraries and, on a GPU, its context.
        weights: of the frozen base, by dtype and quantisation, this device's share of them under ZeRO-3.
        gathered: what ZeRO-3 gathers of them at a time.
        deltas: the trained biases and their gradients, fp32.
        optimizer: its two moments of every bias, and the fp32 copy of the biases that DeepSpeed makes.
        activations: what a step allocates beyond the rest, for this batch, length and checkpointing, without the loss.
        logits: what the loss adds to the peak.
    """

    runtime: int
    weights: int
    gathered: int
    deltas: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


def estimate_memory(
    trainer: Any,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    engine: str,
    processes: int,
    quantization: Any = None,
) -> MemoryEstimate:
    """Estimates the memory of one device by a step of the trainer's own loss, on tensors that have only shapes.

    Args:
        trainer: with its model on the meta device, in the dtype of its weights, and a delta at each site. The model is
            left with tensors of no more use.
        batch: the largest batch of the run.
        device: that the run is on.
        engine: name in `engines.ENGINES`.
        processes: number of processes.
        quantization: a `BitsAndBytesConfig`, or `None`.
    """
    model, args = trainer.model, trainer.args
    base = model.get_base_model()
    weights = weight_bytes(base, quantization)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    split = engine in SPLIT_AT_LOADING
    master = trained * 4 if engine.startswith("zero") else 0
    # DeepSpeed has the weights in 16 bits instead.
    autocast = (args.bf16 or args.fp16) and not engine.startswith("zero")
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    # TRL's loss is computed for tokens with a label, whose number tensors without data do not tell: here for all, of
    # which a share counts.
    labelled = (batch["labels"] != IGNORED).float().mean().item()
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=autocast):
        _give_fake_tensors(model)
        # Not what packing adds to a batch, on which attention masks depend by value; their shapes do not.
        names = [name for name in ("input_ids", "attention_mask", "labels") if name in batch]
        batch = {name: torch.empty(batch[name].shape, dtype=batch[name].dtype) for name in names}
        whole = peak_of_step(lambda: _loss(trainer, batch))
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
        hidden = peak_of_step(lambda: decoder(**inputs, use_cache=False)[0].sum())
    return MemoryEstimate(
        runtime=RUNTIME.get(device.type, RUNTIME["cuda"]),
        weights=weights // processes if split else weights,
        gathered=int(weights * min(1.0, ZERO3_LIVE / parameters)) if split else 0,
        deltas=trained * 8,
        optimizer=trained * 8 + master,
        activations=min(hidden, whole) + _largest_dequantised(base, quantization),
        logits=int(max(0, whole - hidden) * labelled),
    )


def _loss(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: losses.append(output.loss))
    try:
        # What trainers do with the loss's value, for their logs, needs data: it ends here, after the loss.
        with suppress(DataDependentOutputException):
            SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    finally:
        hook.remove()
    return losses[-1]


def weight_bytes(base: nn.Module, quantization: Any) -> int:
    layers = _quantised_layers(base, quantization)
    quantised = {id(layer.weight) for layer in layers}
    tensors: list[Any] = [*base.parameters(), *base.buffers()]
    sizes = {id(each): each.numel() * each.element_size() for each in tensors}
    plain = sum(size for key, size in sizes.items() if key not in quantised)
    return plain + sum(_quantised_bytes(layer, quantization) for layer in layers)


def _quantised_layers(base: Any, quantization: Any) -> list[Any]:
    """The layers that bitsandbytes takes: every linear one but the output embeddings and those that are named."""
    if quantization is None:
        return []
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    skipped = tuple(quantization.llm_int8_skip_modules or ())
    return [
        module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not (skipped and name.endswith(skipped))
    ]


def _quantised_bytes(layer: Any, quantization: Any) -> int:
    size = layer.weight.numel()
    if quantization.load_in_8bit:
        return size + 4 * layer.weight.shape[0]
    scales = size // BLOCK_4BIT
    nested = quantization.bnb_4bit_use_double_quant
    return size // 2 + (scales + 4 * scales // NESTED_BLOCK_4BIT if nested else 4 * scales)


def _largest_dequantised(base: nn.Module, quantization: Any) -> int:
    layers = _quantised_layers(base, quantization)
    return max((layer.weight.numel() * layer.weight.element_size() for layer in layers), default=0)


def _give_fake_tensors(model: nn.Module) -> None:
    # PyTorch itself moves no module from the meta device into a fake mode.
    given: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, meta in tensors.items():
                if meta is None:
                    continue
                if id(meta) not in given:
                    fake = torch.empty(meta.shape, dtype=meta.dtype, device="cpu")
                    parameter = isinstance(meta, nn.Parameter)
                    given[id(meta)] = nn.Parameter(fake, meta.requires_grad) if parameter else fake
                tensors[name] = given[id(meta)]


def peak_of_step(loss: Any) -> int:
    with _Allocations() as allocations:
        loss().backward()
    return allocations.peak


class _Allocations(TorchDispatchMode):
    """Follows the bytes of all storages that come into being under it, and when they go."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and id(storage) not in given:
                    self._known[storage] = True
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size
