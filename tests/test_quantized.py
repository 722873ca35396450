"""8-bit and 4-bit bases on the CPU, and what only a CUDA device can show."""

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from beft_trl import BeftSFTConfig, BeftSFTTrainer


bitsandbytes = pytest.importorskip("bitsandbytes")

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_CUDA])]
SETTINGS = {
    **{"bias_layers": "all", "max_steps": 6, "score_steps": 2, "per_device_train_batch_size": 8},
    **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
}
QUANTIZATION = {
    "8-bit": (BitsAndBytesConfig(load_in_8bit=True), bitsandbytes.nn.Linear8bitLt, torch.int8),
    "4-bit": (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        bitsandbytes.nn.Linear4bit,
        torch.uint8,
    ),
}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make_llama(hidden_size=128, num_attention_heads=4, intermediate_size=256).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", QUANTIZATION)
def test_a_quantised_base_stays_quantised_and_its_deltas_train_in_fp32(base, tmp_path, name, device):
    config, layer_class, storage = QUANTIZATION[name]
    trainer = BeftSFTTrainer(
        base,
        BeftSFTConfig(str(tmp_path / "out"), use_cpu=device == "cpu", **SETTINGS),
        train_dataset=make_rows(),
        quantization_config=config,
    )
    layers = {path: module for path, module in trainer.model.named_modules() if isinstance(module, layer_class)}
    assert len(layers) == 14 and {module.weight.dtype for module in layers.values()} == {storage}
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()

    after = dict(trainer.model.named_parameters())
    deltas = {name: p for name, p in after.items() if p.requires_grad}
    assert len(deltas) == 2 and {p.dtype for p in deltas.values()} == {torch.float32}
    assert all(p.any() and p.device.type == device for p in deltas.values())
    assert {state["exp_avg"].dtype for state in trainer.optimizer.optimizer.state.values()} == {torch.float32}
    for name, tensor in frozen.items():
        found = after[name] if name in after else after[name.replace(".base_layer.", ".")]
        assert torch.equal(found, tensor), name
    assert {trainer.bias_scores.anchor, trainer.bias_scores.steps} == {"activation", 2}


@pytest.mark.parametrize("name", QUANTIZATION)
def test_evaluation_before_and_during_training_leaves_the_training_as_it_is(base, tmp_path, name):
    """bitsandbytes packs 4-bit weights for inference on some CPUs, and cannot train on them afterwards."""

    def trained(folder, model, **settings):
        trainer = BeftSFTTrainer(
            model,
            BeftSFTConfig(str(tmp_path / folder), use_cpu=True, bias_term="value", **{**SETTINGS, **settings}),
            train_dataset=make_rows(),
            eval_dataset=make_rows(8, seed=1),
            processing_class=make_tokenizer(),
        )
        if settings:
            trainer.evaluate()
        trainer.train()
        return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def load():
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=QUANTIZATION[name][0])

    deltas = trained("silent", load())
    evaluated = trained("evaluated", load(), eval_strategy="steps", eval_steps=2)
    assert all(torch.equal(found, expected) for found, expected in zip(evaluated, deltas, strict=True))


@pytest.mark.parametrize(("name", "tolerance"), [("8-bit", 0.01), ("4-bit", 0.001)])
def test_a_quantised_base_starts_at_the_loss_of_its_dequantised_weights(base, tmp_path, name, tolerance):
    """8-bit rounds the activations too. To the full-precision loss, nf4 can be off by far more than 1%."""
    config = BitsAndBytesConfig(load_in_8bit=name == "8-bit", load_in_4bit=name == "4-bit")
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    plain = AutoModelForCausalLM.from_pretrained(base)
    for path, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            plain.get_submodule(path).weight.data = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            dequantised = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(path).weight.data = dequantised.float()
    losses = []
    for model in (quantised, plain):
        settings = {**SETTINGS, "max_steps": 1, "use_cpu": True, "bf16": False, "bias_term": "value"}
        trainer = BeftSFTTrainer(
            model,
            BeftSFTConfig(str(tmp_path / str(len(losses))), **settings),
            train_dataset=make_rows(),
            processing_class=make_tokenizer(),
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_a_4bit_model_that_was_packed_for_inference_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=QUANTIZATION["4-bit"][0]).eval()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    if not getattr(model.model.layers[0].self_attn.q_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs weights")
    with pytest.raises(ValueError, match=r"4-bit.*\(.*_proj first\)"):
        BeftSFTTrainer(model, BeftSFTConfig(str(tmp_path / "out"), use_cpu=True), train_dataset=make_rows())


def run(base, folder, **settings):
    trainer = BeftSFTTrainer(base, BeftSFTConfig(str(folder), **{**SETTINGS, **settings}), train_dataset=make_rows())
    trainer.train()
    return trainer


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("precision", [{"bf16": False}, {"bf16": True}, {"fp16": True}])
def test_cuda_ranks_as_the_cpu_does_in_every_precision(base, tmp_path, precision):
    on_cpu = run(base, tmp_path / "cpu", use_cpu=True, bf16=False)
    on_cuda = run(base, tmp_path / "cuda", **precision)
    assert on_cuda.args.device.type == "cuda"
    assert on_cuda.bias_scores.ranking == on_cpu.bias_scores.ranking
    for term in on_cpu.bias_scores.ranking:
        for score in ("importance", "magnitude", "fisher"):
            expected = on_cpu.bias_scores.terms[term].score(score)
            assert on_cuda.bias_scores.terms[term].score(score) == pytest.approx(expected, rel=0.15), (term, score)
    assert {p.dtype for p in on_cuda.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.gpu
@ON_CUDA
def test_phase_two_on_cuda_is_that_of_a_run_with_the_term_given(base, tmp_path):
    auto = run(base, tmp_path / "auto", bf16=False)
    given = run(base, tmp_path / "given", bf16=False, bias_term=auto.selected_bias_term)
    for (name, found), (_, expected) in zip(
        auto.model.named_parameters(), given.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7, msg=name)
