"""What preference and reinforcement learning train and save with one bias."""

import math
from statistics import fmean

import pytest
import torch
from conftest import make_llama, make_tokenizer
from peft import PeftModel
from rl_trainers import BATCH, CAUSAL, EIGHT_BITS, make, pairs
from safetensors.torch import load_file
from transformers import (
    LlamaForCausalLM,
)
from trl import RewardConfig

from beft_trl import (
    BeftDPOConfig,
    BeftDPOTrainer,
    BeftGRPOConfig,
    BeftKTOConfig,
    BeftRewardConfig,
    BeftRLOOConfig,
)


@pytest.mark.parametrize(
    ("kind", "by_name"), [("DPO", True), ("KTO", False), ("GRPO", False), ("GRPO", True), ("RLOO", False)]
)
def test_scored_trained_and_saved_under_the_right_names(kind, by_name, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = str(tmp_path / "base") if by_name else make_llama()
    loading = {"dtype": "float32"} if by_name else None
    trainer = make(kind, tmp_path / "out", model, settings={"bias_term": "auto", "model_init_kwargs": loading})
    trainer.train()
    trainer.save_model()
    assert trainer.selected_bias_term == trainer.bias_scores.ranking[0]
    assert len(trainer.bias_scores.ranking) == 3
    assert trainer.ref_model is None
    assert not (tmp_path / "out" / "ref").exists()
    projection = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[trainer.selected_bias_term]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.model.layers.{layer}.self_attn.{projection}.beft_bias" for layer in (0, 1)
    }
    reloaded = PeftModel.from_pretrained(make_llama(), tmp_path / "out")
    with torch.inference_mode():
        trained = trainer.model.eval()(**BATCH).logits
        assert torch.equal(reloaded(**BATCH).logits, trained)
        assert not torch.equal(make_llama()(**BATCH).logits, trained)


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_run_after_a_scoring_pass_is_that_of_a_run_with_the_term_given(kind, tmp_path):
    """Generation among it: the same random numbers, prompts and counters."""
    auto = make(kind, tmp_path / "auto", settings={"bias_term": "auto"})
    auto.train()
    given = make(kind, tmp_path / "given", settings={"bias_term": auto.selected_bias_term})
    given.train()
    found, expected = auto.model.state_dict(), given.model.state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    timed = ("time", "runtime", "per_second")
    logs = [
        [
            {key: value for key, value in entry.items() if not any(word in key for word in timed)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        for trainer in (auto, given)
    ]
    assert str(logs[0]) == str(logs[1])  # as text, for the NaN among them


def test_another_reference_is_the_one_that_counts(tmp_path):
    """The first loss by hand: the model is the base, and the reference is another model."""
    rows = pairs().select(range(4))
    trainer = make("DPO", tmp_path, rows=rows, settings={"max_steps": 1, "beta": 0.5}, ref_model=make_llama(seed=5))
    trainer.train()
    tokenizer, margins = make_tokenizer(), []
    for row in rows:
        margin = 0.0
        for sign, answer in ((1, row["chosen"]), (-1, row["rejected"])):
            prompt = tokenizer(row["prompt"])["input_ids"]
            tokens = torch.tensor([[*tokenizer(row["prompt"] + answer)["input_ids"], tokenizer.eos_token_id]])
            for model, share in ((make_llama(), 1), (make_llama(seed=5), -1)):
                with torch.inference_mode():
                    found = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
                likely = found.gather(1, tokens[0, 1:, None]).squeeze(1)[len(prompt) - 1 :]
                margin += sign * share * likely.sum()
        margins.append(0.5 * margin)
    expected = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean().item()
    assert next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry) == pytest.approx(expected)


@pytest.mark.parametrize("precomputed", [False, True])
def test_an_adapter_that_goes_on_is_its_own_reference_and_only_it_is_saved(tmp_path, precomputed):
    """TRL copies it to an adapter named "ref", which is no part of what is saved."""
    first = make("DPO", tmp_path / "first")
    first.train()
    first.save_model()
    adapted = PeftModel.from_pretrained(make_llama(), tmp_path / "first")
    second = make("DPO", tmp_path / "second", adapted, settings={"precompute_ref_log_probs": precomputed})
    second.train()
    second.save_model()
    assert not (tmp_path / "second" / "ref").exists()
    assert [entry["loss"] for entry in second.state.log_history if "loss" in entry][0] == pytest.approx(math.log(2))
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_preference_training_learns_what_is_preferred(tmp_path):
    """The reference model is the base without the deltas, so that the first loss is that of equal models, ln 2."""
    settings = {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 3e-2, "beta": 1.0}
    trainer = make("DPO", tmp_path, settings=settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert fmean(losses[-4:]) < 0.9 * losses[0]


def test_an_adapter_on_a_quantised_base_goes_on_from_what_was_saved(tmp_path):
    """TRL casts what a quantised model trains to bf16."""
    make_llama().save_pretrained(tmp_path / "base")
    first = make("DPO", tmp_path / "first")
    first.train()
    first.save_model()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=EIGHT_BITS, dtype=torch.float32)
    second = make("DPO", tmp_path / "second", PeftModel.from_pretrained(base, tmp_path / "first"))
    for name, values in load_file(tmp_path / "first" / "adapter_model.safetensors").items():
        assert torch.equal(second.model.get_parameter(f"{name}.default"), values)


def test_defaults_suit_biases_and_the_reward_head_keeps_its_own(tmp_path):
    for config in (BeftDPOConfig, BeftKTOConfig, BeftGRPOConfig, BeftRLOOConfig):
        args = config(str(tmp_path), use_cpu=True)
        assert args.relative_learning_rate == 0.05 and not args.bf16
        with pytest.raises(ValueError, match="learning_rate=0.001.*relative_learning_rate=0.05"):
            config(str(tmp_path), use_cpu=True, learning_rate=1e-3, relative_learning_rate=0.05)
    assert BeftGRPOConfig(str(tmp_path), use_cpu=True).bias_term == "value"
    rewards = BeftRewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    plain = RewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (rewards.learning_rate, rewards.relative_learning_rate) == (plain.learning_rate, 0.05)


def test_a_run_without_a_configuration_is_named_after_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("base")
    trainer = BeftDPOTrainer("base", train_dataset=pairs(), processing_class=make_tokenizer())
    assert trainer.args.output_dir == "base-BEFT" and isinstance(trainer.args, BeftDPOConfig)
