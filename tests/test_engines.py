"""What `engines.py` reads from real training arguments; the cells themselves run in test_distributed.py."""

import pytest
import torch
from conftest import make_llama
from transformers import BitsAndBytesConfig

from beft_trl import engines
from beft_trl.engines import engine_of, precision_of, refuse_cell


def test_one_process_is_the_single_engine(make_config):
    assert engine_of(make_config()) == "single"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_precisions(dtype):
    assert precision_of(None, dtype) == "bf16"
    assert precision_of(None, None) == precision_of(None, "float32") == "fp32"
    assert precision_of(BitsAndBytesConfig(load_in_8bit=True), dtype) == "8bit"
    assert precision_of(BitsAndBytesConfig(load_in_4bit=True), dtype) == "4bit"


def test_fsdp_is_refused_with_what_works_instead(make_config):
    config = make_config()
    config.fsdp = "full_shard"
    with pytest.raises(ValueError, match="FSDP.*--launch zero3"):
        engine_of(config)


def test_without_bitsandbytes_a_quantised_base_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(engines, "is_bitsandbytes_available", lambda: False)
    refuse_cell("single", make_config(), None, "float32")
    for bits, quantization in {"8": {"load_in_8bit": True}, "4": {"load_in_4bit": True}}.items():
        with pytest.raises(ImportError, match=rf"{bits}-bit.*'beft-trl\[quantization\]'"):
            refuse_cell("single", make_config(), BitsAndBytesConfig(**quantization), "float32")


@pytest.mark.parametrize(
    ("capability", "dtype", "settings", "warned"),
    [
        ("AVX2", torch.bfloat16, {}, True),
        ("AVX2", torch.float32, {"bf16": True}, True),
        ("AVX2", torch.float32, {}, False),
        ("AVX512", torch.bfloat16, {}, False),
    ],
)
def test_a_processor_without_instructions_for_16_bits_is_told_of(
    capability, dtype, settings, warned, make_trainer, monkeypatch, caplog
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    make_trainer(make_llama().to(dtype), **settings)
    assert ("without instructions for 16 bits" in caplog.text) == warned
