"""What a recipe would do, found out without its weights: sites, cell, memory, labels, steps, and every problem."""

import copy
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import nn
from trl import SFTTrainer, get_quantization_config

from ..arguments import refuse_push
from ..aside import run_steps
from ..checkpoints import check_writable
from ..compat.models import as_one_device, check_attention, learnt_columns
from ..config import BeftSFTConfig
from ..data.labels import LabelAudit, audit_labels, untruncated
from ..data.rows import prepare_rows
from ..engines import engine_of, precision_of, refuse_cell
from ..frozen_cache import plan_cache
from ..layout import BiasSites, find_bias_sites, sites_of_term
from ..scoring import score_steps
from ..spans import sites_in
from ..trainer import BeftSFTTrainer
from .bases import base_skeleton, check_weights, refuse_missing_model
from .launch import launch_command, launched_engine
from .memory import MemoryEstimate, estimate_memory
from .recipe import Recipe, parse_recipe
from .run import Data, load_data


STREAMED_ROWS = 256
# No more than a scoring step and a training step, and nothing is left of them. A warm-up begins with a rate of zero.
DRY_RUN: dict[str, Any] = {
    "max_steps": 1,
    "warmup_steps": 0,
    "score_steps": 1,
    "answers": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
}


@dataclass
class Check:
    """What a recipe would do, as far as it could be found out.

    Attributes:
        problems: why the run cannot start, each with its remedy. Empty if it can.
        notes: what could not be found out.
        model: name of the base model.
        engine: name of the engine in `engines.ENGINES`.
        precision: name of the base weights' precision in `engines.PRECISIONS`.
        processes: number of processes.
        sites: the model's bias sites.
        bias_term: what the recipe asks to train.
        candidates: number of biases that a scoring pass trains, or of those trained if the term is given.
        parameters: number of parameters of the model.
        labels: what the run learns from.
        steps: optimizer steps of the run.
        length_given: whether the recipe gives `num_train_epochs` or `max_steps`.
        learning_rate: one for all layers, or the share if `relative_learning_rate` is not `None`.
        relative_learning_rate: what each layer learns at, relative to the RMS of its projection's outputs.
        score_steps: optimizer steps of the scoring pass, which runs over as many batches twice; 0 without one.
        frozen_states: bytes that the states after the frozen layers take, which are computed once for each row.
        frozen_computed: why they are computed in every step, or `None` if they are not.
        memory: of one device.
        device_memory: bytes that a device has for each process, or `None` if that is not known.
        dry_run: whether a scoring step and a training step were done with the weights.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    model: str | None = None
    engine: str | None = None
    precision: str | None = None
    processes: int = 1
    sites: BiasSites | None = None
    bias_term: str | None = None
    candidates: int | None = None
    parameters: int | None = None
    labels: LabelAudit | None = None
    steps: int | None = None
    length_given: bool = True
    learning_rate: float | None = None
    relative_learning_rate: float | None = None
    score_steps: int | None = None
    frozen_states: int | None = None
    frozen_computed: str | None = None
    memory: MemoryEstimate | None = None
    device_memory: int | None = None
    dry_run: bool = False

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Takes down an error as a problem, and goes on."""
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            self.problems.append(str(error))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; the sites as one record each."""
        record = {name: value for name, value in vars(self).items() if name not in ("sites", "labels", "memory")}
        record["sites"] = [
            {
                "layer": site.layer,
                "term": site.term,
                "module": site.module,
                "size": len(site.rows),
                "has_bias": site.has_bias,
                "dead": site.dead,
            }
            for site in self.sites or ()
        ]
        record["labels"] = asdict(self.labels) if self.labels else None
        record["memory"] = {**asdict(self.memory), "total": self.memory.total} if self.memory else None
        return record


def check_recipe(
    path: str,
    overrides: Sequence[str] = (),
    launch: str | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Check:
    """Checks a recipe without loading its weights.

    Args:
        path: of the recipe.
        overrides: of its fields, as `--name value`.
        launch: a launch configuration's name or path, see [`launch.launch_config`]. Default: one process.
        dry_run: also load the weights, and do one scoring step and one training step.
        tell: is given what goes on, where it takes seconds.
    """
    check = Check()
    recipe = None
    with check.noting():
        recipe = parse_recipe(["--config", path, *overrides])
    if recipe is None:
        return check
    args = recipe.training
    check.model, check.bias_term = recipe.base_model, args.bias_term
    check.length_given = args.num_train_epochs is not None
    check.learning_rate, check.relative_learning_rate = args.learning_rate, args.relative_learning_rate
    quantization, model, data = None, None, None
    with check.noting():
        check.engine, check.processes = launched_engine(launch) if launch is not None else (engine_of(args), 1)
        quantization = get_quantization_config(recipe.model)
        check.precision = precision_of(quantization, (args.model_init_kwargs or {}).get("dtype"))
        refuse_cell(check.engine, args, quantization, (args.model_init_kwargs or {}).get("dtype"))
    with check.noting():
        check_writable(recipe.output_dir)
    with check.noting():
        refuse_push(args)
    base = None
    with check.noting():
        refuse_missing_model(recipe.base_model, recipe.model.model_revision)
        base = base_skeleton(recipe.base_model, args)
    if base is None:
        return check
    with check.noting():
        check_weights(recipe.base_model, args, base)
    with check.noting():
        skeleton = _in_its_dtype(base, args, under_deepspeed=(check.engine or "").startswith("zero"))
        check.parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        check.sites = sites_in(find_bias_sites(skeleton), args.bias_layers)
        check.candidates = sum(len(site.rows) for site in sites_of_term(check.sites, args.bias_term))
        model = skeleton
    with check.noting():
        data = load_data(recipe)
    if model is not None and data is not None:
        with check.noting():
            _check_with_trainer(check, recipe, model, data, quantization)
    if dry_run and not check.problems:
        tell("Loading the weights for a scoring step and a training step")
        with check.noting():
            _dry_run(path, overrides, launch)
            check.dry_run = True
    return check


class _WeightlessTrainer(BeftSFTTrainer):
    """Made of a model on the meta device: everything that the constructor refuses and prepares, and no weights."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass


