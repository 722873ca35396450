"""How fast and how long a run learns, if its settings do not say."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import full_batch, make_llama, make_rows, make_tokenizer, tensors

from beft_trl import BeftSFTConfig, BeftSFTTrainer, find_bias_sites
from beft_trl.config import enough_steps


@pytest.fixture
def make(tmp_path):
    def make(rows=20, trainer=None, **settings):
        args = BeftSFTConfig(
            str(tmp_path / "out"), bias_term="value", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, save_strategy="no", **settings,
        )  # fmt: skip
        return BeftSFTTrainer(
            make_llama(), args, train_dataset=make_rows(rows), processing_class=make_tokenizer(), **(trainer or {})
        )

    return make


def test_without_a_rate_each_layer_learns_at_a_twentieth_of_the_size_of_its_outputs(make):
    plain = make(max_steps=2)
    plain.train()
    given = make(max_steps=2, relative_learning_rate=0.05)
    given.train()
    assert plain.learning_rates and plain.learning_rates == given.learning_rates
    assert {group["lr"] for group in plain.optimizer.param_groups} == {0.0}  # the end of the schedule
    assert {group["initial_lr"] for group in plain.optimizer.param_groups} == set(plain.learning_rates.values())


def test_a_learning_rate_is_one_for_all_layers(make):
    trainer = make(max_steps=2, learning_rate=0.01)
    trainer.train()
    assert not trainer.learning_rates
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.01] * len(
        trainer.optimizer.param_groups
    )


def test_both_rates_exclude_each_other(make):
    with pytest.raises(ValueError, match=r"learning_rate=0.01 .*relative_learning_rate=0.03"):
        make(learning_rate=0.01, relative_learning_rate=0.03)


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0.01}, {"relative_learning_rate": 0.03}])
def test_settings_can_be_replaced(make, settings):
    """Which makes them anew, from what they have become."""
    args = make(**settings).args
    again = dataclasses.replace(args, seed=7)
    for name in ("learning_rate", "relative_learning_rate", "num_train_epochs", "max_steps"):
        assert getattr(again, name) == getattr(args, name)


def test_an_optimizer_with_a_rate_of_its_own_needs_that_of_the_settings_too(make):
    optimizer = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05})}
    with pytest.raises(ValueError, match=r"lr=0.05"):
        make(trainer=optimizer)
    trainer = make(trainer=optimizer, learning_rate=0.05, max_steps=2)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.05


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation"), [(20, 2, 1), (20, 4, 2), (7, 2, 1), (1000, 2, 1), (1000, 8, 4)]
)
def test_without_a_length_a_run_has_the_fewest_epochs_with_enough_steps(make, rows, batch, accumulation):
    trainer = make(rows, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    epochs = trainer.args.num_train_epochs
    steps = math.ceil(rows / (batch * accumulation))
    assert epochs == int(epochs) and epochs * steps >= enough_steps(rows) > (epochs - 1) * steps


@pytest.mark.parametrize(("given", "epochs", "steps"), [({"num_train_epochs": 2}, 2, -1), ({"max_steps": 9}, 3, 9)])
def test_a_length_that_is_given_is_taken_with_a_warning_of_too_few_steps(make, given, epochs, steps, caplog):
    args = make(**given).args
    assert (args.num_train_epochs, args.max_steps) == (epochs, steps)
    assert f"{20 if steps < 0 else steps} optimizer steps" in caplog.text
    assert str(enough_steps(20)) in caplog.text


def test_no_warning_of_enough(make, caplog):
    make(num_train_epochs=30)
    assert "optimizer steps" not in caplog.text


@pytest.mark.parametrize("bias_term", ["value", "auto", "all"])
def test_a_relative_learning_rate_is_that_share_of_the_size_of_the_outputs(make_trainer, bias_term):
    """Adam's first step moves every element by its learning rate."""
    rows = make_rows(8)
    trainer = make_trainer(
        make_llama(), rows, bias_term=bias_term, relative_learning_rate=0.03, max_steps=1, score_steps=1,
        per_device_train_batch_size=8, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()

    batch = full_batch(make_tokenizer(), rows)
    real = batch["attention_mask"].bool()
    model = make_llama()
    moved = 0
    for site in find_bias_sites(model):
        outputs = []
        keep = outputs.append
        hook = model.get_submodule(site.module).register_forward_hook(lambda *call, keep=keep: keep(call[-1].detach()))
        model(**batch)
        hook.remove()
        delta = tensors(trainer.model).get(f"base_model.model.{site.module}.beft_bias.default")
        if delta is not None:
            moved += 1
            size = outputs[0][real].double().square().mean().sqrt().item()
            assert delta.abs().max().item() == pytest.approx(0.03 * size, rel=1e-3)
    assert moved == (6 if bias_term == "all" else 2)
    rates = trainer.learning_rates.values()
    logged = trainer.state.log_history[-2]
    assert logged["learning_rate"] == pytest.approx(np.median(list(rates)))
    assert (logged["learning_rate_min"], logged["learning_rate_max"]) == pytest.approx((min(rates), max(rates)))
    assert all(group["params"] for group in trainer.optimizer.param_groups)


def test_a_relative_learning_rate_leaves_the_scores_as_they_are(make_trainer):
    plain, relative = (make_trainer(relative_learning_rate=rate) for rate in (None, 0.03))
    plain.train()
    relative.train()
    assert relative.bias_scores == plain.bias_scores
    assert len(relative.learning_rates) == 2 and not plain.learning_rates
