"""Preference, reward and reinforcement learning with one bias."""

import math
import runpy
import shutil
import sys
from pathlib import Path
from statistics import fmean

import architectures
import pytest
import torch
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    set_seed,
)
from trl import RewardConfig
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from beft_trl import (
    BeftDPOConfig,
    BeftDPOTrainer,
    BeftGRPOConfig,
    BeftGRPOTrainer,
    BeftKTOConfig,
    BeftKTOTrainer,
    BeftRewardConfig,
    BeftRewardTrainer,
    BeftRLOOConfig,
    BeftRLOOTrainer,
)
from beft_trl.compat.rollouts import send_only_biases


EXAMPLES = Path(__file__).parents[1] / "examples"
COMMON = {
    "max_steps": 4, "score_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False,
    "bias_layers": "all", "bias_term": "auto",
    "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2,
    "relative_learning_rate": None, "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip


def pairs():
    rows = [{**row, "chosen": row["completion"], "rejected": " w50 w51"} for row in make_rows(32)]
    return Dataset.from_list(rows).remove_columns("completion")


def marked():
    return Dataset.from_list([{**row, "label": number % 2 == 0} for number, row in enumerate(make_rows(32))])


def prompts():
    return make_rows(16).remove_columns("completion")


def short_answers(completions, **columns):
    """A reward that differs within each group."""
    return [float(len(set(text.split()))) for text in completions]


def make_dpo(model, folder, **settings):
    return BeftDPOTrainer(
        model, args=BeftDPOConfig(str(folder), **(COMMON | settings)), train_dataset=pairs(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_kto(model, folder, **settings):
    return BeftKTOTrainer(
        model, args=BeftKTOConfig(str(folder), **(COMMON | settings)), train_dataset=marked(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_online(trainer, config, model, folder, **settings):
    sizes = {"num_generations": 2, "max_completion_length": 6}
    return trainer(
        model, short_answers, args=config(str(folder), **(COMMON | sizes | settings)), train_dataset=prompts(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def make_grpo(model, folder, **settings):
    return make_online(BeftGRPOTrainer, BeftGRPOConfig, model, folder, **({"beta": 0.1} | settings))


def make_rloo(model, folder, **settings):
    return make_online(BeftRLOOTrainer, BeftRLOOConfig, model, folder, **({"beta": 0.1} | settings))


def make_reward(model, folder, **settings):
    return BeftRewardTrainer(
        model, args=BeftRewardConfig(str(folder), **(COMMON | settings)), train_dataset=pairs(),
        processing_class=make_tokenizer(),
    )  # fmt: skip


TRAINERS = {"DPO": make_dpo, "KTO": make_kto, "GRPO": make_grpo, "RLOO": make_rloo}
TURN = {"role": "assistant", "content": "w1"}
BATCH = {"input_ids": torch.tensor([[5, 6, 7]])}


@pytest.mark.parametrize(
    ("kind", "by_name"), [("DPO", True), ("KTO", False), ("GRPO", False), ("GRPO", True), ("RLOO", False)]
)
def test_scored_trained_and_saved_under_the_right_names(kind, by_name, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = str(tmp_path / "base") if by_name else make_llama()
    trainer = TRAINERS[kind](model, tmp_path / "out", model_init_kwargs={"dtype": "float32"} if by_name else None)
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


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_run_after_a_scoring_pass_is_that_of_a_run_with_the_term_given(kind, tmp_path):
    """Generation among it: the same random numbers, prompts and counters."""
    auto = TRAINERS[kind](make_llama(), tmp_path / "auto")
    auto.train()
    given = TRAINERS[kind](make_llama(), tmp_path / "given", bias_term=auto.selected_bias_term)
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


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_only_learnt_tokens_count_for_the_size_of_the_outputs(kind, tmp_path, monkeypatch):
    """The mean over what the loss sees, by hand: prompts and completions, and no token of the generation."""
    trainer = TRAINERS[kind](make_llama(), tmp_path / "out", score_steps=1, max_steps=1)
    path = "model.layers.0.self_attn.v_proj"
    sizes = []
    compute_loss = type(trainer).compute_loss

    def note(self, model, inputs, *others, **kwargs):
        if not sizes:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            plain, outputs = make_llama(), []
            plain.get_submodule(path).register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
            plain(input_ids=ids, attention_mask=mask)
            sizes.append(outputs[0][mask.bool()].square().mean().sqrt().item())
        return compute_loss(self, model, inputs, *others, **kwargs)

    monkeypatch.setattr(type(trainer), "compute_loss", note)
    # One step of Adam moves every number by the rate, so that the anchor's length follows from the importance.
    scores = trainer.score()
    site = next(layer for layer in scores.terms["value"].layers if layer.layer == 0)
    assert scores.anchor == "activation" and site.importance > 0
    trainer = TRAINERS[kind](
        make_llama(),
        tmp_path / "relative",
        score_steps=1,
        max_steps=1,
        bias_term="value",
        learning_rate=None,
        relative_learning_rate=0.1,
    )
    trainer.train()
    assert trainer.learning_rates[path] == pytest.approx(0.1 * sizes[0], rel=1e-4)


GIVEN = {
    "DPO": (BeftDPOTrainer, BeftDPOConfig, pairs), "KTO": (BeftKTOTrainer, BeftKTOConfig, marked),
    "reward": (BeftRewardTrainer, BeftRewardConfig, pairs), "GRPO": (BeftGRPOTrainer, BeftGRPOConfig, prompts),
}  # fmt: skip


def make(kind, folder, model=None, rows=None, tokenizer=None, settings=None, **given):
    """A trainer with anything of it replaced."""
    trainer, config, own_rows = GIVEN[kind]
    if kind == "GRPO":
        given = {"reward_funcs": short_answers, **given}
        settings = {"num_generations": 2, "max_completion_length": 6, **(settings or {})}
    if model is None:
        model = make_reward_model() if kind == "reward" else make_llama()
    return trainer(
        model, args=config(str(folder), **COMMON | {"bias_term": "value"} | (settings or {})),
        train_dataset=own_rows() if rows is None else rows, processing_class=tokenizer or make_tokenizer(), **given,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_references_that_are_none_are_refused(kind, tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        make(kind, tmp_path, model, ref_model=model)
    with pytest.raises(TypeError, match="ref_model must be a loaded model, got 'base'"):
        make(kind, tmp_path, ref_model="base")
    adapted = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="ref_model has an adapter.*Merge it"):
        make(kind, tmp_path, ref_model=adapted)
    with pytest.raises(ValueError, match="Leave sync_ref_model out"):
        make(kind, tmp_path, settings={"sync_ref_model": True})


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


WRONG_ROWS = {
    "columns": ({"text": "w1 w2"}, "found text. Needed: '"),
    "missing": ({"prompt": "w1", "chosen": None, "rejected": " w3", "completion": None, "label": True}, "is missing"),
    "numbers": ({"prompt": 1, "chosen": 2, "rejected": 3, "completion": 2, "label": True}, "'prompt' is 1"),
    "turns": (
        {"prompt": "w1", "chosen": [TURN], "rejected": [TURN], "completion": [TURN], "label": True},
        "'prompt' is text.* turns",
    ),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("wrong", [*WRONG_ROWS, "none"])
def test_rows_of_a_wrong_kind_are_named(kind, wrong, tmp_path):
    if kind == "GRPO" and wrong in ("missing", "turns"):
        return  # it learns from prompts only
    row, message = WRONG_ROWS.get(wrong, ({}, "train_dataset is empty"))
    rows = Dataset.from_list([row] * 4) if row else GIVEN[kind][2]().select([])
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, rows=rows)


@pytest.mark.parametrize("label", [None, "yes", math.nan])
def test_labels_that_say_nothing_are_named(label, tmp_path):
    rows = Dataset.from_list([{**row, "label": label} for row in make_rows(4)])
    with pytest.raises(ValueError, match="Row 1 of train_dataset: 'label' is .*true .a desired answer. or false"):
        make("KTO", tmp_path, rows=rows)


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_warned_of(label, tmp_path, caplog):
    caplog.set_level("WARNING", logger="beft_trl")
    make("KTO", tmp_path, rows=Dataset.from_list([{**row, "label": label} for row in make_rows(4)]))
    assert any(f"All 4 rows of train_dataset have label={label}" in text for text in caplog.messages)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "reward"])
def test_tokens_that_the_model_does_not_have_are_named(kind, tmp_path):
    model = make_reward_model() if kind == "reward" else make_llama()
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="of the train dataset has .* in (prompt|chosen)_ids.* tokens 0 to 19"):
        make(kind, tmp_path, model)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_rows_beyond_the_positions_or_cut_off_are_named(kind, tmp_path):
    words = " ".join("w1" for _ in range(62))
    rows = Dataset.from_list([
        {"prompt": words, "chosen": " w2 w3", "rejected": " w3", "completion": " w2 w3", "label": index % 2 == 0}
        for index in range(4)
    ])  # fmt: skip
    with pytest.raises(ValueError, match="has 65 tokens, and the model has 64 positions.*max_length to at most 64"):
        make(kind, tmp_path, make_opt(), rows)
    make(kind, tmp_path, make_opt(), rows, settings={"max_length": 64})
    with pytest.raises(ValueError, match="No row of the train dataset is left within max_length=62"):
        make(kind, tmp_path, make_opt(), rows, settings={"max_length": 62})


@pytest.mark.parametrize("kind", GIVEN)
def test_a_tokenizer_that_can_end_nothing_is_refused(kind, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        make(kind, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_a_model_that_generates_no_text_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="does not generate text"):
        make(kind, tmp_path, architectures.build("bert"))


def async_of(values):
    async def reward(completions, **columns):
        return values

    return reward


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("values", [None, 1.0, ["good"] * 4, [[1.0]] * 4, [1.0, math.inf, 0.0, 0.0]], ids=str)
def test_rewards_of_a_wrong_kind_are_named(values, asynchronous, tmp_path):
    def reward(completions, **columns):
        return values

    trainer = make("GRPO", tmp_path, reward_funcs=[async_of(values) if asynchronous else reward])
    with pytest.raises((TypeError, ValueError), match="The reward function reward returned .*one finite number"):
        trainer.train()


@pytest.mark.parametrize("given", [3, [short_answers, 3], (short_answers,), [None]], ids=str)
def test_what_gives_no_reward_is_refused(given, tmp_path):
    with pytest.raises(TypeError, match="reward_funcs has .*gives no reward. Give a function"):
        make("GRPO", tmp_path, reward_funcs=given)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_prompts_that_leave_no_position_for_an_answer_are_named(kind, turns, tmp_path):
    """OPT has 64 positions, answers have up to 6 tokens, and the template writes a word for the end of each turn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} w0 {% endfor %}"
    words = lambda count: " ".join(["w1"] * (count - turns))  # noqa: E731
    rows = [*[words(58)] * 4, words(59)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}] if turns else text} for text in rows])
    trainer, config = {"GRPO": (BeftGRPOTrainer, BeftGRPOConfig), "RLOO": (BeftRLOOTrainer, BeftRLOOConfig)}[kind]
    settings = COMMON | {"bias_term": "value", "num_generations": 2, "max_completion_length": 6, "max_steps": 1}

    def count(completions, **columns):
        return [float(number) for number in range(len(completions))]

    def make_with(rows):
        args = config(str(tmp_path), **settings)
        return trainer(make_opt(), count, args=args, train_dataset=rows, processing_class=tokenizer)

    message = "row 5 of the train dataset has 59 tokens.*max_completion_length=6.*65 in all.*64 positions"
    with pytest.raises(ValueError, match=message):
        make_with(rows)
    make_with(rows.select(range(4))).train()


def test_a_tied_head_is_not_cast(tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True.*tied"):
        make("GRPO", tmp_path, make_llama(tie_word_embeddings=True), settings={"cast_lm_head_to_fp32": True})


@pytest.mark.parametrize("precomputed", [False, True])
def test_an_adapter_that_goes_on_is_its_own_reference_and_is_saved_alone(tmp_path, precomputed):
    """TRL copies it to an adapter named "ref", which is no part of what is saved."""
    first = make_dpo(make_llama(), tmp_path / "first", bias_term="value")
    first.train()
    first.save_model()
    adapted = PeftModel.from_pretrained(make_llama(), tmp_path / "first")
    second = make_dpo(adapted, tmp_path / "second", bias_term="value", precompute_ref_log_probs=precomputed)
    second.train()
    second.save_model()
    assert not (tmp_path / "second" / "ref").exists()
    assert [entry["loss"] for entry in second.state.log_history if "loss" in entry][0] == pytest.approx(math.log(2))
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_preference_training_learns_what_is_preferred(tmp_path):
    """The reference model is the base without the deltas, so that the first loss is that of equal models, ln 2."""
    config = BeftDPOConfig(
        str(tmp_path),
        **COMMON | {"max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
        beta=1.0,
    )
    trainer = BeftDPOTrainer(make_llama(), config, train_dataset=pairs(), processing_class=make_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert fmean(losses[-4:]) < 0.9 * losses[0]


def make_reward_model():
    set_seed(0)
    config = make_llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_reward_model_is_saved_with_its_head(by_name, tmp_path):
    make_reward_model().save_pretrained(tmp_path / "base")
    trainer = make_reward(str(tmp_path / "base") if by_name else make_reward_model(), tmp_path / "out")
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
    with pytest.raises(ValueError, match="score of .* is in torch.bfloat16.*dtype=torch.float32"):
        make_reward(str(tmp_path / "base"), tmp_path / "out", model_init_kwargs={"dtype": "bfloat16"})


EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


def test_a_reward_head_on_a_quantised_base_begins_as_it_was_loaded_and_learns_in_fp32(tmp_path):
    """TRL casts what a quantised model trains to bf16."""
    make_reward_model().save_pretrained(tmp_path / "base")
    quantised = {"quantization_config": EIGHT_BITS, "dtype": "float32"}
    trainer = make_reward(str(tmp_path / "base"), tmp_path / "out", model_init_kwargs=quantised)
    head = trainer.model.get_parameter("base_model.model.score.modules_to_save.default.weight")
    assert torch.equal(head, make_reward_model().score.weight)
    trainer.train()
    assert head.dtype == torch.float32 and not torch.equal(head, make_reward_model().score.weight)


def test_an_adapter_on_a_quantised_base_goes_on_from_what_was_saved(tmp_path):
    """TRL casts what a quantised model trains to bf16."""
    make_llama().save_pretrained(tmp_path / "base")
    first = make_dpo(make_llama(), tmp_path / "first", bias_term="value")
    first.train()
    first.save_model()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=EIGHT_BITS, dtype=torch.float32)
    second = make_dpo(PeftModel.from_pretrained(base, tmp_path / "first"), tmp_path / "second", bias_term="value")
    for name, values in load_file(tmp_path / "first" / "adapter_model.safetensors").items():
        assert torch.equal(second.model.get_parameter(f"{name}.default"), values)


def test_a_causal_model_becomes_a_reward_model_by_its_name(tmp_path):
    """As RewardTrainer does: the head is new, and trained."""
    make_llama().save_pretrained(tmp_path / "base")
    trainer = make_reward(str(tmp_path / "base"), tmp_path / "out")
    trainer.train()
    trainer.save_model()
    assert trainer.model.peft_config["default"].task_type == "SEQ_CLS"
    assert "base_model.model.score.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")


def no_differences(completions, **columns):
    return [1.0] * len(completions)


def make_hopeless(folder, reward=no_differences, **settings):
    return BeftGRPOTrainer(
        make_llama(), reward, train_dataset=prompts(), processing_class=make_tokenizer(),
        args=BeftGRPOConfig(str(folder), **(COMMON | {"num_generations": 2, "max_completion_length": 6} | settings)),
    )  # fmt: skip


@pytest.mark.parametrize(("term", "error"), [("auto", ValueError), ("value", RuntimeError)])
def test_rewards_that_never_differ_are_named(tmp_path, term, error):
    with pytest.raises(error, match="rewards never differed among the completions of a prompt"):
        make_hopeless(tmp_path, bias_term=term).train()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_rewards_that_do_not_differ_for_long_are_warned_of(tmp_path, caplog):
    def late(completions, trainer_state, **columns):
        return [float(number % 2) * (trainer_state.global_step >= 10) for number in range(len(completions))]

    caplog.set_level("WARNING", logger="beft_trl")
    make_hopeless(tmp_path, late, bias_term="value", max_steps=12).train()
    assert sum("Nothing was learnt in 10 steps. The rewards never differed" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("steps", [0, 2])
def test_a_resumed_run_may_learn_nothing_more(steps, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "bias_term": "value"}
    first = make_hopeless(tmp_path, short_answers, **saved)
    first.train()
    second = make_hopeless(tmp_path, **saved)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{4 - steps}"))
    if not steps:
        found, expected = second.model.state_dict(), first.model.state_dict()
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_completions_of_which_no_token_counts_are_named(tmp_path):
    trainer = make_hopeless(
        tmp_path, short_answers, bias_term="value", mask_truncated_completions=True,
        generation_kwargs={"min_new_tokens": 6},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="No token of a completion counted.*max_completion_length"):
        trainer.train()


@pytest.mark.parametrize(
    ("trainer", "config"), [(BeftDPOTrainer, BeftDPOConfig), (BeftRewardTrainer, BeftRewardConfig)]
)
def test_pairs_that_are_equal_are_refused(tmp_path, caplog, trainer, config):
    model = make_llama() if trainer is BeftDPOTrainer else make_reward_model()
    given = {"args": config(str(tmp_path), **COMMON), "processing_class": make_tokenizer()}
    rows = pairs()
    equal = rows.map(lambda row: {"rejected": row["chosen"]})
    with pytest.raises(ValueError, match="the same in every row"):
        trainer(model, train_dataset=equal, **given)
    caplog.set_level("WARNING", logger="beft_trl")
    trainer(model, train_dataset=concatenate_datasets([rows, equal.select(range(3))]), **given)
    assert any("3 of 35 rows of train_dataset have the same answer" in text for text in caplog.messages)


def test_defaults_suit_biases_and_the_reward_head_keeps_its_own(tmp_path):
    for config in (BeftDPOConfig, BeftKTOConfig, BeftGRPOConfig, BeftRLOOConfig):
        args = config(str(tmp_path), use_cpu=True)
        assert args.relative_learning_rate == 0.05 and not args.bf16
        with pytest.raises(ValueError, match="exclude each other"):
            config(str(tmp_path), use_cpu=True, learning_rate=1e-3, relative_learning_rate=0.05)
    assert BeftGRPOConfig(str(tmp_path), use_cpu=True).bias_term == "value"
    rewards = BeftRewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    plain = RewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (rewards.learning_rate, rewards.relative_learning_rate) == (plain.learning_rate, 0.05)


def test_the_reference_is_the_base_with_the_biases_off(tmp_path):
    """TRL's estimate of the divergence is 0 in the first step, and only there; no second copy is in memory."""
    trainer = make_grpo(make_llama(), tmp_path, bias_term="value", max_steps=3, learning_rate=0.3)
    trainer.train()
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == 0 and all(value > 0 for value in divergence[1:])
    assert trainer.ref_model is None
    base = sum(parameter.numel() for parameter in make_llama().parameters())
    deltas = sum(parameter.numel() for name, parameter in trainer.model.named_parameters() if "beft_bias" in name)
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) == base + deltas


def test_a_run_without_a_configuration_is_named_after_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama().save_pretrained("base")
    trainer = BeftDPOTrainer("base", train_dataset=pairs(), processing_class=make_tokenizer())
    assert trainer.args.output_dir == "base-BEFT" and isinstance(trainer.args, BeftDPOConfig)


def make_rollouts(trainer, sleeps):
    """TRL's sender of weights, without the engine that it sends them to."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.enable_sleep_mode = trainer.model, sleeps
    generation._dist = DistributedBackend(trainer.accelerator)
    send_only_biases(generation, trainer._trained_biases)
    return dict(generation._iter_named_params())


@pytest.mark.parametrize("name", ["qwen2", "bloom"])
def test_what_vllm_is_sent_makes_the_base_the_trained_model(tmp_path, name):
    """The biases into the base as it was loaded, and all that an engine which slept is sent into a model of noise."""
    model = architectures.build(name)
    model.config.name_or_path = ""
    base = {key: values.clone() for key, values in model.state_dict().items()}
    trainer = make_grpo(model, tmp_path, bias_term="value", learning_rate=0.1)
    trainer.train()
    with torch.inference_mode():
        expected = trainer.model.eval()(**BATCH).logits
    plain = architectures.build(name)
    biases = make_rollouts(trainer, sleeps=False)
    assert all(path.endswith(".bias") for path in biases) and len(biases) == plain.config.num_hidden_layers
    plain.load_state_dict(base | biases)
    with torch.inference_mode():
        torch.testing.assert_close(plain(**BATCH).logits, expected, rtol=0, atol=1e-5)
        assert not torch.equal(architectures.build(name)(**BATCH).logits, expected)
        noise = type(plain)(plain.config).eval()
        missing, unexpected = noise.load_state_dict(make_rollouts(trainer, sleeps=True), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        torch.testing.assert_close(noise(**BATCH).logits, expected, rtol=0, atol=1e-5)


def test_rollouts_of_a_base_without_biases_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="beft merge --base model --output model-biases"):
        make_grpo(make_llama(), tmp_path, use_vllm=True)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo's folder as the current one, with the recipes of this page and a tiny model."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_llama(max_position_embeddings=1024).save_pretrained("models/SmolLM2-135M-Instruct")
    tokenizer.save_pretrained("models/SmolLM2-135M-Instruct")
    shutil.copytree(EXAMPLES.parent / "recipes" / "rl", "recipes/rl")

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--use_cpu", "true", *arguments])
        runpy.run_path(str(EXAMPLES / script))["main"]()

    return run


def test_the_example_of_preferences(demo, capsys):
    demo("dpo.py", "--max_steps", "2", "--score_steps", "1")
    assert "the right team is the likeliest of six for 0." in capsys.readouterr().out
    assert load_file("outputs/dpo/adapter_model.safetensors")


def test_the_example_of_rewards_says_if_they_teach_nothing(demo):
    """The tiny model knows no word that is a team's name."""
    with pytest.raises(RuntimeError, match="rewards never differed"):
        demo("grpo.py", "--max_steps", "2", "--per_device_train_batch_size", "4", "--num_generations", "2")


def test_the_rewards_of_the_example():
    """A fifth for a wrong one of six, so that a guess is worth nothing in the mean."""
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    answers = [" Billing", " Sales\nWhere is", " Billing\n", " Billing team", " I do not know", ""]
    assert example["right_team"](answers, team=["Billing"] * 6) == [1, -0.2, 1, 0, 0, 0]
    assert sum(example["right_team"](example["TEAMS"], team=["Sales"] * 6)) == pytest.approx(0)


def test_no_answer_that_is_to_be_learnt_stands_in_a_prompt_of_the_example():
    example = runpy.run_path(str(EXAMPLES / "grpo.py"))
    rows = Dataset.from_json(str(EXAMPLES / "data" / "support_train.jsonl"))
    shown, rest = example["split"](rows)
    assert len(shown) == 3 and len(shown) + len(rest) == len(rows) == 126
    for row, given in zip(rest, example["prompts"](rest, shown), strict=True):
        _, *solved, asked = given["prompt"].splitlines()
        assert asked == f"{row['prompt'][-1]['content']} ->" and given["team"] == row["completion"][0]["content"]
        assert [line.partition(" -> ")[2] for line in solved] == [each["completion"][0]["content"] for each in shown]
        assert row["prompt"][-1]["content"] not in "".join(solved)


def test_turns_by_the_names_of_sharegpt_are_learnt(tmp_path):
    """Templates write no turn of the roles "human" and "gpt": the first loss would be that of empty answers."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn.role in ('user', 'assistant') %}{{ turn.content }} {% endif %}"
        "{% endfor %}"
    )

    def turns(role, text, names):
        return [{names[0]: role, names[1]: text}]

    def first_batch(roles, names, folder):
        rows = Dataset.from_list(
            [
                {
                    "prompt": turns(roles[0], row["prompt"].strip(), names),
                    "chosen": turns(roles[1], row["completion"].strip(), names),
                    "rejected": turns(roles[1], "w50 w51", names),
                }
                for row in make_rows(8)
            ]
        )
        args = BeftDPOConfig(str(folder), **COMMON)
        trainer = BeftDPOTrainer(make_llama(), args, train_dataset=rows, processing_class=tokenizer)
        return next(iter(trainer.get_train_dataloader()))["input_ids"]

    expected = first_batch(("user", "assistant"), ("role", "content"), tmp_path / "own")
    assert expected.shape[1] > 4
    assert torch.equal(first_batch(("human", "gpt"), ("from", "value"), tmp_path / "sharegpt"), expected)
    assert torch.equal(first_batch(("human", "gpt"), ("role", "content"), tmp_path / "mixed"), expected)
