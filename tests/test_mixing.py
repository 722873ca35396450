"""Many adapters over one base: each row of a batch has the logits that it has by itself with its own adapter."""

import pytest
import torch
from architectures import build
from conftest import make_llama, make_opt, of_term
from peft import BeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from beft_trl import add_adapter, find_bias_sites, load_adapter, swap_adapter
from beft_trl.tuner import attach_deltas, delta


MODELS = {"llama": make_llama, "opt": make_opt, "gpt2": lambda: build("gpt2")}


def make_adapters(make, folder, terms=("value", "query", "value")):
    for number, (name, term) in enumerate(zip("abc", terms, strict=True)):
        model = make()
        sites = [site for site in find_bias_sites(model) if site.term == term and site.layer >= number % 2]
        adapted = attach_deltas(model, sites)
        generator = torch.Generator().manual_seed(number)
        for site in sites:
            delta(adapted, site).data[0, site.rows] = torch.randn(len(site.rows), generator=generator)
        adapted.save_pretrained(folder / name)
    model = load_adapter(make(), str(folder / "a"), adapter_name="a")
    for name in "bc":
        model.load_adapter(str(folder / name), name)
    return model.eval()


def make_classifier():
    return LlamaForSequenceClassification(make_llama().config).eval()


def make_classifiers(folder):
    """Two adapters with heads of their own, and the base that both are of."""
    base = make_classifier().state_dict()
    for number, name in enumerate("ab"):
        model = make_classifier()
        model.load_state_dict(base)
        adapted = attach_deltas(model, [site for site in find_bias_sites(model) if site.term == "value"])
        generator = torch.Generator().manual_seed(number)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder / name)
    return base


