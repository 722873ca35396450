"""Rows, tokenizers, models and references that preference, reward and reinforcement learning refuse."""

import math

import architectures
import pytest
import torch
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from rl_trainers import COMMON, GIVEN, LEARN_FROM_REWARDS, make, make_reward_model, pairs

from beft_trl import (
    BeftDPOConfig,
    BeftDPOTrainer,
    BeftRewardConfig,
    BeftRewardTrainer,
)


TURN = {"role": "assistant", "content": "w1"}


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_references_that_are_none_are_refused(kind, tmp_path):
    model = make_llama()
    with pytest.raises(ValueError, match="ref_model"):
        make(kind, tmp_path, model, ref_model=model)
    with pytest.raises(TypeError, match="ref_model.*'base'"):
        make(kind, tmp_path, ref_model="base")
    adapted = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="ref_model.*merge_and_unload"):
        make(kind, tmp_path, ref_model=adapted)
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        make(kind, tmp_path, settings={"sync_ref_model": True})


BOTH = {"prompt": "w1", "rejected": " w3", "label": True}
WRONG_ROWS = {
    "columns": ({"text": "w1 w2"}, r"\btext\b.*'(prompt|chosen)'"),
    "missing": (BOTH | {"chosen": None, "completion": None}, "Row 1 .*'(chosen|completion)'"),
    "numbers": ({"prompt": 1, "chosen": 2, "rejected": 3, "completion": 2, "label": True}, "Row 1 .*'prompt'.* 1"),
    "turns": (BOTH | {"chosen": [TURN], "rejected": [TURN], "completion": [TURN]}, "Row 1 .*'prompt'"),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("wrong", [*WRONG_ROWS, "none"])
def test_rows_of_a_wrong_kind_are_named(kind, wrong, tmp_path):
    if kind in LEARN_FROM_REWARDS and wrong in ("missing", "turns"):
        return  # it learns from prompts only
    row, message = WRONG_ROWS.get(wrong, ({}, "train_dataset is empty"))
    rows = Dataset.from_list([row] * 4) if row else GIVEN[kind][2]().select([])
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, rows=rows)


@pytest.mark.parametrize("label", [None, "yes", math.nan])
def test_labels_that_say_nothing_are_named(label, tmp_path):
    rows = Dataset.from_list([{**row, "label": label} for row in make_rows(4)])
    with pytest.raises(ValueError, match=f"Row 1 of train_dataset: 'label'.*{label!r}"):
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
    with pytest.raises(ValueError, match=r"train dataset.*(prompt|chosen)_ids.*\b19\b"):
        make(kind, tmp_path, model)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_rows_beyond_the_positions_or_cut_off_are_named(kind, tmp_path):
    words = " ".join("w1" for _ in range(62))
    rows = Dataset.from_list([
        {"prompt": words, "chosen": " w2 w3", "rejected": " w3", "completion": " w2 w3", "label": index % 2 == 0}
        for index in range(4)
    ])  # fmt: skip
    with pytest.raises(ValueError, match=r"\b65\b.*\b64\b.*max_length"):
        make(kind, tmp_path, make_opt(), rows)
    make(kind, tmp_path, make_opt(), rows, settings={"max_length": 64})
    with pytest.raises(ValueError, match=r"train dataset.*max_length=62\b"):
        make(kind, tmp_path, make_opt(), rows, settings={"max_length": 62})


@pytest.mark.parametrize("kind", GIVEN)
def test_a_tokenizer_that_can_end_nothing_is_refused(kind, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        make(kind, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_a_model_that_generates_no_text_is_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="^BertForSequenceClassification"):
        make(kind, tmp_path, architectures.build("bert"))


@pytest.mark.parametrize(
    ("trainer", "config"), [(BeftDPOTrainer, BeftDPOConfig), (BeftRewardTrainer, BeftRewardConfig)]
)
def test_pairs_that_are_equal_are_refused(tmp_path, caplog, trainer, config):
    model = make_llama() if trainer is BeftDPOTrainer else make_reward_model()
    given = {"args": config(str(tmp_path), **COMMON), "processing_class": make_tokenizer()}
    rows = pairs()
    equal = rows.map(lambda row: {"rejected": row["chosen"]})
    with pytest.raises(ValueError, match="'chosen'.*'rejected'.*train_dataset"):
        trainer(model, train_dataset=equal, **given)
    caplog.set_level("WARNING", logger="beft_trl")
    trainer(model, train_dataset=concatenate_datasets([rows, equal.select(range(3))]), **given)
    assert any("3 of 35 rows of train_dataset have the same answer" in text for text in caplog.messages)


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
