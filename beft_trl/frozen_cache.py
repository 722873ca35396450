"""The hidden states that the frozen layers give for each row, kept so that later steps begin after them."""

import hashlib
import inspect
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import psutil
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn

from .data.labels import datasets_of
from .engines import SPLIT_AT_LOADING
from .layout import BiasSite
from .spans import FrozenLayers, frozen_below


logger = get_logger(__name__)

# What a forward pass is asked for that the frozen layers would have to be computed for.
NEEDS_ALL_LAYERS = ("output_hidden_states", "output_attentions", "output_router_logits")
OLD_KEYS = ("past_key_values", "past_key_value", "layer_past")  # of a generation that goes on
# What a model is called with next to tokens that its frozen layers do not see, or that follows from the position ids.
NOT_SEEN = ("labels", "shift_labels", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Rotary embeddings with other frequencies for a batch with a long row (Transformers' `dynamic_rope_update`).
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Settings of Llama 4 by which attention counts from the start of a batch's row, and not by position ids: the chunks
# (Transformers before 5.23), and how the layers without positions are scaled.
COUNTED_IN_BATCH = ("attention_chunk_size", "attn_temperature_tuning")
NOISE = re.compile(r"drop|jitter|noise")
# The largest difference of kept and computed states of a row, of their norm, by the size of their numbers in bytes.
# Batches of other sizes differ in rounding: SmolLM2 by 1e-6 in fp32, by 1e-2 in bf16.
ROUNDING = {4: 1e-4, 2: 5e-2}
PROVED_BATCHES = 2  # wholly known ones that are computed all the same, and compared
SHARE_OF_MEMORY = 0.5  # of what is free, for the states of all processes of a machine


class _Part(NamedTuple):
    """The real tokens of a row, or of one of several that were put into a row: who they are, where, and after whom."""

    key: bytes
    row: int
    positions: Tensor
    after: tuple[bytes, ...]


class _Kept(NamedTuple):
    states: Tensor
    after: tuple[bytes, ...]  # when they were computed


class FrozenLayersCache:
    """Keeps what the frozen layers give for each row, and gives it back in their place.

    A batch whose rows are all known skips the frozen layers: the last of them gives the kept states, the others what
    they are given. Any other batch is computed as a whole, and its rows are kept. The padding of a batch that skips is
    zero after the frozen layers, where no real token sees it.

    The states are in the processor's memory, pinned if the model is on a GPU, in the dtype in which they were
    computed. Known rows of a computed batch are compared, and the first batches that are wholly known are computed for
    it, as are the first in which a row comes after other ones than before. What differs by more than rounding ends it:
    noise that was not found, or rows that see each other.

    Args:
        frozen (`FrozenLayers`): the layers, and what is around them.
        limit (`int`): bytes to keep at most.

    Attributes:
        bytes (`int`): that are kept.
        batches (`dict[str, int]`): how many were computed and how many skipped the frozen layers.
    """

    def __init__(self, frozen: FrozenLayers, limit: int):
        self.frozen, self.limit = frozen, limit
        self.bytes = 0
        self.batches = {"computed": 0, "skipped": 0}
        self._kept: dict[bytes, _Kept] = {}
        # Batches that are still computed to compare them: any, and those with a row that came after other ones.
        self._to_prove, self._to_prove_after_others = PROVED_BATCHES, PROVED_BATCHES
        self._ended = False
        self._given: dict[str, Any] | None = None  # what a forward pass is called with
        # Of a forward pass: its rows, None if they are not to be kept, and whether it skips the frozen layers.
        self._parts: list[_Part] | None = None
        self._skips = False
        self._whole = False  # whether it asks for something of every layer
        self._others: list[None] | None = None  # in their place, None for layers that give a tensor
        self._more: list[Tensor] = []  # what the layers gave next to their hidden states

    def prove_again(self) -> None:
        """Compares the next batches that are wholly known once more: what was kept may be of other weights."""
        self._to_prove = PROVED_BATCHES

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, forward passes of the model keep and skip."""
        if self._ended:
            yield
            return
        layers, around = self.frozen.layers, self.frozen.around
        hooks = [each.register_forward_pre_hook(self._begin, with_kwargs=True) for each in around]
        hooks.append(self.frozen.first_trained.register_forward_pre_hook(self._check_given, with_kwargs=True))
        hooks.append(around[0].register_forward_hook(self._end, always_call=True))
        # As accelerate's hooks do: a layer gets the `forward` back that it had of its own.
        own = [vars(layer).get("forward") for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = partial(self._forward, index, layer.forward)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, forward in zip(layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Notes what the innermost module that takes tokens is called with."""
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        if module is self.frozen.around[0]:
            config: Any = module.config
            self._given = None
            self._whole = any(given.get(name, getattr(config, name, False)) for name in NEEDS_ALL_LAYERS)
        if given.get("input_ids") is not None and not self._whole:
            self._given = given

    def _find_rows(self) -> None:
        """Finds the rows of a batch, and whether it skips the frozen layers."""
        given = self._given
        self._parts = parts_of(given, self._precision(given["input_ids"].device.type)) if given is not None else None
        parts = self._parts or ()
        known = all(part.key in self._kept for part in parts)
        moved = known and any(part.after != self._kept[part.key].after for part in parts)
        self._skips = known and not self._to_prove and not (moved and self._to_prove_after_others)

    def _end(self, *call: Any) -> None:
        self._parts = self._given = None
        self._more.clear()

    def _check_given(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Ends the cache if a layer takes more of the layers before it than their hidden states (T5)."""
        taken = [*args, *kwargs.values()]
        if any(each is more for each in taken for more in self._more):
            self._stop(f"the layers of {type(self.frozen.around[-1]).__name__} pass more than hidden states along")

    def _precision(self, device: str) -> str:
        """What else the states of a row depend on: an evaluation can be in another precision than the training."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return f"{next(self.frozen.layers[-1].parameters()).dtype} {autocast}"

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if index == 0 and all(kwargs.get(name) is None for name in OLD_KEYS):
            self._find_rows()
        if self._parts is None:
            return forward(*args, **kwargs)
        last = index == len(self.frozen.layers) - 1
        if self._skips:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = self._assembled(hidden) if last else hidden
            return (hidden, *self._others) if self._others is not None else hidden
        self._check_given(self.frozen.layers[index], args, kwargs)
        if any(isinstance(value, (dict, list)) for value in kwargs.values()):
            self._stop(f"the layers of {type(self.frozen.around[-1]).__name__} share a container")
        output = forward(*args, **kwargs)
        hidden, *others = (output,) if isinstance(output, Tensor) else output
        self._others = None if isinstance(output, Tensor) else [None] * len(others)
        self._more += [each for each in others if isinstance(each, Tensor)]
        if last and self._parts is not None:
            self._keep(hidden.detach())
        return output

    def _assembled(self, like: Tensor) -> Tensor:
        """The kept states of a batch, on the device and in the form of what its layers are given."""
        parts: Sequence[_Part] = self._parts or ()
        self.batches["skipped"] += 1
        first = self._kept[parts[0].key].states
        states = torch.zeros(*like.shape[:2], first.shape[-1], dtype=first.dtype, device=like.device)
        for part in parts:
            kept = self._kept[part.key].states.to(like.device, non_blocking=True)
            states[part.row, part.positions.to(like.device)] = kept
        return states

    def _keep(self, hidden: Tensor) -> None:
        """Compares the rows of a computed batch that are known, and keeps the others."""
        parts = self._parts or ()
        self.batches["computed"] += 1
        on_gpu, computed = hidden.device.type != "cpu", hidden.cpu()
        known = [part for part in parts if part.key in self._kept]
        for part in known:
            states, before = computed[part.row, part.positions].float(), self._kept[part.key].states.float()
            share = ((states - before).norm() / before.norm()).item()
            if not share <= ROUNDING[computed.element_size()]:
                self._stop(f"what they give for a row was not the same twice, by {share:.1%}")
                return
        if len(known) == len(parts):
            self._to_prove = max(0, self._to_prove - 1)
        if any(part.after != self._kept[part.key].after for part in known):
            self._to_prove_after_others = max(0, self._to_prove_after_others - 1)
        for part in parts:
            if part.key not in self._kept:
                states = computed[part.row, part.positions]  # a copy
                if self.bytes + states.nbytes > self.limit:
                    if not self.batches["skipped"]:
                        self._stop(f"their {self.limit / 2**30:.2f} GiB were full before a row came back")
                    return
                self._kept[part.key] = _Kept(states.pin_memory() if on_gpu else states, part.after)
                self.bytes += states.nbytes

    def _stop(self, reason: str) -> None:
        self._ended, self._parts = True, None
        self._kept.clear()
        self.bytes = 0
        logger.warning(f"The frozen layers are computed in every step from here on, and not cached: {reason}.")


def parts_of(given: dict[str, Any], precision: str) -> list[_Part] | None:
    """The real tokens of each row of a batch, or `None` if what the frozen layers give depends on more than tokens.

    Rows that were put one after the other into a row of the batch are parts of their own: those that position ids
    that begin again, or numbers in the attention mask, tell apart.

    Args:
        given (`dict`): what the model is called with.
        precision (`str`): of the forward pass.
    """
    tokens: Tensor = given["input_ids"]
    mask = given.get("attention_mask")
    others = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim}
    for name in ("input_ids", *NOT_SEEN):
        others.pop(name, None)
    if any(value.shape != tokens.shape or value.is_floating_point() for value in others.values()):
        return None  # images, embeddings, a table of segments
    if tokens.ndim != 2 or (mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape)):
        return None
    numbers = torch.stack([tokens, *(others[name] for name in sorted(others))]).cpu()
    positions = given.get("position_ids")
    if mask is None and positions is not None:
        segments = (positions == 0).cumsum(1).cpu() + 1
    else:
        segments = mask.long().cpu() if mask is not None else torch.ones_like(numbers[0])
    parts = []
    for row, of_row in enumerate(segments):
        after: tuple[bytes, ...] = ()
        for segment in of_row.unique().tolist():
            if segment:
                where = (of_row == segment).nonzero().flatten()
                # Without position ids a model counts from the start of the row, padding included.
                first = "" if positions is not None else int(where[0])
                seen = f"{precision} {sorted(others)} {first}".encode() + numbers[:, row, where].numpy().tobytes()
                key = hashlib.blake2b(seen, digest_size=16).digest()
                parts.append(_Part(key, row, where, after))
                after = (*after, key)
    return parts


class CachePlan(NamedTuple):
    """Whether the frozen layers of a run are cached.

    Attributes:
        reason (`str`, *optional*): why they are not.
        frozen (`FrozenLayers`, *optional*): the layers, if there are any.
        needed (`int`, *optional*): bytes of their states, if they are cached and the rows are tokenized.
        free (`int`): bytes that there are for them.
    """

    reason: str | None
    frozen: FrozenLayers | None = None
    needed: int | None = None
    free: int = 0


def frozen_cache(trainer: Any, sites: Sequence[BiasSite], engine: str) -> FrozenLayersCache | None:
    """The cache of a trainer's run, or `None` if it can or shall have none.

    Args:
        trainer (`Trainer`): with its model and rows; `args.cache_frozen_layers` says what is asked for.
        sites (`Sequence[BiasSite]`): all that can be trained.
        engine (`str`): name in `engines.ENGINES`.

    Raises:
        ValueError: if it is asked for and cannot be.
    """
    plan = plan_cache(trainer, sites, engine)
    if plan.reason is None and plan.frozen is not None:
        # Twice what is needed: an evaluation can be in another precision. Rows that never come back reach it.
        limit = plan.free if plan.needed is None else min(2 * plan.needed, plan.free)
        return FrozenLayersCache(plan.frozen, limit)
    if trainer.args.cache_frozen_layers:
        raise ValueError(f"cache_frozen_layers=True, and {plan.reason}. Leave it out.")
    logger.info(f"The frozen layers are not cached: {plan.reason}.")
    return None


def plan_cache(trainer: Any, sites: Sequence[BiasSite], engine: str) -> CachePlan:
    """Whether the frozen layers of a run are cached, or why they are computed in every step.

    The arguments are those of [`frozen_cache`].
    """
    if trainer.args.cache_frozen_layers is False:
        return CachePlan("cache_frozen_layers=False")
    frozen = frozen_below(trainer.model, sites)
    if frozen is None:
        return CachePlan("there are no frozen layers below the lowest bias that is trained")
    reason = _reason_against(trainer, frozen, engine)
    if reason is not None:
        return CachePlan(reason, frozen)
    needed, free = states_bytes(trainer), _free_memory(trainer.args)
    if needed is not None and needed > free:
        reason = f"their states take {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB for them"
    return CachePlan(reason, frozen, needed, free)


def _reason_against(trainer: Any, frozen: FrozenLayers, engine: str) -> str | None:
    args = trainer.args
    if args.neftune_noise_alpha:
        return f"neftune_noise_alpha={args.neftune_noise_alpha} gives them other numbers each time"
    noise = _first_noise(frozen)
    if noise is not None:
        return f"{noise} gives other numbers each time"
    positions = _positions_of_own(frozen.around[0].config)
    longest = getattr(args, "max_length", None)
    if positions is not None and (longest is None or longest > positions):
        return f"beyond {positions} positions their rotary embedding depends on the longest row of a batch"
    base: Any = frozen.around[0]
    text_config = base.config.get_text_config()
    for name in COUNTED_IN_BATCH:
        if value := getattr(text_config, name, None):
            return f"{name}={value} counts from where a row of the batch begins, and a row of the data may begin later"
    if getattr(frozen.around[0].config, "output_router_logits", False):
        return "output_router_logits=True asks for the routers of every layer"
    if engine in SPLIT_AT_LOADING:
        return "ZeRO-3 gathers the weights of every layer in every process"
    if args.torch_compile:
        return "torch_compile compiles all layers as one"
    if args.n_gpu > 1:
        return f"one process for {args.n_gpu} GPUs copies the model in each step. Launch a process for each"
    if not hasattr(trainer.train_dataset, "__len__"):
        return "the rows are a stream, which need not give one twice"
    return None


def _positions_of_own(config: Any) -> int | None:
    """The positions up to which a rotary embedding does not follow the longest row of a batch; `None` if none does."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = [each for each in (rope, *rope.values()) if isinstance(each, dict)]  # one, or one for a kind of layer
    following = [each for each in of_layers if str(each.get("rope_type")) in LENGTH_DEPENDENT]
    limits = [each.get("original_max_position_embeddings") or config.max_position_embeddings for each in following]
    return min(limits, default=None)


def states_bytes(trainer: Any) -> int | None:
    """Bytes that the states of all rows take: tokens times hidden size times bytes of a number.

    `None` if the rows are not tokenized before the run.
    """
    parts = [rows for _, rows in datasets_of(trainer)]
    if not all(isinstance(part, Dataset) and "input_ids" in part.column_names for part in parts):
        return None
    batches = (part.select_columns("input_ids").with_format("arrow").iter(10_000) for part in parts)
    tokens = sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for part in batches for batch in part)
    base = trainer.model.get_base_model()
    return tokens * base.config.get_text_config().hidden_size * base.dtype.itemsize


def _free_memory(args: Any) -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    return int(psutil.virtual_memory().available * SHARE_OF_MEMORY) // processes


def _first_noise(frozen: FrozenLayers) -> str | None:
    """The first dropout, layer drop or noise up to the last frozen layer, by the name of its setting."""
    up_to_layers = itertools.takewhile(lambda each: each is not frozen.layers[0], frozen.around[0].modules())
    for module in (*up_to_layers, *frozen.around, *(each for layer in frozen.layers for each in layer.modules())):
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"dropout of {module.p}"
        for name, value in vars(module).items():
            if NOISE.search(name) and isinstance(value, float) and value > 0:
                return f"{name}={value} of {type(module).__name__}"
    return None
