"""What a trainer takes, as SFTTrainer and Trainer take it, and what it refuses."""

import re
import sys
from pathlib import Path

import pytest
import torch
from architectures import build
from conftest import make_llama, make_rows, make_tokenizer
from peft import BeftConfig, LoraConfig, get_peft_model
from rl_trainers import make, make_reward_model
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, Trainer, TrainingArguments

from beft_trl import BeftSFTTrainer, BeftTrainer, BeftTrainingArguments, find_bias_sites


def test_arguments_by_position_are_those_of_sft_trainer(make_config):
    tokenizer, rows, held_out = make_tokenizer(), make_rows(16), make_rows(8, seed=1)
    trainer = BeftSFTTrainer(make_llama(), make_config(), None, rows, held_out, tokenizer)
    assert trainer.processing_class is tokenizer
    assert len(trainer.train_dataset) == 16 and len(trainer.eval_dataset) == 8


def test_a_path_is_a_name(make_trainer, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    for model in (str(tmp_path / "base"), tmp_path / "base"):
        assert isinstance(model, (str, Path))
        make_trainer(model, bias_term="value").train()


def test_an_optimizer_with_a_rate_of_its_own_scores_too(make_trainer):
    """Its rate is set aside in the scoring pass, which measures gradients at none."""
    plain = make_trainer(make_llama(), optim="sgd", learning_rate=0.05)
    own = make_trainer(make_llama(), trainer={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05})})
    plain.train()
    own.train()
    assert own.bias_scores.terms == plain.bias_scores.terms
    found, expected = own.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("args", [TrainingArguments, None])
def test_arguments_without_a_bias_term_are_a_type_error(args, tmp_path):
    given = args(str(tmp_path), use_cpu=True) if args else "out"
    with pytest.raises(TypeError, match=type(given).__name__):
        BeftSFTTrainer(make_llama(), given, train_dataset=make_rows(), processing_class=make_tokenizer())


def test_a_function_that_makes_models_is_a_type_error(tmp_path):
    args = BeftTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="model_init"):
        BeftTrainer(make_llama(), args, model_init=make_llama)


def test_an_argument_that_no_trainer_takes_is_a_type_error(make_trainer):
    with pytest.raises(TypeError, match="nonsense"):
        make_trainer(trainer={"nonsense": 1})


INJECTED = {
    "LoRA": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "BEFT": BeftConfig(target_modules=["v_proj"]),
}


@pytest.mark.parametrize("kind", INJECTED)
def test_a_base_with_an_adapter_injected_is_refused(make_trainer, kind):
    """`add_adapter` leaves the model's class as it is, so that only its layers tell."""
    model = make_llama()
    model.add_adapter(INJECTED[kind])
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(model)


def test_a_beft_model_over_an_injected_adapter_is_refused(make_trainer):
    model = make_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name="other")
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_trainer(get_peft_model(model, BeftConfig(target_modules=["v_proj"])))


@pytest.mark.parametrize("settings", [{"learning_rate": 1e-2}, {"relative_learning_rate": 0.1}])
def test_weight_decay_acts_on_the_biases(make_trainer, settings):
    """Each step of AdamW takes rate x decay of what stands there, next to its own step."""
    runs = {}
    for decay in (0.0, 0.5):
        trainer = make_trainer(
            make_llama(), bias_term="value", weight_decay=decay, max_steps=2, lr_scheduler_type="constant", **settings
        )
        trainer.train()
        runs[decay] = trainer
    rates = runs[0.5].learning_rates
    for site in find_bias_sites(make_llama()):
        if site.term == "value":
            name = f"base_model.model.{site.module}.beft_bias.default"
            rate = rates.get(site.module, 1e-2)
            plain, decayed = (runs[decay].model.state_dict()[name] for decay in (0.0, 0.5))
            # After the first step, from zero, both are equal: one step of Adam is the rate times a sign.
            first = rate * torch.sign(plain)
            shrunk = plain - decayed
            assert torch.allclose(shrunk.abs(), (rate * 0.5 * first).abs(), rtol=0.05, atol=1e-3 * rate)


