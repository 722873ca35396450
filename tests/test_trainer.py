"""What a trainer trains and saves, by itself and after a scoring pass."""

import json

import pytest
import torch
from conftest import full_batch, losses, make_llama, make_opt, make_rows, make_tokenizer, tensors
from peft import PeftModel
from processes import python
from safetensors.torch import load_file
from transformers import Trainer

from beft_trl import BeftSFTTrainer, BeftTrainerMixin
from beft_trl.report import learning_curve
from beft_trl.tuner import delta


@pytest.mark.parametrize("make_model", [make_opt, make_llama])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_phase_two_is_bit_equal_to_a_run_with_the_term_given(make_trainer, make_model, settings):
    auto = make_trainer(make_model(), **settings)
    auto.train()
    given = make_trainer(make_model(), bias_term=auto.selected_bias_term, **settings)
    given.train()
    assert losses(auto) == losses(given)
    found, expected = tensors(auto.model), tensors(given.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    metrics = ("loss", "grad_norm", "num_tokens", "entropy", "epoch", "step")
    assert [[entry.get(name) for name in metrics] for entry in auto.state.log_history if "loss" in entry] == [
        [entry.get(name) for name in metrics] for entry in given.state.log_history if "loss" in entry
    ]


@pytest.mark.parametrize("bias_term", ["auto", "value", "all"])
def test_only_the_chosen_deltas_change(make_trainer, bias_term):
    trainer = make_trainer(make_opt(), bias_term=bias_term)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    chosen = {"all": ("q_proj", "v_proj")}.get(bias_term) or (
        {"query": "q_proj", "value": "v_proj"}[trainer.selected_bias_term],
    )
    moved = [name for name, tensor in after.items() if "beft_bias" in name and tensor.any()]
    assert len(moved) == 2 * len(chosen)
    assert all(any(projection in name for projection in chosen) for name in moved)
    base_weights = [name for name in after if "beft_bias" not in name]
    assert len(base_weights) > 30
    for name in base_weights:
        # A projection that lost its delta is no longer wrapped, so its weights go by their plain name.
        old = before[name] if name in before else before[name.replace("_proj.", "_proj.base_layer.")]
        assert torch.equal(after[name], old), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_train_in_fp32(make_trainer, dtype):
    trainer = make_trainer(make_llama().to(dtype), bias_term="value")
    trainer.train()
    assert trainer.model.dtype == dtype
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    state = trainer.optimizer.optimizer.state
    assert {values["exp_avg"].dtype for values in state.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_files(make_trainer, tmp_path):
    for name in ("first", "second"):
        trainer = make_trainer(make_llama(), output_dir=str(tmp_path / name))
        trainer.train()
        trainer.save_model()
    files = (
        "beft_scores.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "beft_scores.png",
        "beft_curve.png",
    )
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_output_folder_and_its_adapter_in_a_process_without_this_package(make_trainer, tmp_path):
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    trainer = make_trainer(str(base))
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    described = {"beft_scores.json", "beft_scores.png", "beft_curve.png", "README.md"}
    assert {"adapter_config.json", "adapter_model.safetensors"} | described <= {path.name for path in out.iterdir()}
    assert (out / "adapter_model.safetensors").stat().st_mode == (out / "README.md").stat().st_mode
    saved = load_file(out / "adapter_model.safetensors")
    projection = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[trainer.selected_bias_term]
    assert set(saved) == {
        f"base_model.model.model.layers.{layer}.self_attn.{projection}.beft_bias" for layer in (0, 1)
    }
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "BEFT" and config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == [f"model.layers.{layer}.self_attn.{projection}" for layer in (0, 1)]

    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "plain = base(input_ids=torch.arange(2, 12)[None]).logits\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2])\n"
        "logits = model(input_ids=torch.arange(2, 12)[None]).logits\n"
        "assert 'beft_trl' not in sys.modules\n"
        "assert not torch.equal(plain, logits)\n"
        "torch.save(logits.detach(), sys.argv[3])\n"
    )
    run = python("-c", program, base, out, tmp_path / "logits.pt", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    trainer.model.eval()
    logits = trainer.model(input_ids=torch.arange(2, 12)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_training_goes_on_from_a_second_train_call(make_trainer):
    trainer = make_trainer(make_llama())
    trainer.train()
    scores, first = trainer.bias_scores, tensors(trainer.model)
    trainer.train()
    assert trainer.bias_scores is scores
    second = tensors(trainer.model)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_plain_trainer_takes_the_mixin(make_config):
    class BeftTrainer(BeftTrainerMixin, Trainer):
        pass

    batch = full_batch(make_tokenizer(), make_rows(16))
    rows = [{name: values[index] for name, values in batch.items()} for index in range(16)]
    trainer = BeftTrainer(make_llama(), make_config(), train_dataset=rows)
    assert {site.term for site in trainer.trained_sites} == {"query", "key", "value"}
    trainer.train()
    assert {site.term for site in trainer.trained_sites} == {trainer.selected_bias_term}
    assert all(delta(trainer.model, site).any() for site in trainer.trained_sites)


def test_an_explicit_term_is_recorded_without_scores(make_trainer, tmp_path):
    trainer = make_trainer(make_llama(), bias_term="query")
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "beft_scores.json").read_text())
    assert record["selected"] == "query" and record["ranking"] == [] and record["method"] is None
    assert not (tmp_path / "out" / "beft_scores.png").exists()


def test_the_learning_curve_is_that_of_the_run_and_not_in_its_checkpoints(make_trainer, tmp_path):
    out, card = tmp_path / "out", tmp_path / "out" / "README.md"
    trainer = make_trainer(make_llama(), save_strategy="steps", save_steps=3)
    trainer.train()
    assert {path.name for path in out.rglob("*.png")} == {"beft_scores.png"}  # only in the checkpoints
    assert "beft_curve.png" not in card.read_text()
    trainer.save_model()
    losses = [{"loss": entry["loss"], "step": entry["step"]} for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert (out / "beft_curve.png").read_bytes() == learning_curve(losses, "nats per token")
    assert "beft_curve.png" in card.read_text()
    trainer.create_model_card()  # as a push to the hub writes it
    assert "beft_curve.png" in card.read_text()

    again = make_trainer(make_llama(), bias_term=trainer.selected_bias_term, logging_steps=6)
    again.train()
    again.save_model()
    assert not list(out.glob("*.png")) and ".png" not in card.read_text()


def test_a_model_name_and_a_loaded_model_train_the_same(make_trainer, tmp_path):
    make_opt().save_pretrained(tmp_path / "base")
    by_name = make_trainer(str(tmp_path / "base"), output_dir=str(tmp_path / "a"))
    by_name.train()
    loaded = make_trainer(make_opt(), output_dir=str(tmp_path / "b"))
    loaded.train()
    assert isinstance(by_name, BeftSFTTrainer)
    assert losses(by_name) == losses(loaded)


def test_a_model_with_a_beft_adapter_goes_on_training_it(make_trainer, tmp_path):
    first = make_trainer(make_llama())
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapted = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    second = make_trainer(adapted, output_dir=str(tmp_path / "second"), learning_rate=1e-4, max_steps=2)
    second.train()
    assert second.selected_bias_term == first.selected_bias_term
    assert second.bias_scores.method is None
    second.save_model()
    after = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, values in after.items():
        assert 0 < (values - before[name]).abs().max() <= 2.1e-4
    other = next(term for term in ("query", "key", "value") if term != first.selected_bias_term)
    third = make_trainer(PeftModel.from_pretrained(make_llama(), tmp_path / "adapter"), bias_term=other)
    with pytest.raises(ValueError, match=f"{first.selected_bias_term} .*bias_term='{other}'"):
        third.train()
    relative = make_trainer(
        PeftModel.from_pretrained(make_llama(), tmp_path / "adapter"), relative_learning_rate=0.03, max_steps=1,
        score_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    relative.train()  # from the trained values, at the rates of their layers
    relative.save_model(str(tmp_path / "relative"))
    for key, values in load_file(tmp_path / "relative" / "adapter_model.safetensors").items():
        rate = relative.learning_rates[key.removeprefix("base_model.model.").removesuffix(".beft_bias")]
        assert (values - before[key]).abs().max().item() == pytest.approx(rate, rel=1e-3)