def _check_with_trainer(check: Check, recipe: Recipe, model: Any, data: Data, quantization: Any) -> None:
    args = recipe.training
    planned = copy.copy(args)
    planned.push_to_hub = False
    planned.model_init_kwargs = None  # for models that are named
    # One process with the batch of all takes as many steps as they do.
    planned.per_device_train_batch_size *= check.processes
    if check.processes > 1:
        as_one_device(planned)
    given = data.train
    if not isinstance(given, Dataset):
        if args.max_steps <= 0:
            check.problems.append("A streamed dataset has no length that is known: set max_steps.")
        given = Dataset.from_list(list(islice(given, STREAMED_ROWS)))
    with tempfile.TemporaryDirectory() as planned.output_dir:  # the constructor makes the folder
        trainer = _WeightlessTrainer(
            model, planned, train_dataset=given, eval_dataset=data.held_out, processing_class=data.tokenizer
        )
    planned.output_dir = args.output_dir
    if args.gradient_checkpointing:
        wrapped: Any = trainer.model
        wrapped.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)  # as `train()` does
    prepared: Any = trainer.train_dataset
    if "labels" in (prepared.column_names or ()):
        given = prepare_rows(given, args.dataset_text_field)
        whole = SFTTrainer._prepare_dataset(
            trainer, given, data.tokenizer, untruncated(planned), False, None, "audited"
        )
        check.labels = audit_labels(given, prepared, whole, data.tokenizer, args, check.processes)
    with check.noting():
        check.steps = run_steps(trainer)
        check.score_steps = score_steps(args.score_steps, check.steps) if args.bias_term == "auto" else 0
    plan = plan_cache(trainer, trainer.bias_sites, check.engine or "single")
    check.frozen_computed = plan.reason
    check.frozen_states = plan.needed if plan.reason is None else None
    with check.noting():
        # As a checkpoint has them.
        planned.per_device_train_batch_size = args.per_device_train_batch_size
        if quantization is not None:
            model.config.quantization_config = quantization
        trainer.find_checkpoint(args.resume_from_checkpoint, check.engine or "single", check.processes)
    _check_memory(check, trainer, args, quantization)


def _check_memory(check: Check, trainer: BeftSFTTrainer, args: Any, quantization: Any) -> None:
    check.device_memory = _device_memory(args.device, check.processes)
    try:
        check.memory = estimate_memory(
            trainer,
            _largest_batch(trainer, args.per_device_train_batch_size),
            device=args.device,
            engine=check.engine or "single",
            processes=check.processes,
            quantization=quantization,
        )
    except Exception as error:  # a model whose code asks for values: no reason not to train it
        check.notes.append(f"The memory was not estimated ({type(error).__name__}: {error}).")
    if check.memory and check.device_memory and check.memory.total > check.device_memory:
        check.problems.append(
            f"The run needs about {check.memory.total / 2**30:.1f} GiB on each device, which has "
            f"{check.device_memory / 2**30:.1f} GiB for it. Lower per_device_train_batch_size or max_length, set "
            "gradient_checkpointing: true or load_in_8bit: true, or split the weights with --launch zero3."
        )


def _largest_batch(trainer: BeftSFTTrainer, size: int) -> dict[str, torch.Tensor]:
    rows: Any = trainer.train_dataset
    lengths = [len(tokens) for tokens in rows["input_ids"]]
    longest = rows[lengths.index(max(lengths))]
    row = {name: longest[name] for name in learnt_columns(trainer) if name in longest}
    return trainer.data_collator([row] * size)


def _in_its_dtype(skeleton: Any, args: BeftSFTConfig, under_deepspeed: bool) -> nn.Module:
    options: Any = args.model_init_kwargs or {}
    dtype, attention = options.get("dtype") or "float32", options.get("attn_implementation")
    if attention is not None:  # as the weights are loaded, it is looked at
        check_attention(skeleton, attention)
    if dtype == "auto":
        dtype = skeleton.config.dtype or "float32"
    if under_deepspeed and args.bf16:
        dtype = "bfloat16"  # DeepSpeed puts the weights in the precision of its own configuration
    return skeleton.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _device_memory(device: torch.device, processes: int) -> int | None:
    if device.type == "cpu":
        return psutil.virtual_memory().total // processes
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return None


def _dry_run(path: str, overrides: Sequence[str], launch: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {**DRY_RUN, "report_to": "none", "push_to_hub": False, "output_dir": folder}
        more = [f"--{name}={value}" for name, value in settings.items()]
        command = launch_command(launch, ["train", path, *overrides, *more])
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(
            f"The dry run of one scoring step and one training step ended with exit code {run.returncode}: "
            f"{run.stderr.strip()[-1500:]}"
        )