OUT_OF_RANGE = {
    "max_length": [-1, 0, 1, 2.5, "64", True],
    "per_device_train_batch_size": [0, -1, 1.5],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0, -2],
    "pad_to_multiple_of": [0],
    "max_steps": [0, -5, 2.5],
    "learning_rate": [-1e-3, float("nan"), float("inf"), "1e-3"],
    "score_learning_rate": [float("inf")],
    "relative_learning_rate": [float("inf")],
    "weight_decay": [-0.1],
    "neftune_noise_alpha": [-1],
    "label_smoothing_factor": [1.5, -0.1],
    "lr_scheduler_kwargs": ["text"],
    "gradient_checkpointing_kwargs": ["text", [1]],
    "log_level": ["loud"],
    "eval_packing": [True],  # without packing
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_value_with_which_no_run_makes_sense_is_refused_by_name(make_config, name, value):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}"):
        make_config(**{name: value})


def test_a_push_without_a_hub_or_a_token_is_refused_before_weights_are_loaded(make_trainer, tmp_path, monkeypatch):
    make_llama().config.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        make_trainer(base, push_to_hub=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "no file")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="token"):
        make_trainer(base, push_to_hub=True)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("task", [BertForMaskedLM, BertForSequenceClassification])
def test_an_encoder_is_refused_by_its_class(make_trainer, tmp_path, task, named):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    task(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=task.__name__):
        make_trainer(str(tmp_path / "base") if named else task.from_pretrained(tmp_path / "base"))


@pytest.mark.parametrize("epochs", [0, -1, float("inf"), float("nan")])
def test_epochs_that_train_nothing_are_refused(make_config, epochs):
    with pytest.raises(ValueError, match="num_train_epochs="):
        make_config(max_steps=-1, num_train_epochs=epochs)


def test_the_old_name_of_dtype_is_taken(make_config, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    config = make_config(model_init_kwargs={"torch_dtype": "bfloat16"}, bias_term="value")
    trainer = BeftSFTTrainer(
        str(tmp_path / "base"), config, train_dataset=make_rows(), processing_class=make_tokenizer()
    )
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torch_dtype"):
        make_config(model_init_kwargs={"torch_dtype": "bfloat16", "dtype": "float32"})


def test_the_loss_is_looked_at_once_for_each_optimizer_step(make_trainer, monkeypatch):
    """Each look waits for the device."""
    trainer = make_trainer(
        make_llama(), bias_term="value", max_steps=2, gradient_accumulation_steps=4, per_device_train_batch_size=2
    )
    assert trainer.args.logging_nan_inf_filter is False  # Transformers' own look, at each batch
    looks, batches = [], []
    item, training_step = torch.Tensor.item, Trainer.training_step

    def noted(tensor):
        looks.append(sys._getframe(1).f_globals["__name__"])
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", noted)
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *call, **kw: batches.append(call) or training_step(self, *call, **kw)
    )
    trainer.train()
    assert len(batches) == 8
    assert looks.count("beft_trl.mixin") == 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "reward"])
def test_a_base_whose_trainer_is_refused_late_is_as_it_was(make_trainer, tmp_path, kind):
    """Late: after the deltas are in it. It can be given to another trainer."""

    def trainer(**settings):
        if kind == "reward":
            return make("reward", tmp_path / "out", model, settings=settings)
        return make_trainer(model, **settings)

    model = make_reward_model() if kind == "reward" else build("gpt2") if kind == "gpt2" else make_llama()
    kinds = {name: type(module) for name, module in model.named_modules()}
    values = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match="no frozen layers"):
        trainer(cache_frozen_layers=True, bias_layers="all")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(each, values[name]) for name, each in model.state_dict().items())
    trainer(bias_layers="all", max_steps=2).train()
