"""The layers that a run trains, and that nothing below them is in its backward pass."""

import pytest
import torch
from conftest import make_llama, make_opt
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from beft_trl import BeftTrainer, BeftTrainingArguments, find_bias_sites
from beft_trl.spans import ranges, sites_in, spec_of


LAYERS = 4


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("all", [0, 1, 2, 3]), ("upper", [2, 3]), ("1-2", [1, 2]), ("3", [3]), ("0, 2-3", [0, 2, 3]),
        ([1, 3], [1, 3]), (2, [2]), (["0-1", 3], [0, 1, 3]),
    ],
)  # fmt: skip
def test_what_names_layers(given, layers):
    sites = sites_in(find_bias_sites(make_llama(num_hidden_layers=LAYERS)), spec_of(given))
    assert sorted({site.layer for site in sites}) == layers
    assert len(sites) == 3 * len(layers)


def test_the_upper_half_of_an_odd_number_has_the_middle_layer():
    sites = sites_in(find_bias_sites(make_llama(num_hidden_layers=5)), "upper")
    assert {site.layer for site in sites} == {2, 3, 4}


@pytest.mark.parametrize(
    "given", ["lower", "", "-1", "1-", "3-2", "0,3-2", "a", [], None, True, 1.5, ["upper", 2], {"a": 1}]
)
def test_what_names_no_layers_is_refused(make_config, given):
    with pytest.raises(ValueError, match="bias_layers="):
        make_config(bias_layers=given)


@pytest.mark.parametrize("given", ["4", "2-7", [0, 9]])
def test_layers_that_the_model_does_not_have_are_refused(make_trainer, given):
    with pytest.raises(ValueError, match="0-3"):
        make_trainer(make_llama(num_hidden_layers=LAYERS), bias_layers=given)


def test_ranges_are_read_back():
    assert ranges([3, 0, 16, 15, 17]) == "0,3,15-17"
    assert spec_of(ranges([3, 0, 16, 15, 17])) == "0,3,15-17"


CHECKPOINTED = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def trained(make_trainer, model, **settings):
    trainer = make_trainer(model, bias_term="value", **settings)
    trainer.train()
    return {name: values.clone() for name, values in trainer.model.named_parameters() if "beft_bias" in name}, trainer


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_the_upper_half_learns_what_it_does_next_to_frozen_biases_of_the_lower(make_trainer, kind):
    """The lower half's layers get deltas that are never updated: the same model, with a backward pass through all."""
    found, _ = trained(make_trainer, make_llama(num_hidden_layers=LAYERS), bias_layers="upper", **CHECKPOINTED[kind])
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), bias_term="value")
    for name, values in trainer.model.named_parameters():
        if "beft_bias" in name and int(name.split("layers.")[1].split(".")[0]) < 2:
            values.register_hook(torch.zeros_like)
    with pytest.raises(RuntimeError, match="^2 of 4 .*learning_rate"):
        trainer.train()
    expected = dict(trainer.model.named_parameters())
    assert len(found) == 2
    for name, values in found.items():
        assert values.any()
        assert torch.allclose(values, expected[name], rtol=0, atol=1e-6)


def tensors_saved(trainer, layers):
    """Bytes that the forward pass of each of `layers` keeps for the backward pass, in one training step."""
    saved = dict.fromkeys(range(LAYERS), 0)
    inside = []
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda *call, number=number: inside.append(number))
        layer.self_attn.register_forward_hook(lambda *call: inside.clear())
        layer.mlp.register_forward_pre_hook(lambda *call, number=number: inside.append(number))
        layer.mlp.register_forward_hook(lambda *call: inside.clear())

    def pack(tensor):
        if inside:
            saved[inside[-1]] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train()
    return saved


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_frozen_layers_below_store_nothing_and_have_no_gradient(make_trainer, kind):
    model = make_llama(num_hidden_layers=LAYERS)
    trainer = make_trainer(model, bias_term="value", bias_layers="upper", max_steps=1, **CHECKPOINTED[kind])
    layers = trainer.model.get_base_model().model.layers
    calls, gradients = [], []
    for number, layer in enumerate(layers):
        # Before it runs: the second computation ends as soon as it has what the backward pass needs.
        layer.mlp.register_forward_pre_hook(lambda module, args, number=number: calls.append(number))
        layer.mlp.register_full_backward_hook(lambda *call, number=number: gradients.append(number))
    saved = tensors_saved(trainer, layers)
    assert saved[0] == saved[1] == 0 and (saved[3] > 0 or kind != "plain")
    assert set(gradients) == {2, 3}
    again = 2 if kind != "plain" else 1
    assert [calls.count(number) for number in range(LAYERS)] == [1, 1, again, again]


def test_a_score_names_only_the_chosen_layers(make_trainer, tmp_path):
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), bias_layers="1-2")
    trainer.train()
    scored = {layer.layer for term in trainer.bias_scores.terms.values() for layer in term.layers}
    assert scored == {1, 2}
    trainer.save_model(str(tmp_path / "saved"))
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {1, 2}
    plain = PeftModel.from_pretrained(make_llama(num_hidden_layers=LAYERS), tmp_path / "saved")
    tokens = torch.arange(3, 12)[None]
    assert torch.allclose(plain(tokens).logits, trainer.model.eval()(tokens).logits, atol=1e-5)


def test_a_resume_with_other_layers_is_refused(make_trainer):
    def make(layers):
        return make_trainer(
            make_opt(num_hidden_layers=LAYERS), bias_term="value", bias_layers=layers, save_strategy="steps",
            save_steps=2, max_steps=4,
        )  # fmt: skip

    make("upper").train()
    make("2-3").train(resume_from_checkpoint=True)  # the same layers by another name
    with pytest.raises(ValueError, match="layers 2-3, and bias_layers asks for 0-3"):
        make("all").train(resume_from_checkpoint=True)


def test_a_module_below_that_is_trained_whole_keeps_its_gradient(make_config):
    """The embeddings of an encoder, next to biases of its upper half."""
    sizes = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    args = BeftTrainingArguments(
        make_config().output_dir, bias_term="value", bias_layers="upper", modules_to_save=["word_embeddings"],
        max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7 + row], "labels": row % 2} for row in range(8)]
    before = model.bert.embeddings.word_embeddings.weight.clone()
    trainer = BeftTrainer(model, args, train_dataset=rows)
    trainer.train()
    assert not torch.equal(trainer.model.get_base_model().bert.embeddings.word_embeddings.weight, before)
