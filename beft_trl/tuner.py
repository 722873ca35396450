"""The trainable deltas next to the projections, as an adapter of PEFT's own BEFT tuner."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, PeftType, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .compat.adapters import BeftConfig, BeftLayer, BeftModel, beft_tuner, set_targets
from .layout import BiasSite
from .mixing import MixingBeftModel


ADAPTER_NAME = "default"
# The part of a parameter's name that PEFT gives to the trained copies of modules_to_save.
SAVED_WHOLE = f".modules_to_save.{ADAPTER_NAME}."
# How the names of models with a head for a task end in Transformers, and PEFT's word for the task.
TASK_MODELS = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}
CAUSAL_LM = "ForCausalLM"


def beft_config(
    sites: Sequence[BiasSite],
    task_type: TaskType | None = TaskType.CAUSAL_LM,
    modules_to_save: Sequence[str] = (),
) -> BeftConfig:
    """The PEFT configuration of an adapter with one delta at each site, and with copies of `modules_to_save`."""
    return BeftConfig(
        target_modules=sorted({site.module for site in sites}),
        task_type=task_type,
        modules_to_save=list(modules_to_save) or None,
    )


def adapter_config(model: nn.Module, sites: Sequence[BiasSite], modules_to_save: Sequence[str] = ()) -> BeftConfig:
    """The PEFT configuration of an adapter for `model`, with PEFT's word for its task, and the head of the task.

    Args:
        model (`nn.Module`): a Transformers model, on any device, the meta device included.
        sites (`Sequence[BiasSite]`): where the deltas go.
        modules_to_save (`Sequence[str]`, *optional*, defaults to `()`): modules to train and save whole, next to the
            head of a task model, which always is.

    Raises:
        ValueError: if the model has none of these modules, or has them in 16 bits.
    """
    ending = task_ending(model)
    saved = [*(_task_head(model) if ending in TASK_MODELS else []), *modules_to_save]
    for name in saved:
        _check_trainable_whole(model, name)
    return beft_config(sites, TaskType.CAUSAL_LM if ending == CAUSAL_LM else TASK_MODELS.get(ending), saved)


def attach_deltas(model: nn.Module, sites: Sequence[BiasSite], modules_to_save: Sequence[str] = ()) -> PeftModel:
    """Wraps `model` in the adapter of [`adapter_config`], whose deltas are zero. The base weights are frozen."""
    config = adapter_config(model, sites, modules_to_save)
    saved = config.modules_to_save
    with beft_tuner():
        attached = get_peft_model(model, config, adapter_name=ADAPTER_NAME)
    name_saved_modules(attached, saved)
    return attached


@contextmanager
def base_given_back(model: Any) -> Iterator[None]:
    """Takes what PEFT put into a plain base that was given off again, if an error ends what happens inside.

    Otherwise a second try with that model would be refused for the adapter of the first.
    """
    if not isinstance(model, nn.Module) or isinstance(model, PeftModel):
        yield
        return
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
                own = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, own)
        for parameter, before in required:
            parameter.requires_grad_(before)
        vars(model).pop("peft_config", None)
        raise


def name_saved_modules(model: PeftModel, modules_to_save: Sequence[str] | None) -> None:
    """Puts `modules_to_save` of the adapter back: PEFT's task models add names of heads that other models have."""
    config: Any = model.peft_config[ADAPTER_NAME]
    config.modules_to_save = list(modules_to_save) if modules_to_save else None


