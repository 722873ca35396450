"""Training one term of a projection that holds all three: only its rows may move."""

import re
from dataclasses import replace

import pytest
import torch
from architectures import build
from conftest import make_rows, make_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from beft_trl import BeftSFTTrainer, find_bias_sites, load_adapter
from beft_trl.scoring import judge_dead
from beft_trl.tuner import delta


FUSED = ("gpt2", "bloom", "gpt_neox", "phi3", "falcon_new", "mpt", "codegen", "gpt_bigcode_multi_query", "deepseek_v3")


def trained(model, make_config, **settings):
    trainer = BeftSFTTrainer(
        model, make_config(**settings), train_dataset=make_rows(), processing_class=make_tokenizer()
    )
    trainer.train()
    return trainer


def rows_of(trainer):
    """The rows of the selected term, by module, from a look at the bare model."""
    rows = {}
    for site in find_bias_sites(trainer.model):
        if site.term == trainer.selected_bias_term and site.dead is None:
            rows[site.module] = site.rows
    return rows


@pytest.mark.parametrize("name", FUSED)
def test_only_the_rows_of_the_term_train_under_weight_decay(name, make_config):
    untouched = {key: value.clone() for key, value in build(name).state_dict().items()}
    trainer = trained(build(name), make_config, weight_decay=0.5, max_grad_norm=0.1)
    rows = rows_of(trainer)
    assert trainer.selected_bias_term in ("query", "key", "value")
    deltas = {path: parameter for path, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert len(deltas) == len(rows)
    for path, parameter in deltas.items():
        module = path.removeprefix("base_model.model.").removesuffix(".beft_bias.default")
        inside = torch.zeros(parameter.shape[1], dtype=torch.bool)
        inside[rows[module]] = True
        assert parameter[0, inside].count_nonzero() > 0.9 * inside.sum()
        assert not parameter[0, ~inside].any()
    after = {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for key, value in trainer.model.state_dict().items()
        if ".beft_bias." not in key
    }
    assert after.keys() == untouched.keys()
    assert all(torch.equal(after[key], untouched[key]) for key in after)
    assert trainer.bias_scores.terms["value"].parameters == sum(map(len, rows.values())) or (
        trainer.selected_bias_term != "value"
    )


def test_a_delta_that_moved_outside_its_rows_is_not_saved(make_config, tmp_path):
    trainer = trained(build("bloom"), make_config)
    site = trainer.trained_sites[0]
    with torch.no_grad():
        delta(trainer.model, site)[0, site.rows[-1] + 1] = 1e-6
    with pytest.raises(RuntimeError, match=rf"{re.escape(site.module)}\b.*\b{site.term}\b"):
        trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_a_fused_adapter_is_read_back(name, make_config, tmp_path):
    trainer = trained(build(name), make_config)
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = torch.randint(2, 60, (2, 8))
    card = (tmp_path / "adapter" / "README.md").read_text()
    if name == "gpt2":  # plain PEFT knows no Conv1D, as the card says
        assert "from beft_trl import load_adapter" in card
        with pytest.raises(TypeError, match="Unsupported layer type|not supported"):
            PeftModel.from_pretrained(build(name), tmp_path / "adapter")
        loaded = load_adapter(build(name), tmp_path / "adapter")
    else:
        assert "from peft import PeftModel" in card
        loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter")
    trained_logits = trainer.model.eval()(input_ids=inputs).logits
    assert torch.equal(loaded.eval()(input_ids=inputs).logits, trained_logits)
    assert not torch.equal(build(name)(input_ids=inputs).logits, trained_logits)


def test_a_conv1d_run_goes_on_from_its_checkpoint(make_config):
    whole = trained(build("gpt2"), make_config, save_strategy="steps", save_steps=3)
    resumed = BeftSFTTrainer(
        build("gpt2"),
        make_config(save_strategy="steps", save_steps=3),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
    )
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_fused_base_trains_only_its_term(name, bits, make_config, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    build(name).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**{bits: True})
    )
    kind = {"load_in_8bit": bitsandbytes.nn.Linear8bitLt, "load_in_4bit": bitsandbytes.nn.Linear4bit}[bits]
    trainer = trained(model, make_config)
    for path, rows in rows_of(trainer).items():
        layer = trainer.model.get_base_model().get_submodule(path)
        assert isinstance(layer.get_base_layer(), kind)
        moved = layer.beft_bias["default"][0].nonzero().flatten()
        assert len(moved) and set(moved.tolist()) <= set(rows.tolist())


def test_the_gradient_finds_a_dead_key_that_the_structure_cannot_see(make_config):
    """Cohere-2 has layers without positions, of the same modules as the others."""
    trainer = trained(build("cohere2"), make_config)
    scores = trainer.bias_scores
    assert "By its gradient the key bias of layer 3 is dead, though its structure does not say so." in scores.notes
    assert [layer.layer for layer in scores.terms["key"].layers] == [0, 1, 2]
    assert [layer.layer for layer in scores.terms["value"].layers] == [0, 1, 2, 3]


def test_the_gradient_finds_a_live_key_that_the_structure_takes_for_dead(make_config):
    """Rotary positions by another name."""

    class Turns(LlamaRotaryEmbedding):
        pass

    model = build("llama")
    model.model.rotary_emb = Turns(model.config)
    assert find_bias_sites(model)[1].dead is not None
    scores = trained(model, make_config).bias_scores
    assert "key" in scores.ranking and scores.terms["key"].dead is None
    note = "By its gradient the key bias of layers 0, 1 is alive, though its structure says that it is dead."
    assert note in scores.notes


@pytest.mark.parametrize(
    ("precision", "share", "structure", "dead"),
    [
        ("fp32", 1e-8, None, True),
        ("fp32", 1e-3, "no positions", False),
        ("16 bits", 1e-3, "no positions", True),  # rounding
        ("16 bits", 1e-3, None, False),
        ("16 bits", 0.1, "no positions", False),
    ],
)
def test_how_a_key_is_judged(precision, share, structure, dead):
    query, key, value = find_bias_sites(build("llama"))[:3]
    sites = [query, replace(key, dead=structure), value]
    gradients = {site: torch.full((2, len(site.rows)), share if site.term == "key" else 1.0) for site in sites}
    judged, notes = judge_dead(sites, gradients, precision)
    assert (judged[1].dead is not None) == dead
    assert sites[1].dead == structure  # what was given is as it was
    assert bool(notes) == (dead != (structure is not None))


def test_a_dead_key_moves_nothing_else(make_config):
    """A scoring pass with dead keys among the candidates trains as one that knows of none."""
    auto = trained(build("bloom"), make_config)
    given = trained(build("bloom"), make_config, bias_term=auto.selected_bias_term)
    for site in auto.trained_sites:
        twin = next(other for other in given.trained_sites if other.module == site.module)
        assert torch.equal(delta(auto.model, site), delta(given.model, twin))