def one_by_one(make, folder, tokens):
    """By plain PEFT, one adapter at a time, and the base without one."""
    rows = []
    for name, row in tokens.items():
        model = make() if name == "__base__" else load_adapter(make(), str(folder / name))
        with torch.no_grad():
            rows.append(model.eval()(input_ids=row[None], use_cache=False).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_its_own_adapter(tmp_path, name):
    model = make_adapters(MODELS[name], tmp_path)
    names = ["c", "__base__", "a", "b"]
    tokens = torch.randint(3, 60, (4, 7))
    before = model(input_ids=tokens, use_cache=False).logits
    mixed = model(input_ids=tokens, adapter_names=names, use_cache=False).logits
    expected = one_by_one(MODELS[name], tmp_path, dict(zip(names, tokens, strict=True)))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (expected[2] - expected[0]).abs().max() > 1e-2
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_answers_of_a_mixed_batch_are_those_of_each_row_by_itself(tmp_path, options):
    model = make_adapters(make_llama, tmp_path)
    tokens, names = torch.randint(3, 60, (3, 5)), ["b", "a", "__base__"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    for row, name, found in zip(tokens, names, mixed, strict=True):
        single = make_llama() if name == "__base__" else load_adapter(make_llama(), str(tmp_path / name))
        assert torch.equal(single.eval().generate(input_ids=row[None], **options)[0], found)


@pytest.mark.parametrize(
    ("names", "said"),
    [(["a"], r"\b2\b"), (["a", "x"], r"\bx\b"), ("ab", "'ab'"), (["a", "b", "c"], r"\b2\b")],
)
def test_names_that_do_not_fit_are_refused_and_the_model_goes_on(tmp_path, names, said):
    model = make_adapters(make_llama, tmp_path)
    tokens = torch.randint(3, 60, (2, 5))
    before = model(input_ids=tokens).logits
    with pytest.raises((ValueError, TypeError), match=said):
        model(input_ids=tokens, adapter_names=names)
    assert torch.equal(model(input_ids=tokens).logits, before)
    model.train()
    with pytest.raises(ValueError, match="eval"):
        model(input_ids=tokens, adapter_names=["a", "b"])


def test_a_weighted_adapter_is_the_sum_of_the_vectors(tmp_path):
    model = make_adapters(make_opt, tmp_path)
    model.base_model.add_weighted_adapter(["a", "b", "c"], [0.5, 2.0, -1.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["sum"])
    found = load_file(tmp_path / "saved" / "sum" / "adapter_model.safetensors")
    parts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc"]
    names = {name for part in parts for name in part}
    assert found.keys() == names
    for name in names:
        expected = sum(
            weight * part[name] for weight, part in zip((0.5, 2.0, -1.0), parts, strict=True) if name in part
        )
        torch.testing.assert_close(found[name], expected)
    plain = PeftModel.from_pretrained(make_opt(), str(tmp_path / "saved" / "sum")).eval()
    tokens = torch.randint(3, 60, (2, 5))
    torch.testing.assert_close(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for arguments in ((["x"], [1.0], "y"), (["a"], [1.0], "b"), (["a"], [1.0, 2.0], "x")):
        with pytest.raises(ValueError, match="adapter"):
            model.base_model.add_weighted_adapter(*arguments)


def test_an_added_adapter_is_the_one_that_peft_loads(tmp_path):
    make_adapters(make_llama, tmp_path, ("value", "query", "value"))
    tokens = torch.randint(3, 60, (2, 5))
    model = load_adapter(make_llama(), str(tmp_path / "a")).eval()
    for name in "bc":  # the query has no layer yet, and the value of layer 0 has one
        add_adapter(model, str(tmp_path / name), name)
        model.set_adapter(name)
        expected = PeftModel.from_pretrained(make_llama(), str(tmp_path / name)).eval()(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, expected)
        model.save_pretrained(tmp_path / "saved", selected_adapters=[name])
        found, own = (
            load_file(each / "adapter_model.safetensors") for each in (tmp_path / "saved" / name, tmp_path / name)
        )
        assert found.keys() == own.keys() and all(torch.equal(found[key], own[key]) for key in own)
    with pytest.raises(ValueError, match="already"):
        add_adapter(model, str(tmp_path / "b"), "c")


def test_a_swapped_adapter_is_the_other_one_in_the_same_tensors(tmp_path):
    make_adapters(make_llama, tmp_path, ("value", "query", "value"))
    model = load_adapter(make_llama(), str(tmp_path / "a")).eval()
    held = [parameter.data_ptr() for name, parameter in model.named_parameters() if "beft_bias" in name]
    swap_adapter(model, str(tmp_path / "c"))
    tokens = torch.randint(3, 60, (2, 5))
    expected = PeftModel.from_pretrained(make_llama(), str(tmp_path / "c")).eval()(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert [parameter.data_ptr() for name, parameter in model.named_parameters() if "beft_bias" in name] == held
    with pytest.raises(ValueError, match="other modules"):
        swap_adapter(model, str(tmp_path / "b"))
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_each_row_has_the_head_of_its_own_adapter(tmp_path):
    base = make_classifiers(tmp_path)

    def load(name):
        model = make_classifier()
        model.load_state_dict(base)
        return model if name == "__base__" else load_adapter(model, str(tmp_path / name), adapter_name=name).eval()

    model, names = load("a"), ["b", "__base__", "a"]
    add_adapter(model, str(tmp_path / "b"), "b")
    tokens = torch.randint(3, 60, (3, 5))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        mixed = model(input_ids=tokens, adapter_names=names).logits
        rows = [load(name)(input_ids=row[None]).logits for name, row in zip(names, tokens, strict=True)]
        torch.testing.assert_close(mixed, torch.cat(rows))
        assert torch.equal(model(input_ids=tokens).logits, before)
    with pytest.raises(ValueError, match="trained whole"):
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    assert "mean" not in model.peft_config


def test_a_weighted_adapter_on_a_16_bit_base_is_not_rounded(tmp_path):
    make_adapters(make_opt, tmp_path)
    model = load_adapter(make_opt().bfloat16(), str(tmp_path / "a"), adapter_name="a")
    model.base_model.add_weighted_adapter(["a"], [1 / 3], "third")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["third"])
    found = load_file(tmp_path / "saved" / "third" / "adapter_model.safetensors")
    for name, values in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        torch.testing.assert_close(found[name], values / 3)


def test_modules_that_are_named_by_an_expression_are_summed_too(tmp_path):
    for name in "ab":
        adapted = get_peft_model(make_llama(), BeftConfig(target_modules=r".*v_proj", task_type="CAUSAL_LM"))
        for key, parameter in adapted.named_parameters():
            if "beft_bias" in key:
                parameter.data.fill_(1.0 if name == "a" else 2.0)
        adapted.save_pretrained(tmp_path / name)
    model = load_adapter(make_llama(), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), "b")
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    found = [values for key, values in model.named_parameters() if key.endswith("beft_bias.sum")]
    assert len(found) == 2 and all((values == 3.0).all() for values in found)


def test_an_adapter_that_is_merged_into_the_base_is_not_swapped(tmp_path):
    make_adapters(make_opt, tmp_path)
    model = load_adapter(make_opt(), str(tmp_path / "a")).eval()
    tokens = torch.randint(3, 60, (2, 5))
    before = model(input_ids=tokens).logits
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        swap_adapter(model, str(tmp_path / "c"))
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


def test_an_adapter_with_a_head_is_not_swapped_for_one_without(tmp_path):
    """Its head would stay, and the answers would be those of neither adapter."""
    make_llama().save_pretrained(tmp_path / "base")
    for name, whole in (("head", ["lm_head"]), ("plain", [])):
        model = make_llama()
        attach_deltas(model, of_term(model), whole).save_pretrained(tmp_path / name)
    loaded = load_adapter(make_llama(), str(tmp_path / "head"))
    with pytest.raises(ValueError, match="'default' holds modules that were trained whole"):
        swap_adapter(loaded, str(tmp_path / "plain"))


def test_an_adapter_of_other_layers_of_a_conv1d_is_added(tmp_path):
    for layer in (0, 1):
        model = build("gpt2")
        sites = [site for site in of_term(model) if site.layer == layer]
        adapted = attach_deltas(model, sites)
        delta(adapted, sites[0]).data[0, sites[0].rows] = 1.0 + layer
        adapted.save_pretrained(tmp_path / str(layer))
    model = load_adapter(build("gpt2"), str(tmp_path / "0")).eval()
    add_adapter(model, str(tmp_path / "1"), "other")
    model.set_adapter("other")
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = load_adapter(build("gpt2"), str(tmp_path / "1")).eval()(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
