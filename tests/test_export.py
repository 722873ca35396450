"""A bias as a LoRA of rank 1: the same model, exact after a LayerNorm and within the stated error after an RMSNorm."""

import json

import pytest
import torch
from architectures import build
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from beft_trl import find_bias_sites, load_adapter
from beft_trl.cli.main import app
from beft_trl.export.lora import LARGEST_ERROR, export_lora
from beft_trl.export.unit_vectors import UnitVectors
from beft_trl.tuner import attach_deltas, delta
from beft_trl.weight_files import MergeError


EXACT = ["opt", "gpt2", "gpt_neox", "bloom", "phi", "stablelm", "gptj", "falcon_new"]
FITTED = ["llama", "mistral", "qwen3", "gemma2", "phi3", "mixtral", "cohere"]


def make_adapter(model, folder, term="value", scale=0.3):
    """Base and adapter as folders. A new model's LayerNorms have no bias, of which nothing follows: they get one."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name.lower() or ".ln_" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    sites = [site for site in find_bias_sites(model) if term in (site.term, "all")]
    adapted = attach_deltas(AutoModelForCausalLM.from_pretrained(folder / "base"), sites)
    for site in sites:
        delta(adapted, site).data[0, site.rows] = scale * torch.randn(len(site.rows))
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter"


def make_texts(count=60):
    return [(row["prompt"], row["completion"]) for row in make_rows(count, seed=3)]


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


def both(folder, tokens, base=None):
    """Logits of base and adapter, and of the base and the LoRA, as plain PEFT applies them."""
    base = base or folder / "base"
    adapter = load_adapter(AutoModelForCausalLM.from_pretrained(base), str(folder / "adapter"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder / "lora"))
    return logits(adapter, tokens), logits(lora, tokens)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("term", ["value", "all"])
def test_after_a_layer_norm_the_lora_is_the_bias(tmp_path, name, term):
    adapter = make_adapter(build(name), tmp_path, term)
    report = export_lora(adapter, tmp_path / "lora", texts=make_texts(8), vectors=tmp_path / "vectors.safetensors")
    assert report.exact
    expected, found = both(tmp_path, torch.randint(3, 60, (2, 11)))
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), torch.randint(3, 60, (2, 11)))
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def errors_by_hand(folder, texts):
    """Root mean square of the LoRA's own A times what each projection is given with the biases on, less one."""
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter")).eval()
    vectors = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor[0]
        for name, tensor in load_file(folder / "lora" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    inputs = {path: [] for path in vectors}
    for path in inputs:
        model.get_base_model().get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: inputs[path].append(args[0][0])
        )
    tokenizer = make_tokenizer()
    for prompt, answer in texts:
        logits(model, torch.tensor([tokenizer(prompt + answer)["input_ids"]]))
    return {
        path: (torch.cat(inputs[path]) @ vector - 1).square().mean().sqrt().item() for path, vector in vectors.items()
    }


@pytest.mark.parametrize("name", FITTED)
def test_after_an_rms_norm_the_error_is_the_one_that_is_stated(tmp_path, name):
    """On the texts that the fit left out, and with the biases on, which move the inputs of later layers."""
    adapter = make_adapter(build(name), tmp_path)
    report = export_lora(
        adapter, tmp_path / "lora", texts=make_texts(), vectors=tmp_path / "vectors.safetensors", force=True
    )
    assert not report.exact
    assert report.errors == pytest.approx(errors_by_hand(tmp_path, make_texts()[::4]), rel=1e-3)


def test_the_error_of_an_adapter_is_that_of_its_base(tmp_path):
    """Only the vectors of the base would miss one by several times as much in the layers after the first."""
    adapter = make_adapter(make_llama(num_hidden_layers=4), tmp_path, scale=1.0)
    report = export_lora(adapter, tmp_path / "lora", texts=make_texts(200), vectors=tmp_path / "v", force=True)
    of_base = UnitVectors.load(tmp_path / "v").vectors
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for path, vector in of_base.items():
        if f"base_model.model.{path}.lora_A.weight" in tensors:
            tensors[f"base_model.model.{path}.lora_A.weight"] = vector[None].clone()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors", {"format": "pt"})
    last = "model.layers.3.self_attn.v_proj"
    assert errors_by_hand(tmp_path, make_texts(200)[::4])[last] > 3 * report.errors[last]


def test_a_second_adapter_without_texts_is_fitted_to_those_of_the_first(tmp_path):
    make_adapter(make_llama(), tmp_path)
    vectors, texts = tmp_path / "vectors.safetensors", make_texts(150)
    export_lora(tmp_path / "adapter", tmp_path / "lora", texts=texts, vectors=vectors, force=True)
    make_adapter(make_llama(), tmp_path / "second", scale=0.6)
    report = export_lora(tmp_path / "second" / "adapter", tmp_path / "second" / "lora", vectors=vectors, force=True)
    assert report.errors == pytest.approx(errors_by_hand(tmp_path / "second", texts[:128:4]), rel=1e-3)


