"""Tokens that the base has not learnt are refused, and a template without any leaves the embeddings as they are."""

import pytest
from conftest import VOCABULARY, make_llama, make_rows, make_tokenizer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from beft_trl import BeftSFTConfig, BeftSFTTrainer


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def save(folder, tokens=(), rows=VOCABULARY):
    """A model and its tokenizer, with a chat template, and with more tokens and rows of the embedding."""
    make_llama(vocab_size=rows).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(tmp_path):
    def make(model, tokenizer=None, rows=None, **settings):
        args = BeftSFTConfig(
            str(tmp_path / "out"), bias_term="value", max_steps=2, use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = BeftSFTTrainer(model, args, train_dataset=rows or make_rows(8), processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
        return trainer

    return make


MESSAGES = [
    {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w1"}]} for n in range(8)
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rows", [VOCABULARY, 2 * VOCABULARY])  # with room for more tokens too
def test_a_template_with_tokens_of_another_model_is_refused_before_anything_is_loaded(train, tmp_path, rows, given):
    base = save(tmp_path / "base", rows=rows)
    (tmp_path / "base" / "model.safetensors").unlink()
    chat = save(tmp_path / "chat", tokens=["<|user|>", "<|bot|>"], rows=rows)
    tokenizer = AutoTokenizer.from_pretrained(base) if given else None
    with pytest.raises(ValueError, match=r"2 tokens \('<\|user\|>', '<\|bot\|>'\)"):
        train(base, tokenizer, Dataset.from_list(MESSAGES), chat_template_path=chat)
    assert not (tmp_path / "out").exists()


def test_a_template_of_known_tokens_leaves_the_embedding_as_it_is(train, tmp_path):
    """TRL by itself would resize it to a multiple of 64, and add tokens to the tokenizer to fit."""
    base = save(tmp_path / "base", rows=VOCABULARY + 3)
    chat = save(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    trainer = train(base, None, Dataset.from_list(MESSAGES), chat_template_path=chat)
    assert trainer.processing_class.chat_template == TEMPLATE
    assert len(trainer.processing_class) == VOCABULARY
    assert trainer.model.get_input_embeddings().weight.shape[0] == VOCABULARY + 3


def test_an_embedding_with_new_rows_is_refused(train, tmp_path):
    base = save(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<entity>"]})
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match="'<entity>'"):
        train(model, tokenizer)


def test_new_tokens_in_rows_that_no_token_had_are_refused(train, tmp_path):
    base = save(tmp_path / "base", rows=2 * VOCABULARY)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["newword"])
    with pytest.raises(ValueError, match="'newword'"):
        train(model, tokenizer)


def test_a_new_token_for_padding_and_rows_without_a_token_do_no_harm(train, tmp_path):
    base = save(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    model.resize_token_embeddings(VOCABULARY + 8)
    train(model, tokenizer)


def test_new_tokens_in_spare_rows_of_a_named_base_are_refused(train, tmp_path):
    base = save(tmp_path / "base", rows=2 * VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["newword"])
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="'newword'"):
        train(base, tokenizer)


@pytest.mark.parametrize("named", [True, False])
def test_a_base_with_more_tokens_than_rows_trains_on_those_that_have_one(train, tmp_path, named):
    base = save(tmp_path / "base", tokens=["<none>"])
    load = str if named else AutoModelForCausalLM.from_pretrained
    tokenizer = AutoTokenizer.from_pretrained(base)
    train(load(base), tokenizer)
    rows = Dataset.from_list([{"prompt": "w1", "completion": " <none>"}] * 8)
    with pytest.raises(ValueError, match=str(VOCABULARY)):
        train(load(base), tokenizer, rows)
