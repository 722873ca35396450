"""Tiny models and data, built from config classes: nothing is downloaded."""

import gc
import os
import shutil
import subprocess
import sys
from functools import partial


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models this small gain nothing from a second thread, which gets in the way of the other test process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from architectures import build
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from beft_trl import BeftSFTConfig, BeftSFTTrainer, find_bias_sites
from beft_trl.cli import main
from beft_trl.tuner import attach_deltas, delta


VOCABULARY = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_opt(seed: int = 0, **options) -> OPTForCausalLM:
    """Two layers with native biases, which the initialisation leaves at zero, set to random values."""
    set_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "init_std": 0.2,
    }
    model = OPTForCausalLM(OPTConfig(**{**config, **options}))
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    """Two layers without biases, rotary positions, grouped queries."""
    set_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **options}))


def make_rows(count: int = 32, seed: int = 0) -> Dataset:
    """Prompts of 3 to 7 random words, each with a completion of two words that depends on the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 8, (), generator=generator))
        words = torch.randint(0, VOCABULARY - 3, (length,), generator=generator).tolist()
        rows.append(
            {
                "prompt": " ".join(f"w{word}" for word in words),
                "completion": f" w{words[0] % 7} w{words[0] % 5}",
            }
        )
    return Dataset.from_list(rows)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def full_batch(tokenizer, rows):
    """The rows as one padded batch, made without TRL."""
    sequences, labels = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        sequences.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([-100] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(ids) for ids in sequences], batch_first=True),
    }


def class_rows(count, seed=0):
    """Rows whose completion is one of three words, by their first."""
    rows = make_rows(count, seed)
    return rows.map(lambda row: {"completion": f" w{int(row['prompt'].split()[0][1:]) % 3}"})


def saved(model, folder, sites, seed=0):
    """Base and adapter folders of a model with random deltas at the sites, and the model with its deltas."""
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = attach_deltas(model, sites).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in sites:
            delta(adapted, site)[0, site.rows] = torch.randn(len(site.rows), generator=generator) * 0.3
    adapted.save_pretrained(folder / "adapter")
    return adapted


def of_term(model, term="value"):
    return [site for site in find_bias_sites(model) if site.term == term]


@pytest.fixture(scope="module", autouse=True)
def fast_collection():
    """Every end of a run collects garbage, and looks at all that imports and earlier tests have left: a third of a
    second and more. What is there when a module begins is left out from then on."""
    gc.collect()
    gc.freeze()


def run_config(folder, **settings) -> BeftSFTConfig:
    """The settings of a short fp32 run on the CPU that writes to a folder."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "score_steps": 2,
        "bias_layers": "all",
    }
    if settings.get("relative_learning_rate") is None:
        defaults["learning_rate"] = 3e-3
    return BeftSFTConfig(**{**defaults, **settings})


def trainer_in(folder, model=None, rows=None, trainer=None, **settings) -> BeftSFTTrainer:
    """A trainer of a tiny OPT, or of another model, on the tiny rows."""
    return BeftSFTTrainer(
        make_opt() if model is None else model,
        run_config(folder, **settings),
        train_dataset=make_rows() if rows is None else rows,
        processing_class=make_tokenizer(),
        **(trainer or {}),
    )


@pytest.fixture
def make_config(tmp_path):
    return partial(run_config, tmp_path / "out")


@pytest.fixture
def make_trainer(tmp_path):
    return partial(trainer_in, tmp_path / "out")


@pytest.fixture
def beft(monkeypatch, capsys):
    """A function that runs the command in this process: its imports take seconds in one of its own."""

    def run(*arguments, columns=200) -> subprocess.CompletedProcess:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERMINAL_WIDTH", str(columns))
        monkeypatch.setattr(sys, "argv", ["beft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny Llama with a tokenizer, 48 rows, and a recipe, which the tests override."""
    folder = tmp_path_factory.mktemp("project")
    make_llama().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    make_rows(48).to_json(folder / "rows.jsonl")
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "train_file": str(folder / "rows.jsonl"),
        "bias_layers": "all",
        "score_steps": 2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a base of one file, one of shards, one with biases, and an adapter of the first two."""
    folder = tmp_path_factory.mktemp("good")
    model = build("llama")
    model.config.vocab_size = 64
    model.resize_token_embeddings(64)
    saved(model, folder, of_term(model))
    make_tokenizer().save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    plain = type(model).from_pretrained(folder / "base")
    plain.save_pretrained(folder / "sharded", max_shard_size="20KB")
    (folder / "secret").write_text("secret")
    return folder