def test_losses_and_answers_are_those_of_the_two_models(tmp_path):
    adapter = make_adapter(make_llama(num_hidden_layers=3), tmp_path)
    texts = make_texts()
    report = export_lora(adapter, tmp_path / "lora", texts=texts, vectors=tmp_path / "v.safetensors", force=True)
    tokenizer, found = make_tokenizer(), {}
    for name in ("adapter", "lora"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        load = load_adapter if name == "adapter" else PeftModel.from_pretrained
        model, losses, answers = load(base, str(tmp_path / name)), [], []
        for prompt, answer in texts[::4]:
            start, whole = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prompt, prompt + answer))
            losses.append(
                functional.cross_entropy(
                    logits(model, whole)[0, start.shape[1] - 1 : -1], whole[0, start.shape[1] :], reduction="none"
                )
            )
            answers.append(model.generate(input_ids=start, max_new_tokens=8, do_sample=False)[0].tolist())
        found[name] = torch.cat(losses).mean().item(), answers
    assert report.original_loss == pytest.approx(found["adapter"][0], abs=1e-4)
    assert report.loss == pytest.approx(found["lora"][0], abs=1e-4)
    equal = sum(mine == theirs for mine, theirs in zip(found["adapter"][1], found["lora"][1], strict=True))
    assert (report.equal_answers, report.answers) == (equal, 15)


def test_a_second_adapter_needs_no_texts_and_leaves_the_vectors_as_they_are(tmp_path):
    first = make_adapter(make_opt(), tmp_path)
    vectors = tmp_path / "vectors.safetensors"
    export_lora(first, tmp_path / "lora", texts=make_texts(), vectors=vectors)
    written = vectors.read_bytes()
    second = make_adapter(make_opt(), tmp_path / "second", "query")  # the same base, another term
    export_lora(second, tmp_path / "second" / "lora", vectors=vectors)
    assert vectors.read_bytes() == written
    expected, found = both(tmp_path / "second", torch.randint(3, 60, (2, 11)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_only_the_trained_layers_have_a_lora_and_their_numbers_are_in_its_configuration(tmp_path):
    model = make_opt(num_hidden_layers=4)
    make_adapter(model, tmp_path)
    kept = [site for site in find_bias_sites(model) if site.term == "value" and site.layer >= 2]
    attach_deltas(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), kept).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora", texts=make_texts(8), vectors=tmp_path / "v.safetensors")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"], config["r"]) == (["v_proj"], [2, 3], 1)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora"))
    with_lora = {name for name, _ in lora.named_parameters() if "lora_A" in name}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in with_lora} == {2, 3}


def refused(match, *args, **kwargs):
    with pytest.raises(MergeError, match=match):
        export_lora(*args, **kwargs)


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    adapter, output = make_adapter(make_llama(), tmp_path), tmp_path / "lora"
    vectors = tmp_path / "v.safetensors"
    refused("--rows", adapter, output, vectors=vectors)
    refused("too few", adapter, output, texts=make_texts(1), vectors=vectors)
    make_llama(seed=1).save_pretrained(tmp_path / "other")
    export_lora(adapter, tmp_path / "first", texts=make_texts(), vectors=vectors, force=True)
    refused("another base", adapter, output, tmp_path / "other", vectors=vectors)
    (tmp_path / "broken").write_bytes(b"no tensors")
    refused("damaged", adapter, output, vectors=tmp_path / "broken")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: each * float("nan") for name, each in tensors.items()}, adapter / "adapter_model.safetensors")
    refused("not finite", adapter, output, vectors=vectors)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".lora")]


def test_one_that_is_too_far_off_is_refused_without_force(tmp_path):
    """With as many fitted tokens as features a fit says nothing of other texts."""
    adapter = make_adapter(make_llama(hidden_size=64), tmp_path)
    texts, vectors = make_texts(4), tmp_path / "v.safetensors"
    refused(f"{LARGEST_ERROR:.0%} is the most", adapter, tmp_path / "lora", texts=texts, vectors=vectors)
    report = export_lora(adapter, tmp_path / "lora", vectors=vectors, force=True)
    assert max(report.errors.values()) > LARGEST_ERROR


def test_the_vectors_of_a_file_are_those_that_were_saved(tmp_path):
    saved = UnitVectors({"a.b": torch.ones(3)}, frozenset(["a.b"]), [([1, 2, 3], 2)], "base")
    saved.save(tmp_path / "folder" / "v.safetensors")
    read = UnitVectors.load(tmp_path / "folder" / "v.safetensors")
    assert (read.exact, read.texts, read.base) == (saved.exact, saved.texts, saved.base)
    assert torch.equal(read.vectors["a.b"], saved.vectors["a.b"])


def test_the_command_reads_rows_of_several_kinds_and_says_how_far_off_it_is(tmp_path):
    adapter = make_adapter(make_opt(), tmp_path)
    make_rows(24).to_json(tmp_path / "rows.jsonl")
    given = ["export", str(adapter), "--rows", str(tmp_path / "rows.jsonl"), "--vectors", str(tmp_path / "v")]
    ran = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "lora")])
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "lora" / "beft_export.json").read_text())
    assert report["exact"] and report["answers"] == 6
    assert f"{report['loss']:.4f}" in ran.output and "6 of 6" in ran.output
    assert str(tmp_path) not in (tmp_path / "lora" / "beft_export.json").read_text()
