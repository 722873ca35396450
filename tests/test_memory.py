"""The estimate, held against sums by hand, PyTorch's own profiler, and what bitsandbytes really stores."""

import pytest
import torch
from conftest import make_llama, make_rows, make_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from beft_trl.cli.check import check_recipe
from beft_trl.cli.memory import peak_of_step, weight_bytes


MIB = 2**20


def test_the_peak_of_a_step_is_the_sum_by_hand():
    with FakeTensorMode():
        x = torch.empty(256, 1024, requires_grad=True)  # 1 MiB
        peak = peak_of_step(lambda: (x.exp() * 2).sum())
    # exp's result, which its backward wants, and the product; then in turn the gradients of the same size.
    assert 2 * MIB <= peak <= 3 * MIB + 64


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_as_large_as_bitsandbytes_makes_them(tmp_path, bits):
    make_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=3).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    stored = sum(tensor.numel() * tensor.element_size() for tensor in [*loaded.parameters(), *loaded.buffers()])
    for module in loaded.modules():
        weight = getattr(module, "weight", None)
        stored += 4 * len(weight.SCB) if bits == 8 and hasattr(weight, "SCB") else 0
        stored += 4 * weight.quant_state.absmax.numel() if hasattr(weight, "quant_state") else 0
    assert weight_bytes(bare, quantization) == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_and_loss_are_those_of_a_real_step(tmp_path, checkpointing):
    """PyTorch's profiler counts the bytes of the same step on real tensors."""
    model = make_llama(hidden_size=64, intermediate_size=256, num_hidden_layers=6, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_rows(400).to_json(tmp_path / "rows.jsonl")
    settings = {
        "model_name_or_path": tmp_path / "base", "train_file": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out",
        "packing": True, "packing_strategy": "wrapped", "max_length": 256, "per_device_train_batch_size": 8,
        "max_steps": 10, "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {value}" for name, value in settings.items()))
    check = check_recipe(str(tmp_path / "recipe.yaml"))
    assert check.problems == [] and check.notes == []
    estimated = check.memory.activations + check.memory.logits

    from beft_trl.cli.recipe import parse_recipe
    from beft_trl.cli.run import build_trainer, load_data

    recipe = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    trainer = build_trainer(recipe, load_data(recipe))
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        trainer.compute_loss(trainer.model, batch).backward()
    now = peak = 0
    for event in measured.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert estimated == pytest.approx(peak, rel=0.2)
