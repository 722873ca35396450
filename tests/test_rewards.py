"""Reward models: their head is trained and saved next to the bias."""

import pytest
import torch
from conftest import make_llama
from peft import PeftModel
from rl_trainers import BATCH, EIGHT_BITS, make, make_reward_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_reward_model_is_saved_with_its_head(by_name, tmp_path):
    make_reward_model().save_pretrained(tmp_path / "base")
    trainer = make("reward", tmp_path / "out", str(tmp_path / "base") if by_name else make_reward_model())
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved and len(saved) == 3
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert not torch.equal(saved["base_model.model.score.weight"], base.score.weight)
    with torch.inference_mode():
        trained = trainer.model.eval()(**BATCH).logits
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "out")(**BATCH).logits, trained)


def test_a_reward_head_in_16_bits_is_refused_before_weights_are_loaded(tmp_path):
    make_reward_model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"\bscore\b.*torch.bfloat16.*dtype=torch.float32"):
        make("reward", tmp_path / "out", str(tmp_path / "base"), settings={"model_init_kwargs": {"dtype": "bfloat16"}})


def test_a_reward_head_on_a_quantised_base_begins_as_it_was_loaded_and_learns_in_fp32(tmp_path):
    """TRL casts what a quantised model trains to bf16."""
    make_reward_model().save_pretrained(tmp_path / "base")
    quantised = {"quantization_config": EIGHT_BITS, "dtype": "float32"}
    trainer = make("reward", tmp_path / "out", str(tmp_path / "base"), settings={"model_init_kwargs": quantised})
    head = trainer.model.get_parameter("base_model.model.score.modules_to_save.default.weight")
    assert torch.equal(head, make_reward_model().score.weight)
    trainer.train()
    assert head.dtype == torch.float32 and not torch.equal(head, make_reward_model().score.weight)


def test_a_causal_model_becomes_a_reward_model_by_its_name(tmp_path):
    """As RewardTrainer does: the head is new, and trained."""
    make_llama().save_pretrained(tmp_path / "base")
    trainer = make("reward", tmp_path / "out", str(tmp_path / "base"))
    trainer.train()
    trainer.save_model()
    assert trainer.model.peft_config["default"].task_type == "SEQ_CLS"
    assert "base_model.model.score.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