def refuse_other_adapters(model: nn.Module) -> None:
    """Raises ValueError if an adapter of another kind sits in `model`, wrapped around it or injected into it."""
    foreign = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, BeftLayer)
    ]
    kinds = {config.peft_type for config in getattr(model, "peft_config", {}).values()} - {PeftType.BEFT}
    bare = [name for name, module in model.named_modules() if isinstance(module, BeftLayer)]
    if not foreign and not kinds and (isinstance(model, PeftModel) or not bare):
        return
    if foreign:
        found = f"{foreign[0][0]} is a {type(foreign[0][1]).__module__.split('.')[2]} layer, {len(foreign)} in all"
    else:
        found = f"{bare[0]} has one" if bare else ", ".join(str(getattr(kind, "value", kind)) for kind in kinds)
    raise ValueError(
        f"The model already has a PEFT adapter ({found}), and the saved biases would be wrong on the plain base. Give "
        "the base model, to which this trainer adds the biases itself, or merge that adapter into it first "
        "(merge_and_unload). To go on training a BEFT adapter, load it with PeftModel.from_pretrained."
    )


def task_ending(model: Any) -> str:
    """How the name of the model's class ends, as in Transformers' auto classes; "" for a model without a head."""
    ending = next((ending for ending in TASK_MODELS if type(model).__name__.endswith(ending)), "")
    return CAUSAL_LM if not ending and getattr(model, "can_generate", lambda: False)() else ending


def _task_head(model: Any) -> list[str]:
    """The children of a task model other than its base model: what its pretraining never saw."""
    children = {name: next(child.parameters(), None) for name, child in model.named_children()}
    return [name for name, first in children.items() if name != model.base_model_prefix and first is not None]


def _check_trainable_whole(model: nn.Module, name: str) -> None:
    found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
    if not found or next(found[0].parameters(), None) is None:
        raise ValueError(
            f"modules_to_save names {name!r}, and {type(model).__name__} has no module of that name with parameters. "
            "Give names of its modules, such as 'pooler'."
        )
    dtype = next(found[0].parameters()).dtype
    if dtype.itemsize < torch.float32.itemsize:
        raise ValueError(
            f"{name} of {type(model).__name__} is to be trained whole, and is in {dtype}, where small steps are lost "
            "to rounding. Load the model with dtype=torch.float32, and compute in 16 bits with bf16=True."
        )


def adopt_deltas(model: PeftModel, sites: Sequence[BiasSite]) -> list[BiasSite]:
    """The sites whose deltas the adapter of `model` holds, which are made trainable, and nothing else.

    Raises:
        ValueError: for more than one adapter, or one of another name than PEFT's default.
    """
    if list(model.peft_config) != [ADAPTER_NAME]:
        raise ValueError(
            f"The model has the adapters {', '.join(model.peft_config)}: give it with one, named {ADAPTER_NAME!r}."
        )
    model.peft_config[ADAPTER_NAME].inference_mode = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".beft_bias." in name or SAVED_WHOLE in name
    return [site for site in sites if isinstance(_layer(model, site.module), BeftLayer)]


