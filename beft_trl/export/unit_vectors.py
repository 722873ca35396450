"""For each attention projection a vector whose product with every input is one: a bias as a LoRA of rank 1.

After a LayerNorm with weight `w` and bias `c` it is exact: what it normalises sums to zero, so that the sum of
`x_i / w_i` is that of `c_i / w_i`. After an RMSNorm it is a least-squares fit to the inputs of real text. A bias moves
the inputs of all layers after its own, where the vectors of the base no longer give one. So they are fitted again for
each adapter, to the inputs with its biases on.
"""

import itertools
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..weight_files import MergeError, write_tensors


RIDGE = 1e-3  # of the mean diagonal of the inputs' second moments
HELD_OUT = 4  # every fourth text is not fitted but measured on
KEPT_TEXTS, KEPT_TOKENS = 128, 16_384  # at most: kept with the vectors, for adapters that come without texts


@dataclass(frozen=True)
class UnitVectors:
    """What the LoRAs of rank 1 of one base model begin with. It depends on no adapter.

    Attributes:
        vectors (`dict[str, Tensor]`): fp32, shape (input features,), by the path of the projection.
        exact (`frozenset[str]`): the paths whose vector follows from a LayerNorm.
        texts (`list[tuple[list[int], int]]`): the first of the texts, as tokens, and how many of them are the prompt.
        base (`str`): what identifies the base model.
    """

    vectors: dict[str, Tensor]
    exact: frozenset[str]
    texts: list[tuple[list[int], int]]
    base: str

    def save(self, file: Path) -> None:
        """Writes one safetensors file."""
        about = {"base": self.base, "exact": sorted(self.exact), "texts": self.texts}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # others may be writing theirs
        try:
            write_tensors(partial, self.vectors, {"beft_unit_vectors": json.dumps(about)})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> "UnitVectors":
        """Reads what `save` wrote.

        Raises:
            MergeError: for another file, or a damaged one.
        """
        try:
            with safe_open(file, "pt") as tensors:
                about = json.loads((tensors.metadata() or {})["beft_unit_vectors"])
                vectors = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            if not all(vector.isfinite().all() for vector in vectors.values()):
                raise ValueError("a vector is not finite")
            texts = [(list(tokens), int(prompt)) for tokens, prompt in about["texts"]]
            return cls(vectors, frozenset(about["exact"]), texts, about["base"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise MergeError(
                f"{file} holds no vectors of this package, or is damaged ({error}). Remove it, and give rows to fit "
                "new ones."
            ) from error


def fit_unit_vectors(
    model: Any, modules: Sequence[str], texts: Sequence[tuple[list[int], int]], base: str
) -> UnitVectors:
    """Finds the vectors of a base model, from its structure and from the inputs that its projections get.

    Args:
        model (`PreTrainedModel`): the plain base, on any device.
        modules (`Sequence[str]`): paths of the projections, all of which a forward pass uses.
        texts (`Sequence`): tokens, and how many of them are the prompt. A few hundred are enough.
        base (`str`): what identifies the base model.

    Raises:
        MergeError: for fewer texts than are needed to fit and to measure, or numbers that are not finite.
    """
    fitted, measured = _parts(texts)
    means, first_of, norm_of = _means(model, modules, fitted)
    candidates = {path: {"fitted": _ridge(*means[first])} for path, first in first_of.items()}
    for path, norm in norm_of.items():
        vector = _of_layer_norm(norm)
        if vector is not None:
            candidates[path]["exact"] = vector
    errors = _errors(model, candidates, measured)
    chosen = {path: min(of_path, key=of_path.__getitem__) for path, of_path in errors.items()}
    return UnitVectors(
        {path: candidates[path][kind].float().contiguous() for path, kind in chosen.items()},
        frozenset(path for path, kind in chosen.items() if kind == "exact"),
        _first(texts),
        base,
    )


def fit_to_adapter(
    shared: UnitVectors, adapted: Any, modules: Sequence[str], texts: Sequence[tuple[list[int], int]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The vectors of one adapter: those of its base, drawn to what the projections get with the biases on.

    Args:
        shared (`UnitVectors`): of the base.
        adapted (`PreTrainedModel`): the base with the adapter in it.
        modules (`Sequence[str]`): paths of the projections that have a bias.
        texts (`Sequence`): as those of `fit_unit_vectors`.

    Returns:
        `tuple[dict[str, Tensor], dict[str, float]]`: the vectors, and the root mean square of `a.x - 1` over the
        tokens of texts that were not fitted, by path.

    Raises:
        MergeError: as `fit_unit_vectors`.
    """
    fitted, measured = _parts(texts)
    vectors = {path: shared.vectors[path] for path in modules}
    inexact = [path for path in modules if path not in shared.exact]
    if inexact:
        means, first_of, _ = _means(adapted, inexact, fitted)
        for path, first in first_of.items():
            vectors[path] = _ridge(*means[first], toward=vectors[path]).float().contiguous()
    errors = _errors(adapted, {path: {"": vector} for path, vector in vectors.items()}, measured)
    return vectors, {path: of_path[""] for path, of_path in errors.items()}


def _parts(texts: Sequence[tuple[list[int], int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of texts to fit, and of texts to measure on."""
    fitted = [tokens for number, (tokens, _) in enumerate(texts) if number % HELD_OUT]
    if not fitted:
        raise MergeError(
            f"{len(texts)} texts are too few to fit and to measure on: give two at least, better hundreds."
        )
    return fitted, [tokens for tokens, _ in texts[::HELD_OUT]]


def _first(texts: Sequence[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    ends = itertools.accumulate(len(tokens) for tokens, _ in texts)
    return list(texts[: max(2, min(KEPT_TEXTS, sum(end <= KEPT_TOKENS for end in ends)))])


def _means(
    model: Any, modules: Sequence[str], texts: Sequence[list[int]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str], dict[str, nn.LayerNorm]]:
    """Second moments and mean of what the projections are given.

    They are summed once for all projections with the same input: the second value names the first of them for each
    path. The third is the LayerNorm that gave the input, if one did.
    """
    moments: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    first_of: dict[str, str] = {}
    norm_of: dict[str, nn.LayerNorm] = {}
    for inputs in _inputs(model, modules, texts):
        firsts: dict[int, str] = {}
        for path, (values, norm) in inputs.items():
            first_of[path] = firsts.setdefault(values.data_ptr(), path)
            if norm is not None:
                norm_of[path] = norm
            if first_of[path] == path:
                rows = values.reshape(-1, values.shape[-1]).float()
                moments[path] = moments.get(path, 0) + (rows.T @ rows).cpu()
                sums[path] = sums.get(path, 0) + rows.sum(0).cpu()
                counts[path] = counts.get(path, 0) + len(rows)
    missing = [path for path in modules if path not in first_of]
    if missing:
        raise MergeError(f"{missing[0]} takes no part in the forward pass of {type(model).__name__}: it has no input.")
    return {path: (moments[path] / counts[path], sums[path] / counts[path]) for path in counts}, first_of, norm_of


def _ridge(moments: Tensor, mean: Tensor, toward: Tensor | None = None) -> Tensor:
    """The vector with the least mean square of `a.x - 1`, next to its distance from another one or from zero."""
    moments, size = moments.double(), len(mean)
    weight = RIDGE * moments.trace() / size
    pull = 0 if toward is None else weight * toward.double()
    return torch.linalg.solve(moments + weight * torch.eye(size).double(), mean.double() + pull)


def _of_layer_norm(norm: nn.LayerNorm) -> Tensor | None:
    if norm.weight is None or norm.bias is None or not norm.weight.all():
        return None
    weight, bias = norm.weight.detach().double().cpu(), norm.bias.detach().double().cpu()
    total = (bias / weight).sum()
    return 1 / (weight * total) if total else None


def _errors(
    model: Any, candidates: dict[str, dict[str, Tensor]], texts: Sequence[list[int]]
) -> dict[str, dict[str, float]]:
    squares: dict[str, dict[str, float]] = {path: dict.fromkeys(of_path, 0.0) for path, of_path in candidates.items()}
    tokens = 0
    for inputs in _inputs(model, list(candidates), texts):
        for path, (values, _) in inputs.items():
            rows = values.reshape(-1, values.shape[-1]).float()
            for kind, vector in candidates[path].items():
                squares[path][kind] += (rows @ vector.float().to(rows.device) - 1).square().sum().item()
        tokens += len(rows)
    wrong = next((path for path, of in squares.items() if not min(of.values()) < float("inf")), None)
    if wrong is not None:
        raise MergeError(
            f"The inputs of {wrong} are not finite: the base or the adapter is damaged, or their dtype does not hold "
            "them."
        )
    return {path: {kind: (each / tokens) ** 0.5 for kind, each in of.items()} for path, of in squares.items()}


@torch.no_grad()
def _inputs(
    model: Any, modules: Sequence[str], texts: Sequence[list[int]]
) -> Iterator[dict[str, tuple[Tensor, nn.LayerNorm | None]]]:
    """For each text what the projections are given, and the LayerNorm that gave it, if one did."""
    with _watched(model, modules) as found:
        # Without a terminal there is no bar, as in the other loops of an export.
        for tokens in tqdm(texts, desc="Inputs of the projections", unit="text", leave=False, disable=None):
            found.clear()
            model(input_ids=torch.tensor([tokens], device=next(model.parameters()).device), use_cache=False)
            yield found


@contextmanager
def _watched(model: Any, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, nn.LayerNorm | None]]]:
    found: dict[str, tuple[Tensor, nn.LayerNorm | None]] = {}
    normed: dict[int, tuple[Tensor, nn.LayerNorm]] = {}  # by the address of its output, which is kept alive

    def note_norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        normed[output.data_ptr()] = (output, module)  # type: ignore[assignment]

    def note_input(path: str, module: nn.Module, args: tuple) -> None:
        values, norm = args[0], normed.get(args[0].data_ptr())
        found[path] = (values, norm[1] if norm is not None and norm[0].shape == values.shape else None)

    hooks = [module.register_forward_hook(note_norm) for module in model.modules() if isinstance(module, nn.LayerNorm)]
    hooks += [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: note_input(path, module, args)
        )
        for path in modules
    ]
    hooks.append(model.register_forward_pre_hook(lambda *call: normed.clear()))
    training = model.training
    model.eval()
    try:
        yield found
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
