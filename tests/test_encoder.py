"""BERT and RoBERTa with a task's head: what is trained, put back and saved, and how it loads elsewhere."""

import json

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from conftest import VOCABULARY, make_tokenizer
from datasets import Dataset
from peft import PeftModel
from processes import python
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
    set_seed,
)

from beft_trl import BeftTrainer, BeftTrainingArguments, MergeError, merge_adapter
from beft_trl.cli.info import adapter_report
from beft_trl.saving import sizes


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LABELS = {"id2label": {0: "late", 1: "early", 2: "never"}, "label2id": {"late": 0, "early": 1, "never": 2}}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, **LABELS)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, **LABELS)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64,
            initializer_range=0.2, **LABELS,
        )
    ),
}  # fmt: skip
HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "distilbert": {f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")},
}


@pytest.fixture
def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, VOCABULARY, (32, 6), generator=generator)
    return Dataset.from_dict({"input_ids": words.tolist(), "labels": (words[:, 0] % 3).tolist()})


def make_model(kind: str):
    set_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_trainer(model, rows, folder, **settings) -> BeftTrainer:
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "score_steps": 2,
    }  # fmt: skip
    args = BeftTrainingArguments(str(folder), **(defaults | settings))
    return BeftTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer())


@pytest.mark.parametrize("kind", MODELS)
def test_bias_and_head_are_trained_and_nothing_else(kind, rows, tmp_path):
    model = make_model(kind)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trainer = make_trainer(model, rows, tmp_path / "out")
    trainer.train()

    assert trainer.selected_bias_term in ("value", "query")
    assert trainer.bias_scores.terms["key"].dead
    wrapped = trainer.model.get_base_model().state_dict().items()
    after = {name.replace(".base_layer", "").replace(".original_module", ""): values for name, values in wrapped}
    assert all(torch.equal(values, after[name]) for name, values in before.items())

    trainer.save_model()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.") for name in saved}
    assert {name for name in names if not name.endswith(".beft_bias")} == HEADS[kind]
    assert len([name for name in names if name.endswith(".beft_bias")]) == SIZES["num_hidden_layers"]
    assert all(not torch.equal(saved[f"base_model.model.{name}"], before[name]) for name in HEADS[kind])
    trained = sum(values.numel() for values in saved.values())
    assert sizes(trainer._deltas)[0] == trained
    told = " ".join(str(part) for part in adapter_report(tmp_path / "out"))
    assert all(name in told for name in HEADS[kind])
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("pipeline_tag: text-classification", "AutoModelForSequenceClassification.from_pretrained("):
        assert said in card
    assert "the trained `classifier`" in card


def test_scoring_puts_the_head_back(rows, tmp_path):
    """The run after a scoring pass is that of a trainer that was told the term: bit for bit."""
    auto = make_trainer(make_model("bert"), rows, tmp_path / "auto")
    auto.train()
    told = make_trainer(make_model("bert"), rows, tmp_path / "told", bias_term=auto.selected_bias_term)
    told.train()
    of_auto, of_told = auto.model.state_dict(), told.model.state_dict()
    assert all(torch.equal(values, of_auto[name]) for name, values in of_told.items())


def test_fisher_is_that_of_the_native_bias(rows, tmp_path):
    """Of one batch with all the rows, against the gradient of the model's own bias in plain PyTorch."""
    trainer = make_trainer(
        make_model("bert"), rows, tmp_path, score_steps=1, max_steps=1, per_device_train_batch_size=len(rows)
    )
    scores = trainer.score()
    model = make_model("bert").train()
    model(input_ids=torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"])).loss.backward()
    for term in ("query", "value"):
        biases = [getattr(layer.attention.self, term).bias for layer in model.bert.encoder.layer]
        expected = np.mean([bias.grad.square().mean().item() for bias in biases])
        assert scores.terms[term].score("fisher") == pytest.approx(expected, rel=1e-4)


def test_pooler_is_trained_on_request(rows, tmp_path):
    trainer = make_trainer(make_model("bert"), rows, tmp_path, bias_term="value", modules_to_save=["pooler"])
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.bert.pooler.dense.weight", "base_model.model.classifier.weight"} <= set(saved)


def test_regression(rows, tmp_path):
    set_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1, problem_type="regression"))
    rows = rows.map(lambda row: {"labels": float(row["labels"])})
    trainer = make_trainer(model, rows, tmp_path, bias_term="value")
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < first
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "regression"