def load_adapter(model: nn.Module, folder: str, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained(model, folder)`, which also takes BEFT adapters of models with `Conv1D` (GPT-2).

    The model takes `adapter_names`, another adapter for each row of a batch, and its `base_model` has
    `add_weighted_adapter`, see [`MixingBeftModel`]. [`add_adapter`] loads more.

    Args:
        model: the base model, loaded.
        folder: an adapter's folder, or its name on the hub.
        kwargs: whatever `PeftModel.from_pretrained` takes.
    """
    with beft_tuner():
        loaded = PeftModel.from_pretrained(model, folder, **kwargs)
    if isinstance(loaded.base_model, BeftModel):
        loaded.base_model.__class__ = MixingBeftModel
    return loaded


class Deltas:
    """Which of a model's candidate sites have a delta. The layers of the others are put by, and can come back.

    Args:
        model (`PeftModel`): with a delta at each candidate.
        candidates (`Sequence[BiasSite]`): the sites that can have a delta.

    Attributes:
        sites (`list[BiasSite]`): those that have one.
    """

    def __init__(self, model: PeftModel, candidates: Sequence[BiasSite]):
        self.model, self.candidates = model, list(candidates)
        self.sites = self.candidates
        self._put_by: dict[str, nn.Module] = {}  # by path
        self._confined = _confine(model, self.candidates)

    def keep(self, sites: Sequence[BiasSite]) -> None:
        """Leaves a delta at each of `sites` and at no other candidate, and says so in the adapter's configuration."""
        self.sites = list(sites)
        kept = {site.module for site in sites}
        for path in sorted({site.module for site in self.candidates}):
            if path in kept and path in self._put_by:
                _replace(self.model, path, self._put_by.pop(path))
            elif path not in kept and path not in self._put_by:
                self._put_by[path] = _layer(self.model, path)
                _replace(self.model, path, projection(self.model, path))
        set_targets(self.model, ADAPTER_NAME, sorted(kept))
        for handle in self._confined:
            handle.remove()
        self._confined = _confine(self.model, sites)


def _replace(model: PeftModel, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_base_model().get_submodule(parent), name, layer)


def _confine(model: PeftModel, sites: Sequence[BiasSite]) -> list[RemovableHandle]:
    """Cuts the gradients of fused layers' deltas down to the rows of `sites`, until the handles are removed.

    The rest of the vector starts at zero, and without a gradient every optimizer and weight decay leave it there.
    """
    handles = []
    for path, rows in rows_of_modules(sites).items():
        parameter = _layer(model, path).beft_bias[ADAPTER_NAME]
        size = _layer(model, path).out_features
        if len(rows) < size:
            mask = torch.zeros(1, size).index_fill_(1, rows, 1)
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient)))
    return handles


def trained_values(model: PeftModel) -> dict[str, Tensor]:
    """The values of the deltas, and of what is trained whole, by name, as they are: nothing is copied."""
    deltas = {name: values for name, values in model.named_parameters() if ".beft_bias." in name}
    return {name: values.data for name, values in (deltas | parameters_saved_whole(model)).items()}


def trained_to_fp32(model: PeftModel, exact: Mapping[str, Tensor] | None = None) -> None:
    """Puts every delta, and what is trained whole, to fp32, in place, before an optimizer holds it.

    TRL casts the trainable parameters of a quantised model to bf16 in its trainers' `__init__`, and PEFT leaves the
    deltas of a 16-bit model in the model's dtype under ZeRO-3. A bf16 bias of 0.5 does not move under steps of 1e-3.

    Args:
        model (`PeftModel`): with what is trained.
        exact (`Mapping[str, Tensor]`, *optional*): [`trained_values`] of before the cast, which are put back. Without
            them a module trained whole begins with the values of the base model.
    """
    for name, rounded in trained_values(model).items():
        if rounded.dtype.itemsize < torch.float32.itemsize:
            values = (exact or {}).get(name)
            if values is None and SAVED_WHOLE in name:
                values = model.get_parameter(name.replace(SAVED_WHOLE, ".original_module.")).data
            source = rounded if values is None or values.shape != rounded.shape else values
            model.get_parameter(name).data = source.to(rounded.device, torch.float32, copy=True)


def delta(model: PeftModel, site: BiasSite) -> nn.Parameter:
    """The parameter that holds the delta of `site`, shape (1, output features of its projection)."""
    return _layer(model, site.module).beft_bias[ADAPTER_NAME]


def parameters_saved_whole(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters of the task head and of other modules that are trained and saved whole, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if SAVED_WHOLE in name}


def projection(model: PeftModel, module: str) -> Any:
    """The frozen projection at the path `module` of the base model."""
    return _layer(model, module).get_base_layer()


def _layer(model: PeftModel, module: str) -> Any:
    return model.get_base_model().get_submodule(module)


def rows_of_modules(sites: Sequence[BiasSite]) -> dict[str, Tensor]:
    """The rows of each module, by path: the terms of a fused projection share one."""
    rows: dict[str, list[Tensor]] = {}
    for site in sites:
        rows.setdefault(site.module, []).append(site.rows)
    return {path: torch.cat(parts) for path, parts in rows.items()}
