"""What the package uses of other packages without their promise: a test fails by name if a release renames it."""

import copy
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from conftest import make_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.beft import BeftLayer, BeftModel, Linear
from torch import nn
from transformers import AutoModelForSequenceClassification, HfArgumentParser, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_available, is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available

import beft_trl
from beft_trl.compat import adapters, engines, losses, models


PACKAGE = Path(beft_trl.__file__).parent


def source(name):
    return inspect.getsource(importlib.import_module(name))


def test_no_other_module_imports_what_is_private():
    """By a name that begins with an underscore, of a module or of what is imported from it."""
    private = re.compile(r"^\s*(from [\w.]*\._\w+[\w.]* import|import [\w.]*\._\w+|from [\w.]+ import .*\b_\w+)", re.M)
    found = [path for path in PACKAGE.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))]
    assert {path.parent.name for path in found} <= {"compat"}


@pytest.mark.parametrize(("owner", "method"), [(o, m) for o, methods in models.OVERRIDDEN.items() for m in methods])
def test_an_overridden_method_is_there_and_is_called(owner, method):
    upstream = getattr(trl, owner, None) or getattr(transformers, owner)
    assert callable(getattr(upstream, method))
    calls = source(inspect.getmodule(upstream).__name__)
    assert re.search(rf"self\.{method}\(", calls), f"{owner} does not call {method} any more"


def test_accelerate_marks_a_model_that_it_prepared():
    model, accelerator = nn.Linear(1, 1), Accelerator(cpu=True)
    accelerator.prepare_model(model)
    assert "_is_accelerate_prepared" in vars(model)
    engines.forget_preparation(model, accelerator)
    assert "_is_accelerate_prepared" not in vars(model)


@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.utils.tensor_fragment", "_hp_mapping"),
        ("deepspeed.utils.tensor_fragment", "_z3_optimizer"),
        ("deepspeed.runtime.zero.partition_parameters", "ds_id"),
        ("deepspeed.runtime.zero.partition_parameters", "ds_shape"),
    ],
)
def test_deepspeed_names_it_so(module, name):
    assert re.search(rf"\b{name}\b", source(module))


def test_a_16_bit_delta_without_its_fp32_copy_is_an_error():
    """As it would be if DeepSpeed renamed the link."""
    with pytest.raises(RuntimeError, match="bfloat16"):
        engines.has_fp32_copy(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    assert not engines.has_fp32_copy(nn.Parameter(torch.zeros(2)))


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
def test_bitsandbytes_says_whether_4_bit_weights_are_packed():
    from bitsandbytes.nn import Linear4bit

    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    assert "packing_format_for_cpu" in source("bitsandbytes.nn.modules")


def test_a_beft_layer_of_peft_has_what_ours_sets():
    layer = Linear(nn.Linear(2, 2), "default", beft_trl.tuner.beft_config([]))
    for name in ("base_layer", "beft_bias", "_disable_adapters", "merged_adapters", "in_features", "_active_adapter"):
        assert hasattr(layer, name), name
    assert isinstance(layer, BeftLayer) and callable(BeftModel._create_new_module)


def test_peft_opens_its_models_hook_around_a_forward_pass_and_an_answer():
    opened = source("peft.peft_model")
    assert "with self.base_model._enable_peft_forward_hooks(*args, **kwargs):" in opened
    assert opened.count("with self._enable_peft_forward_hooks(*args, **kwargs):") >= 2
    assert "adapter_names" in opened


def test_peft_names_the_targets_of_a_tuner():
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    assert all(name.endswith("q_proj") for name in model.base_model.targeted_module_names)
    assert len(model.base_model.targeted_module_names) == 2


def test_trl_calls_its_reference_adapter_so():
    assert f'"{adapters.REFERENCE_NAME}"' in source("trl.trainer.dpo_trainer")


@pytest.mark.parametrize("ending", adapters.METRICS)
def test_trl_fills_containers_of_these_names(ending):
    assert re.search(rf"self\.\w*{ending}\b", source("trl.trainer.sft_trainer") + source("trl.trainer.grpo_trainer"))


def test_trl_asks_whether_its_loss_computes_only_labelled_logits():
    assert "_use_triton(hidden_states.device)" in source("trl.trainer.utils")
    cpu = torch.device("cpu")
    assert not losses.utils._use_triton(cpu)
    with losses.labelled_tokens_only(cpu):
        assert losses.utils._use_triton(cpu)
    assert not losses.utils._use_triton(cpu)


def test_what_from_pretrained_takes_is_known():
    """By the names that its own source takes out of its keyword arguments."""
    popped = re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(PreTrainedModel.from_pretrained))
    names = [name for name in popped if not name.startswith("_")]
    assert len(names) > 20 and set(names) <= set(models.LOADING)


def test_a_file_that_is_not_there_is_none(tmp_path):
    assert models.local_file("nobody/nothing", "config.json", None) is None
    assert models.local_file(str(tmp_path), "config.json", None) is None


def test_transformers_keeps_the_commit_of_a_configuration():
    assert "_commit_hash" in source("transformers.configuration_utils")


def test_settings_can_be_told_to_count_one_device(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    args._n_gpu = 4
    assert args.train_batch_size == 12
    models.as_one_device(args)
    assert args.train_batch_size == 3


def test_an_attention_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="bogus"):
        models.check_attention(copy.deepcopy(make_llama()), "bogus")


def test_zero3_splits_no_weights_of_a_model_that_has_none():
    """Without it, `from_config` ends in "Cannot copy out of meta tensor"."""
    pytest.importorskip("deepspeed")
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    sharding = HfDeepSpeedConfig(settings)  # Transformers shards as long as it lives
    config = make_llama().config
    assert sharding.is_zero3() and is_deepspeed_zero3_enabled()
    with models.without_weights():
        model = AutoModelForSequenceClassification.from_config(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def test_the_parser_of_arguments_lists_its_actions():
    assert "learning_rate" in {action.dest for action in HfArgumentParser(TrainingArguments)._actions}


def test_embeddings_forget_that_their_output_requires_a_gradient():
    """However often it was asked for, which Transformers itself keeps no count of."""
    model = make_llama()
    for _ in range(3):
        model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 3
    models.forget_input_gradients(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_trl_takes_what_it_sends_to_vllm_from_one_place():
    code = source("trl.generation.vllm_generation")
    assert len(re.findall(r"in self\._iter_named_params\(\)|, self\._iter_named_params\(\)", code)) == 4
    assert "self._dist.gather_params([param])" in code and "enable_sleep_mode" in code