def test_resume_is_bit_equal(rows, tmp_path):
    whole = make_trainer(make_model("bert"), rows, tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = make_trainer(make_model("bert"), rows, tmp_path / "resumed", save_strategy="steps", save_steps=3)
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(values, found[name]) for name, values in expected.items())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_loads_with_plain_peft_and_merges(kind, rows, tmp_path):
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_model(kind).base_model.save_pretrained(base)  # without a head, as pretrained encoders come
    make_tokenizer().save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, **LABELS)
    trainer = make_trainer(model, rows, adapter)
    trainer.train()
    trainer.save_model()
    batch = torch.tensor(rows[:8]["input_ids"])
    expected = trainer.model.eval()(input_ids=batch).logits.detach()

    script = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForSequenceClassification\n"
        "base, adapter, batch, output = sys.argv[1:]\n"
        "config = AutoConfig.from_pretrained(adapter)\n"
        "model = AutoModelForSequenceClassification.from_pretrained(base, config=config)\n"
        "model = PeftModel.from_pretrained(model, adapter).eval()\n"
        "torch.save(model(input_ids=torch.load(batch)).logits, output)\n"
        "assert 'beft_trl' not in sys.modules\n"
    )
    torch.save(batch, tmp_path / "batch.pt")
    run = python("-c", script, base, adapter, tmp_path / "batch.pt", tmp_path / "logits.pt")
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)

    report = merge_adapter(adapter, merged)
    assert report.difference < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    torch.testing.assert_close(plain.eval()(input_ids=batch).logits.detach(), expected, rtol=1e-5, atol=1e-5)
    text = " ".join(f"w{index - 3}" for index in rows[0]["input_ids"])
    answer = pipeline("text-classification", model=str(merged), tokenizer=str(merged))(text)[0]
    assert answer["label"] == LABELS["id2label"][expected[0].argmax().item()]
    assert answer["score"] == pytest.approx(expected[0].softmax(0).max().item(), abs=1e-4)


def test_trained_on_an_8_bit_base_and_merged_into_the_original(rows, tmp_path):
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_model("bert").base_model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, **LABELS, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    )
    assert isinstance(model.bert.encoder.layer[0].attention.self.value, Linear8bitLt)
    trainer = make_trainer(model, rows, adapter)
    trainer.train()
    trainer.save_model()

    merge_adapter(adapter, merged)
    plain = AutoModelForSequenceClassification.from_pretrained(merged)
    saved = load_file(adapter / "adapter_model.safetensors")
    term = trainer.selected_bias_term
    path = f"bert.encoder.layer.1.attention.self.{term}"
    expected = make_model("bert").get_submodule(path).bias + saved[f"base_model.model.{path}.beft_bias"][0]
    torch.testing.assert_close(plain.get_submodule(path).bias, expected)
    assert torch.equal(plain.classifier.weight, saved["base_model.model.classifier.weight"])
    assert plain.dtype == torch.float32 and not hasattr(plain.config, "quantization_config")


@pytest.fixture
def on_an_encoder(rows, tmp_path):
    """The folders of an encoder without a head, and of the adapter, with a head, that was trained on it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model("bert").base_model.save_pretrained(base)
    trainer = make_trainer(BertForSequenceClassification.from_pretrained(base), rows, adapter)
    trainer.train()
    trainer.save_model()
    return base, adapter


def test_a_head_without_its_configuration_is_not_merged(on_an_encoder, tmp_path):
    _, adapter = on_an_encoder
    (adapter / "config.json").unlink()
    with pytest.raises(MergeError, match=r"classifier\.bias.*BertModel"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_that_lacks_a_part_is_not_merged(on_an_encoder, tmp_path):
    base, adapter = on_an_encoder
    weights = load_file(base / "model.safetensors")
    save_file({name: values for name, values in weights.items() if "pooler" not in name}, base / "model.safetensors")
    with pytest.raises(MergeError, match=r"bert\.pooler\.dense\.bias"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_trained_adapter_goes_on(rows, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model("bert").save_pretrained(base)
    first = make_trainer(BertForSequenceClassification.from_pretrained(base), rows, adapter, bias_term="value")
    first.train()
    first.save_model()
    model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), adapter)
    trainer = make_trainer(model, rows, tmp_path / "second")
    trainer.train()
    trainer.save_model()
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "second"))
    assert one.keys() == two.keys()
    assert all(not torch.equal(values, two[name]) for name, values in one.items())


def test_what_cannot_be_trained_whole(rows, tmp_path):
    with pytest.raises(ValueError, match="modules_to_save.*'poolr'"):
        make_trainer(make_model("bert"), rows, tmp_path, modules_to_save=["poolr"])
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        make_trainer(make_model("bert").to(torch.bfloat16), rows, tmp_path)
    with pytest.raises(TypeError, match="AutoModelForSequenceClassification"):
        make_trainer("bert-base-cased", rows, tmp_path)
    with pytest.raises(ValueError, match="bias_term='key'.*'value'"):
        make_trainer(make_model("roberta"), rows, tmp_path, bias_term="key")
