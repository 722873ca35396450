import pytest
import torch
from conftest import make_llama, make_opt
from peft import get_peft_model_state_dict
from processes import python

from beft_trl import find_bias_sites
from beft_trl.deltas import check_moved, gather_deltas, native_biases, set_deltas
from beft_trl.layout import sites_of_term
from beft_trl.tuner import Deltas, attach_deltas, delta, trained_to_fp32


def attached(model, bias_term="auto"):
    sites = sites_of_term(find_bias_sites(model), bias_term)
    return attach_deltas(model, sites), sites


def tokens():
    return torch.randint(2, 64, (3, 10), generator=torch.Generator().manual_seed(0))


def test_the_gradient_of_a_zero_delta_is_the_gradient_of_the_native_bias():
    model = make_opt().double()
    native = make_opt().double()
    model, sites = attached(model)
    model.double()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    native(input_ids=tokens(), labels=tokens()).loss.backward()
    for site in sites:
        expected = native.get_submodule(site.module).bias.grad
        assert expected.norm() > 1e-6
        torch.testing.assert_close(delta(model, site).grad.flatten(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make_model", [make_opt, make_llama])
def test_attached_deltas_change_nothing_and_are_all_that_trains(make_model):
    expected = make_model()(input_ids=tokens()).logits
    model, sites = attached(make_model())
    assert torch.equal(model(input_ids=tokens()).logits, expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{site.module}.beft_bias.default" for site in sites}


@pytest.mark.parametrize("bias_term", ["query", "value"])
def test_keeping_one_term_leaves_what_attaching_only_it_gives(bias_term):
    kept, sites = attached(make_llama())
    of_term = [site for site in sites if site.term == bias_term]
    Deltas(kept, sites).keep(of_term)
    expected, _ = attached(make_llama(), bias_term)
    assert [name for name, _ in kept.named_modules()] == [name for name, _ in expected.named_modules()]
    assert set(get_peft_model_state_dict(kept)) == set(get_peft_model_state_dict(expected))
    assert set(kept.peft_config["default"].target_modules) == set(expected.peft_config["default"].target_modules)
    assert kept.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    with torch.no_grad():
        for model in (kept, expected):
            for site in of_term:
                delta(model, site).fill_(0.1)
    assert torch.equal(kept(input_ids=tokens()).logits, expected(input_ids=tokens()).logits)


def test_deltas_become_fp32_whatever_they_were():
    model, sites = attached(make_llama().bfloat16())
    assert {delta(model, site).dtype for site in sites} == {torch.float32}  # PEFT's own doing
    for site in sites:  # what TRL does to a quantised model
        delta(model, site).data = delta(model, site).data.bfloat16()
    before = [delta(model, site) for site in sites]
    trained_to_fp32(model)
    assert {delta(model, site).dtype for site in sites} == {torch.float32}
    assert all(delta(model, site) is parameter for site, parameter in zip(sites, before, strict=True))
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_gathering_zeroing_and_native_biases():
    model, sites = attached(make_opt())
    with torch.no_grad():
        for number, site in enumerate(sites):
            delta(model, site).fill_(number)
    gathered = gather_deltas(model, sites)
    assert [values.tolist() for values in gathered.values()] == [[float(number)] * 32 for number in range(len(sites))]
    set_deltas(model, dict.fromkeys(sites))
    assert gathered[sites[1]].sum() == 32  # a copy
    assert not any(values.any() for values in gather_deltas(model, sites).values())
    for site, bias in native_biases(model, sites).items():
        assert torch.equal(bias, make_opt().get_submodule(site.module).bias)
    model, sites = attached(make_llama())
    assert set(native_biases(model, sites).values()) == {None}


def test_a_delta_that_stands_still_or_breaks_is_an_error():
    sites = find_bias_sites(make_opt())
    moved = {site: torch.ones(4) for site in sites}
    check_moved(moved)
    with pytest.raises(RuntimeError, match=r"^1 of 6 .*value of layer 0\b.*learning_rate"):
        check_moved({**moved, sites[2]: torch.zeros(4)})
    with pytest.raises(RuntimeError, match=r"^1 of 6 .*finite.*key of layer 1\b"):
        check_moved({**moved, sites[4]: torch.tensor([0.0, float("nan")])})


def test_an_old_peft_says_what_to_install():
    """A PEFT without the tuner, as 0.19 was."""
    without = "import sys, peft; del peft.BeftConfig; sys.modules['peft.tuners.beft'] = None; import beft_trl.tuner"
    run = python("-c", without)
    assert run.stderr.splitlines()[-1].startswith("ImportError: beft_trl needs PEFT 0.20 or later")
