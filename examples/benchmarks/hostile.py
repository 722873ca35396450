"""Runs the `beft` command on hundreds of hostile recipes, data files, models, launch files, adapters and checkpoints.

python examples/benchmarks/hostile.py --output hostile.json

Each case has a folder of its own with two tiny models, good rows, an adapter and a run with checkpoints. `ok` says that
its commands must succeed, `no` that they must be refused, `-` that either will do. In any case no command may end in a
traceback, `beft check` and `beft train` must agree, and what is refused must leave the files as they were.
"""

import argparse
import contextlib
import fnmatch
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", COLUMNS="1000")

import datasets
import pyarrow
import torch
import transformers as hf
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from beft_trl import check, cli, info, merge, run  # noqa: F401  for the forks that run the commands


with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  which accelerate imports where there is one


Prepare = Callable[[], Any]
LIMIT = 120  # seconds of a command
SECRET = "a text of nobody else"
RECIPE = """
model_name_or_path: llama
train_file: rows.jsonl
bias_term: value
max_steps: 2
per_device_train_batch_size: 2
max_length: 64
dtype: float32
bf16: false
use_cpu: true
gradient_checkpointing: false
save_strategy: "no"
report_to: none
output_dir: out
"""
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ROWS = [{"prompt": f"number {row} asks", "completion": f" the answer {row}"} for row in range(8)]
ADAPTER, WEIGHTS, MANIFEST = "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "beft_checkpoint.json"
TWO, FOUR = "run/checkpoint-2", "run/checkpoint-4"


@dataclass
class Case:
    """One hostile input: what to do to the folder, the commands to run in it, and what must come of them."""

    group: str
    name: str
    must: str
    commands: list[list[str]]
    prepare: list[Prepare] = field(default_factory=list)


# What a case does to its folder.


def write(path: str, content: Any) -> Prepare:
    """Writes text, bytes, or a list as JSON lines."""
    if isinstance(content, list):
        content = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in content)
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")

    def prepare() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    return prepare


def edit(path: str, **values: Any) -> Prepare:
    """Sets keys of a JSON file, and removes those that are set to `...`."""

    def prepare() -> None:
        content = {**json.loads(Path(path).read_text()), **values}
        Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return prepare


def tensors(path: str, change: Callable[[dict], dict]) -> Prepare:
    return lambda: save_file(change(load_file(path)), path, metadata={"format": "pt"})


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda content: {name: change(values).contiguous() for name, values in content.items()}


def cut(path: str, size: int) -> Prepare:
    return lambda: os.truncate(path, size)


def remove(*paths: str) -> Prepare:
    return lambda: [shutil.rmtree(path) if os.path.isdir(path) else os.remove(path) for path in paths]


def move(old: str, new: str) -> Prepare:
    return lambda: os.renames(old, new)


def link(path: str, target: str) -> Prepare:
    return lambda: (Path(path).unlink(missing_ok=True), os.symlink(target, path))


def folder(path: str) -> Prepare:
    return lambda: os.makedirs(path)


def table(path: str, **columns: list) -> Prepare:
    return lambda: parquet.write_table(pyarrow.table(columns), path)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token for each byte, and three more."""
    tokens = ["<unk>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )


def model(path: str, name: str, auto: Any = hf.AutoModelForCausalLM, template: str | None = None, **config) -> Prepare:
    """Writes a model of a few thousand parameters with its tokenizer."""
    sizes = {"vocab_size": 264, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 128, "pad_token_id": 1, "eos_token_id": 2}

    def prepare() -> None:
        torch.manual_seed(0)
        auto.from_config(getattr(hf, f"{name}Config")(**{**sizes, **config})).save_pretrained(path)
        tokens = tokenizer()
        tokens.chat_template = template
        tokens.save_pretrained(path)

    return prepare


def grown(path: str = "llama", **more: Any) -> Prepare:
    """Gives a tokenizer more tokens."""

    def prepare() -> None:
        tokens = hf.AutoTokenizer.from_pretrained(path)
        tokens.add_tokens([f"<more{number}>" for number in range(more.get("count", 20))])
        tokens.chat_template = more.get("template", tokens.chat_template)
        tokens.save_pretrained(more.get("to", path))

    return prepare


def sharded(**index: Any) -> Prepare:
    """Puts the weights of the base in a shard that an index names."""

    def prepare() -> None:
        names = dict.fromkeys(load_file("llama/model.safetensors"), "a.safetensors")
        os.rename("llama/model.safetensors", "llama/a.safetensors")
        content = {"metadata": {}, "weight_map": {**names, **index}}
        Path("llama/model.safetensors.index.json").write_text(json.dumps(content))

    return prepare


def chat(*turns: Any, column: str = "messages", role: str = "role", content: str = "content") -> list[dict]:
    """Rows of one conversation, whose turns are `"role:content"` or what stands for one."""
    pairs = [
        dict(zip((role, content), turn.split(":", 1), strict=False)) if isinstance(turn, str) else turn
        for turn in turns
    ]
    return [{column: pairs}] * 6


def rows(**columns: Any) -> list[dict]:
    return [columns] * 6


def third(**columns: Any) -> list[dict]:
    """The good rows with other values in the third."""
    return [*ROWS[:2], {**ROWS[2], **columns}, *ROWS[3:]]


GOOD_CHAT = chat("user:a", "assistant:b")
CHAT_ROWS = write("rows.jsonl", GOOD_CHAT)


def world(path: Path) -> None:
    """Writes what every case has a copy of."""
    os.chdir(path)
    model("llama", "Llama", template=TEMPLATE, num_key_value_heads=1)()
    model("opt", "OPT", word_embed_proj_dim=8, ffn_dim=16)()
    for name in ("rows.jsonl", "test.jsonl"):
        write(name, ROWS)()
    write("recipe.yaml", RECIPE)()
    write("secret", SECRET)()
    sys.argv = ["beft", "train", "recipe.yaml", *RESUMED.split(), "--resume_from_checkpoint", "false"]
    try:
        cli.main()
    finally:
        shutil.copytree("run", "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "_*"))
        for file in Path("run").glob("*.*"):
            file.unlink()  # as if it had been killed at the end


# Recipes. A field, and what it is set to, in YAML: refused, accepted, or either.

FIELDS = [
    ("bias_term", "output | Value | [value] | {a: 1} | ''", "key | all", "null"),
    ("score_method", "gradient | [beft]", "fisher", ""),
    ("learning_rate", "0 | -1e-3 | .nan | .inf | fast | [1e-3] | {a: 1}", "1e-3 | '0.01'", "1e30"),
    ("relative_learning_rate", "0 | .inf | a tenth", "1e-1", "null"),
    ("weight_decay", "0.1 | -1 | none", "0 | 0.0", ""),
    ("max_steps", "1.5 | many | [2] | 1:30", "'2' | 0x2 | 0b10", "true | 2e0"),
    ("per_device_train_batch_size", "0 | -2 | 1.5 | auto", "1000", ""),
    ("gradient_accumulation_steps", "0 | -1 | two", "100", "1.0"),
    ("max_length", "0 | 1 | -1 | 1.5 | long", "null | 1_000_000", ""),
    ("warmup_steps", "1% | .nan", "0.5 | 1000", "-1"),
    ("lr_scheduler_type", "bogus | 1", "polynomial | cosine_with_restarts", "cosine_with_min_lr | reduce_lr_on_plateau"),
    ("lr_scheduler_kwargs", "{no_such: 1} | fast", "'{}'", "{num_cycles: 1e-1}"),
    ("optim", "adam | 1", "sgd | adafactor", "galore_adamw | lomo | adamw_8bit | adamw_torch_fused"),
    ("optim_args", "", "", "nonsense | a=b"),
    ("adam_beta1", "1.5 | -1 | x", "0.5", ""),
    ("max_grad_norm", "x", "0", ".nan | -1"),
    ("seed", "zero | 1.5", "0 | 4294967295", "-1 | 4294967296 | 1180591620717411303424 | null"),
    ("bf16", "maybe", "", "true | null"),
    ("fp16", "", "", "true"),
    ("dtype", "float33 | int8 | complex64", "auto | bfloat16", "float16 | float64 | null | Tensor"),
    ("torch_dtype", "float32", "", ""),
    (
        "model_init_kwargs",
        "text | [a] | {no_such: 1} | {dtype: bfloat16, torch_dtype: float16}",
        "{torch_dtype: bfloat16} | '{\"dtype\": \"bfloat16\"}'",
        "{device_map: auto} | {attn_implementation: flash_attention_2} | {num_hidden_layers: 1} | {num_hidden_layers: x}",
    ),
    ("attn_implementation", "bogus", "eager", "flash_attention_2"),
    ("gradient_checkpointing_kwargs", "text", "", "{no_such: 1}"),
    ("save_strategy", "sometimes", "epoch", "no | best"),
    ("save_steps", "x", "", "0 | -1 | 0.5 | 1.5"),
    ("save_total_limit", "x", "1", "0 | -1"),
    ("eval_strategy", "steps | epoch | bogus", "", "no"),
    ("logging_steps", "x", "1", "0 | -1 | 0.5"),
    ("report_to", "bogus", "[] | [none]", "wandb | all | [tensorboard]"),
    ("packing_strategy", "bogus", "bfd", ""),
    ("dataset_text_field", "", "nothing", "null | [a]"),
    ("dataset_kwargs", "text", "", "{no_such: 1} | {skip_prepare_dataset: true} | [a]"),
    ("dataset_num_proc", "many | -1", "2", "0"),
    ("assistant_only_loss", "true", "false", ""),
    ("completion_only_loss", "", "true | false", ""),
    ("loss_type", "bogus", "dft", "chunked_nll"),
    ("truncation_mode", "keep_middle", "", "keep_end"),
    ("pad_token", "<nope>", "</s>", "''"),
    ("eos_token", "<nope>", "<pad>", ""),
    ("chat_template_path", "missing | rows", "opt", "rows.jsonl"),
    ("dataloader_num_workers", "-1 | x", "1", ""),
    ("dataloader_prefetch_factor", "2", "", ""),
    ("train_sampling_strategy", "bogus", "group_by_length", ""),
    ("label_smoothing_factor", "2 | -1 | x", "0.1", ""),
    ("neftune_noise_alpha", "x", "5", "-1"),
    ("use_liger_kernel", "", "", "true"),
    ("deepspeed", "missing.json | rows.jsonl", "", "{a: 1} | zero2"),
    ("fsdp", "full_shard | bogus", "", "true"),
    ("accelerator_config", "{no_such: 1} | missing.json", "", "text"),
    ("parallelism_config", "", "", "text"),
    ("output_dir", "recipe.yaml | rows.jsonl/out | /dev/null/out | /proc/out | \"a\\0b\" | " + "x" * 300, "ünï [b] $x/out | ./out/ | '~/out' | out]", "'' | null | 7"),
    ("use_peft", "true", "false", ""),
    ("load_in_8bit", "maybe", "", "true"),
    ("load_in_4bit", "", "", "true"),
    ("dataset_train_split", "", "", "'' | test | 'a/b' | 'train[:2]'"),
    ("dataset_streaming", "", "", "true"),
    ("answers", "-1 | all | 1.5", "0", "4"),
    ("resume_from_checkpoint", "true | missing | rows.jsonl | [a]", "false", "''"),
    ("push_to_hub", "", "", "true"),
    ("hub_model_id", "", "", "a/b/c"),
    ("lora_r", "", "", "16"),
    ("metric_for_best_model", "", "", "accuracy"),
    ("biasterm", "value", "", ""),
    ("learning-rate", "1e-3", "", ""),
    ("1", "2", "", ""),
    ("null", "x", "", ""),
    ("config", "", "", "recipe.yaml"),
    ("env", "text | [a]", "{HOSTILE: 1}", "null"),
    ("datasets", "[{path: rows.jsonl, type: alpaca}] | [] | text | [1]", "", "[{path: json, data_files: rows.jsonl}]"),
    ("test_file", "missing.jsonl | test.csv", "test.jsonl", "rows.jsonl"),
    ("dataset_name", ". | no/such", "", "null"),
    ("full_determinism", "", "", "true"),
    ("torch_compile_backend", "", "", "bogus"),
    ("ddp_backend", "", "", "bogus"),
    ("log_level", "loud", "debug", ""),
    ("trust_remote_code", "", "true", ""),
    ("disable_tqdm", "", "true", "text"),
]  # fmt: skip
# Settings that only together are a mistake, or none.
TOGETHER = """
no  bias_term: key; model_name_or_path: opt
ok  bias_term: auto
ok  bias_term: auto; model_name_or_path: opt; score_anchor: bias
no  bias_term: auto; score_anchor: bias
no  bias_term: auto; score_steps: 0
no  bias_term: auto; score_steps: -1
no  bias_term: auto; score_steps: 2.5
no  bias_term: auto; score_steps: 1000
no  bias_term: auto; score_learning_rate: 0
no  bias_term: auto; score_learning_rate: .nan
no  bias_term: auto; score_learning_rate: .inf
-   bias_term: auto; score_learning_rate: 1e30
no  bias_term: auto; learning_rate: 0
-   bias_term: auto; optim: sgd
no  bias_term: auto; model_name_or_path: opt; relative_learning_rate: -1
ok  relative_learning_rate: 3e-2; model_name_or_path: opt
no  max_steps: 0; num_train_epochs: 0
no  max_steps: -1; num_train_epochs: -1
no  max_steps: -1; num_train_epochs: .nan
no  max_steps: -1; num_train_epochs: .inf
no  max_steps: -1; num_train_epochs: all
ok  max_steps: -1; num_train_epochs: 0.1
no  per_device_train_batch_size: 100; dataloader_drop_last: true
no  per_device_train_batch_size: 100; dataloader_drop_last: true; max_steps: -1
ok  gradient_accumulation_steps: 3; per_device_train_batch_size: 3
no  bf16: true; fp16: true
no  load_in_8bit: true; load_in_4bit: true
no  load_in_4bit: true; bnb_4bit_quant_type: fp5
-   load_in_4bit: true; bnb_4bit_quant_storage: float33
no  load_in_8bit: true; model_init_kwargs: {quantization_config: {load_in_4bit: true}}
no  eval_strategy: steps; eval_steps: 0; test_file: test.jsonl
-   eval_strategy: steps; eval_steps: -1; test_file: test.jsonl
ok  eval_strategy: steps; eval_steps: 1; test_file: test.jsonl
no  load_best_model_at_end: true
no  load_best_model_at_end: true; eval_strategy: epoch; save_strategy: steps; test_file: test.jsonl
ok  load_best_model_at_end: true; eval_strategy: steps; eval_steps: 1; save_strategy: steps; save_steps: 1; test_file: test.jsonl
no  load_best_model_at_end: true; eval_strategy: steps; eval_steps: 1; save_strategy: steps; save_steps: 1; test_file: test.jsonl; metric_for_best_model: accuracy
-   save_strategy: best; eval_strategy: steps; eval_steps: 1; test_file: test.jsonl; metric_for_best_model: eval_nothing
no  save_strategy: best; eval_strategy: steps; eval_steps: 1; test_file: test.jsonl
-   lr_scheduler_type: reduce_lr_on_plateau; eval_strategy: steps; eval_steps: 1; test_file: test.jsonl
ok  lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: 0.1}
-   lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: 1e-1}
no  lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: low}
ok  packing: true; max_length: 16
-   packing: true; max_length: null
-   packing: true; packing_strategy: wrapped; max_length: 1000
-   padding_free: true
-   pad_to_multiple_of: 0
-   pad_to_multiple_of: -8
no  train_file: rows.jsonl; dataset_name: rows
no  train_file: null
no  train_file: rows.jsonl; test_file: rows.jsonl; dataset_test_split: train
no  answers: 4
ok  answers: 4; test_file: test.jsonl
ok  answers: 1000; test_file: test.jsonl
ok  train_file: '~/rows.jsonl'; model_name_or_path: '~/llama'
-   dataset_num_proc: 1000
-   train_file: rows.jsonl; dataset_streaming: true; max_steps: -1
no  gradient_checkpointing: true; gradient_checkpointing_kwargs: {use_reentrant: perhaps}; use_cache: perhaps
ok  gradient_checkpointing: true
-   report_to: tensorboard; run_name: [a]
-   activation_offloading: true
-   include_num_input_tokens_seen: sideways
-   remove_unused_columns: false
-   label_names: [nothing]
-   auto_find_batch_size: true
-   eval_on_start: true
-   ignore_data_skip: perhaps
"""
# Whole recipes. `+` stands for the good one.
YAML = {
    "empty": ("no", b""),
    "comments only": ("no", b"# nothing\n"),
    "a list": ("no", b"- model_name_or_path: llama\n"),
    "a scalar": ("no", b"llama\n"),
    "a number": ("no", b"7\n"),
    "tab as indentation": ("no", b"+model_init_kwargs:\n\tdtype: float32\n"),
    "unclosed quote": ("no", b"+run_name: 'a\n"),
    "unclosed bracket": ("no", b"+run_name: [a\n"),
    "percent sign": ("no", b"+run_name: %a\n"),
    "binary": ("no", bytes(range(256))),
    "NUL bytes": ("no", b"+\0\0\0"),
    "UTF-16": ("no", RECIPE.encode("utf-16")),
    "Latin-1": ("no", b"+run_name: caf\xe9\n"),
    "byte-order mark": ("ok", b"\xef\xbb\xbf+"),
    "Windows line ends": ("ok", RECIPE.replace("\n", "\r\n").encode()),
    "JSON": ("ok", json.dumps({"output_dir": "out", "train_file": "rows.jsonl", "model_name_or_path": "llama",
        "max_steps": 2, "bias_term": "value", "use_cpu": True, "bf16": False, "report_to": "none"}).encode()),
    "two documents": ("no", b"+---\nseed: 1\n"),
    "a key twice": ("no", b"+seed: 1\nseed: 2\n"),
    "a nested key twice": ("no", b"+model_init_kwargs: {dtype: float32, dtype: bfloat16}\n"),
    "anchor and merge key": ("ok", b"+model_init_kwargs: &a {dtype: float32}\ngradient_checkpointing_kwargs: *a\n"),
    "alias of nothing": ("no", b"+run_name: *nothing\n"),
    "aliases that grow": ("no", b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (97 + n, 97 + n, b", ".join([b"*%c" % (96 + n)] * 9)) for n in range(1, 7))),
    "an alias of itself": ("no", b"+lr_scheduler_kwargs: &a {a: *a}\n"),
    "a tag that runs code": ("no", b"+run_name: !!python/object/apply:os.system ['touch pwned']\n"),
    "a date": ("-", b"+run_name: 2026-01-01\n"),
    "a list as key": ("no", b"+? [a, b]\n: 1\n"),
    "null for every value": ("no", b"model_name_or_path: null\ntrain_file: null\n"),
    "a model that is a number": ("no", b"+model_name_or_path: 7\n".replace(b"+", RECIPE.replace("model_name_or_path: llama\n", "").encode())),
}  # fmt: skip

# Data: what must come of it, the name, the file's name and content, and settings.

DATA: list[tuple] = [
    ("no", "broken line", "a.jsonl", [*ROWS, '{"prompt": "a", \n']),
    ("no", "missing brace in line 3", "a.jsonl", [*ROWS[:2], '{"prompt": "a", "completion": "b"\n', *ROWS]),
    ("no", "trailing comma", "a.jsonl", ['{"prompt": "a", "completion": "b",}\n'] * 4),
    ("no", "single quotes", "a.jsonl", ["{'prompt': 'a', 'completion': 'b'}\n"] * 4),
    ("no", "two rows in a line", "a.jsonl", [json.dumps(ROWS[0]) * 2]),
    ("ok", "one JSON list", "a.json", json.dumps(ROWS)),
    ("-", "one JSON list as .jsonl", "a.jsonl", json.dumps(ROWS)),
    ("-", "one JSON list over lines", "a.json", json.dumps(ROWS, indent=2)),
    ("-", "rows under a key", "a.json", json.dumps({"data": ROWS})),
    ("-", "columns of lists", "a.json", json.dumps({"prompt": ["a"] * 4, "completion": ["b"] * 4})),
    ("no", "a scalar", "a.json", "7"),
    ("no", "a list of lists", "a.json", "[[1, 2], [3]]"),
    ("no", "a list of texts", "a.json", '["a", "b"]'),
    ("no", "an empty list", "a.json", "[]"),
    ("no", "an empty object", "a.jsonl", "{}\n{}\n"),
    ("no", "null rows", "a.jsonl", "null\nnull\n"),
    ("no", "NaN", "a.jsonl", [{"prompt": float("nan"), "completion": "a"}] * 3),
    ("no", "UTF-16", "a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode("utf-16")),
    ("no", "Latin-1", "a.jsonl", b'{"prompt": "caf\xe9", "completion": "a"}\n' * 4),
    ("ok", "byte-order mark", "a.jsonl", b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\n' * 4),
    ("no", "NUL bytes", "a.jsonl", b"\0" * 100),
    ("no", "whitespace only", "a.jsonl", " \n\n"),
    ("-", "empty lines between", "a.jsonl", ["\n", *ROWS, "\n\n", *ROWS]),
    ("no", "empty file", "a.jsonl", ""),
    ("no", "gzip as .jsonl", "a.jsonl", gzip.compress(json.dumps(ROWS).encode())),
    ("no", "half a surrogate", "a.jsonl", '{"prompt": "\\ud800", "completion": "a"}\n' * 3),
    ("-", "NUL character", "a.jsonl", rows(prompt="a\0b", completion="c")),
    ("-", "a key twice", "a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n' * 3),
    ("-", "nested a thousand times", "a.jsonl", '{"prompt": ' + "[" * 1000 + "]" * 1000 + "}\n"),
    ("ok", "one row", "a.jsonl", ROWS[:1]),
    ("-", "upper-case suffix", "a.JSONL", ROWS),
    ("no", "text file", "a.txt", ROWS),
    ("no", "no suffix", "rows2", ROWS),
    ("no", "a folder", "", folder("a.jsonl"), "train_file: a.jsonl"),
    ("no", "missing", "", None, "train_file: missing.jsonl"),
    ("no", "a link to itself", "", link("a.jsonl", "a.jsonl"), "train_file: a.jsonl"),
    ("no", "an address", "", None, "train_file: https://example.com/a.jsonl"),
    ("no", "a list of files", "", None, "train_file: [rows.jsonl, test.jsonl]"),
    *(("ok", f"a file named {name}", name, ROWS) for name in ("a b.jsonl", "[a]ü.jsonl", "a*?.jsonl", "a#b::c%20.jsonl")),
    ("ok", "CSV", "a.csv", "prompt,completion\n" + "a,b\n" * 4),
    ("no", "CSV, ragged", "a.csv", "prompt,completion\na,b\nc,d,e\n"),
    ("no", "CSV, unclosed quote", "a.csv", 'prompt,completion\na,"b\nc,d\n'),
    ("no", "CSV, semicolons", "a.csv", "prompt;completion\na;b\n"),
    ("no", "CSV, header only", "a.csv", "prompt,completion\n"),
    ("no", "CSV, no header", "a.csv", "a,b\nc,d\n"),
    ("-", "CSV, a column twice", "a.csv", "prompt,prompt,completion\na,b,c\n"),
    ("ok", "CSV, byte-order mark", "a.csv", b"\xef\xbb\xbf" + b"prompt,completion\n" + b"a,b\n" * 4),
    ("no", "CSV, Latin-1", "a.csv", b"prompt,completion\ncaf\xe9,b\n"),
    ("ok", "CSV, the text NA", "a.csv", "prompt,completion\n" + "country code of Namibia,NA\n" * 4),
    ("-", "CSV, an empty cell", "a.csv", "prompt,completion\na,\nb,c\n"),
    ("-", "CSV, numbers", "a.csv", "prompt,completion\n" + "1,2\n" * 4),
    ("ok", "CSV, line end in quotes", "a.csv", 'prompt,completion\n"a\nb",c\n'),
    ("no", "CSV is JSON", "a.csv", ROWS),
    ("no", "CSV, NUL bytes", "a.csv", b"\0" * 50),
    ("ok", "Parquet", "", table("a.parquet", prompt=["a"] * 4, completion=["b"] * 4), "train_file: a.parquet"),
    ("no", "Parquet, no rows", "", table("a.parquet", text=pyarrow.array([], "string")), "train_file: a.parquet"),
    ("no", "Parquet, dates", "", table("a.parquet", text=pyarrow.array([1], "date32")), "train_file: a.parquet"),
    ("no", "Parquet, bytes", "", table("a.parquet", text=[b"\xff\xfe"] * 3), "train_file: a.parquet"),
    ("no", "Parquet, null column", "", table("a.parquet", text=[None] * 3), "train_file: a.parquet"),
    ("no", "Parquet is text", "a.parquet", "prompt,completion\n"),
    ("no", "Parquet, cut off", "a.parquet", b"PAR1" + b"\0" * 60),
    ("no", "number in one row", "a.jsonl", third(prompt=7)),
    ("-", "numbers in all rows", "a.jsonl", rows(prompt=7, completion=8)),
    ("no", "null prompt", "a.jsonl", third(prompt=None)),
    ("no", "null completion", "a.jsonl", third(completion=None)),
    ("no", "completion missing in one row", "a.jsonl", [*ROWS, {"prompt": "a"}]),
    ("-", "empty prompt", "a.jsonl", third(prompt="")),
    ("-", "empty completion", "a.jsonl", third(completion="")),
    ("no", "everything empty", "a.jsonl", rows(prompt="", completion=""), "eos_token: null"),
    ("no", "list as prompt", "a.jsonl", rows(prompt=["a"], completion="b")),
    ("no", "object as prompt", "a.jsonl", rows(prompt={"a": 1}, completion="b")),
    ("no", "true as completion", "a.jsonl", rows(prompt="a", completion=True)),
    ("no", "turns as prompt in one row", "a.jsonl", third(prompt=[{"role": "user", "content": "a"}])),
    ("-", "turns as completion only", "a.jsonl", rows(prompt="a", completion=[{"role": "assistant", "content": "b"}])),
    ("no", "turns without a template", "a.jsonl", GOOD_CHAT, "model_name_or_path: opt"),
    ("no", "unknown columns", "a.jsonl", rows(question="a", answer="b")),
    ("no", "a prompt only", "a.jsonl", rows(prompt="a")),
    ("-", "preferences", "a.jsonl", rows(prompt="a", chosen="b", rejected="c")),
    ("ok", "a text column too", "a.jsonl", rows(text="unused", prompt="a", completion="b")),
    ("-", "messages too", "a.jsonl", [{**ROWS[0], **GOOD_CHAT[0]}] * 4),
    ("ok", "a column without a name", "a.jsonl", [{**row, "": 1} for row in ROWS]),
    ("-", "an image column", "a.jsonl", [{**row, "image": "a.png"} for row in ROWS]),
    ("no", "text in some rows, prompts in others", "a.jsonl", [*rows(text="a"), *ROWS]),
    ("no", "null text", "a.jsonl", [*rows(text="a"), {"text": None}]),
    ("no", "number as text", "a.jsonl", rows(text=7)),
    ("no", "list as text", "a.jsonl", rows(text=["a"])),
    ("-", "empty texts", "a.jsonl", rows(text="")),
    ("-", "special tokens as text", "a.jsonl", rows(text="</s><pad><unk>")),
    ("ok", "a long text", "a.jsonl", rows(text="word " * 20_000)),
    ("no", "beyond the positions", "a.jsonl", rows(text="word " * 100), "model_name_or_path: opt; max_length: null"),
    ("no", "prompts that fill max_length", "a.jsonl", rows(prompt="a" * 100, completion="b")),
    ("ok", "one prompt that fills max_length", "a.jsonl", third(prompt="a" * 100)),
    ("ok", "Alpaca", "a.jsonl", rows(instruction="a", input="", output="b")),
    ("ok", "Alpaca, null input", "a.jsonl", rows(instruction="a", input=None, output="b")),
    ("no", "Alpaca, null instruction", "a.jsonl", [*rows(instruction="a", output="b"), {"output": "c"}]),
    ("no", "Alpaca, null output", "a.jsonl", [*rows(instruction="a", output="b"), {"instruction": "c"}]),
    ("-", "Alpaca, number as output", "a.jsonl", rows(instruction="a", output=7)),
    ("no", "Alpaca, list as instruction", "a.jsonl", rows(instruction=["a"], output="b")),
    # Conversations.
    ("ok", "chat", "a.jsonl", GOOD_CHAT),
    ("no", "chat, null", "a.jsonl", [*GOOD_CHAT, {"messages": None}]),
    ("no", "chat, empty", "a.jsonl", rows(messages=[])),
    ("-", "chat, one empty", "a.jsonl", [*GOOD_CHAT, {"messages": []}]),
    ("no", "chat, null content", "a.jsonl", [*GOOD_CHAT, *chat({"role": "user", "content": None})]),
    ("no", "chat, number as content", "a.jsonl", chat({"role": "user", "content": 7})),
    ("-", "chat, parts as content", "a.jsonl", chat({"role": "user", "content": [{"type": "text", "text": "a"}]})),
    ("no", "chat, no content", "a.jsonl", chat({"role": "user"})),
    ("no", "chat, no role", "a.jsonl", chat({"content": "a"})),
    ("no", "chat, null role", "a.jsonl", chat({"role": None, "content": "a"})),
    ("-", "chat, odd roles", "a.jsonl", chat("bot:a", "narrator:b")),
    ("-", "chat, user only", "a.jsonl", chat("user:a")),
    ("-", "chat, assistant twice", "a.jsonl", chat("assistant:a", "assistant:b")),
    ("no", "chat, JSON in a text", "a.jsonl", rows(messages=json.dumps(GOOD_CHAT[0]["messages"]))),
    ("no", "chat, an object", "a.jsonl", rows(messages={"role": "user", "content": "a"})),
    ("no", "chat, a list of texts", "a.jsonl", rows(messages=["a", "b"])),
    ("-", "chat, tools", "a.jsonl", [{**GOOD_CHAT[0], "tools": "[{"}] * 4),
    ("-", "ShareGPT", "a.jsonl", chat("human:a", "gpt:b", column="conversations", role="from", content="value")),
    ("-", "ShareGPT, tool", "a.jsonl", chat("human:a", "function_call:b", "observation:c", "gpt:d", column="conversations", role="from", content="value")),
    ("no", "ShareGPT, odd role", "a.jsonl", chat("human:a", "martian:b", column="conversations", role="from", content="value")),
    ("no", "ShareGPT, null value", "a.jsonl", chat({"from": "human", "value": None}, column="conversations")),
    ("no", "ShareGPT, no value", "a.jsonl", chat({"from": "human"}, {"from": "gpt"}, column="conversations")),
    ("no", "ShareGPT, empty", "a.jsonl", rows(conversations=[])),
    ("ok", "conversations with roles", "a.jsonl", chat("user:a", "assistant:b", column="conversations")),
    ("no", "conversations of texts", "a.jsonl", rows(conversations=["a", "b"])),
    # Tokens.
    ("ok", "tokens", "a.jsonl", rows(input_ids=[3, 4, 5, 6])),
    ("no", "tokens beyond the vocabulary", "a.jsonl", [*rows(input_ids=[3, 4, 5]), {"input_ids": [3, 264, 5]}]),
    ("no", "negative tokens", "a.jsonl", rows(input_ids=[3, -4, 5])),
    ("no", "tokens of 64 bits", "a.jsonl", rows(input_ids=[3, 2**40])),
    ("no", "fractions as tokens", "a.jsonl", rows(input_ids=[3.5, 4.5])),
    ("no", "texts as tokens", "a.jsonl", rows(input_ids=["a", "b"])),
    ("no", "text as tokens", "a.jsonl", rows(input_ids="3 4 5")),
    ("no", "nested tokens", "a.jsonl", rows(input_ids=[[3, 4]])),
    ("no", "null among tokens", "a.jsonl", rows(input_ids=[3, None, 5])),
    ("no", "no tokens", "a.jsonl", rows(input_ids=[])),
    ("-", "no tokens in one row", "a.jsonl", [*rows(input_ids=[3, 4]), {"input_ids": []}]),
    ("-", "one token", "a.jsonl", rows(input_ids=[3])),
    ("no", "tokens beyond the positions", "a.jsonl", rows(input_ids=[3] * 500), "model_name_or_path: opt; max_length: null"),
    ("no", "labels beyond the vocabulary", "a.jsonl", rows(input_ids=[3, 4], labels=[3, 264])),
    ("no", "negative labels", "a.jsonl", rows(input_ids=[3, 4], labels=[-1, 4])),
    ("no", "labels of another length", "a.jsonl", rows(input_ids=[3, 4, 5], labels=[3, 4])),
    ("no", "masked labels", "a.jsonl", rows(input_ids=[3, 4], labels=[-100, -100])),
    ("no", "only the first token labelled", "a.jsonl", rows(input_ids=[3, 4], labels=[3, -100])),
    ("ok", "masked labels in some rows", "a.jsonl", [*rows(input_ids=[3, 4], labels=[3, 4]), *rows(input_ids=[3, 4], labels=[-100, -100])]),
    ("no", "text as labels", "a.jsonl", rows(input_ids=[3, 4], labels="34")),
    ("no", "null labels", "a.jsonl", [*rows(input_ids=[3, 4], labels=[3, 4]), {"input_ids": [3, 4], "labels": None}]),
    ("no", "a mask of another length", "a.jsonl", rows(input_ids=[3, 4, 5], completion_mask=[1])),
    ("-", "a mask of other numbers", "a.jsonl", rows(input_ids=[3, 4], completion_mask=[7, -1])),
    ("no", "labels without tokens", "a.jsonl", rows(labels=[3, 4])),
    # Held-out rows.
    *(
        ("no", f"held out: {name}", "h.jsonl", content, "train_file: rows.jsonl; test_file: h.jsonl; eval_strategy: epoch")
        for name, content in {
            "broken": '{"prompt"\n',
            "empty": "",
            "other columns": rows(question="a"),
            "null": third(prompt=None),
            "masked": rows(prompt="a" * 100, completion="b"),
            "tokens out of range": rows(input_ids=[3, 999]),
        }.items()
    ),
    ("no", "held out: another kind", "h.csv", "prompt,completion\na,b\n", "train_file: rows.jsonl; test_file: h.csv"),
    ("ok", "held out: another format", "h.jsonl", rows(text="a"), "train_file: rows.jsonl; test_file: h.jsonl"),
    ("no", "answers: no prompts", "h.jsonl", rows(text="a"), "train_file: rows.jsonl; test_file: h.jsonl; answers: 2"),
    ("-", "answers: chat", "h.jsonl", GOOD_CHAT, "train_file: h.jsonl; test_file: h.jsonl; answers: 2"),
    ("-", "answers: beyond the positions", "h.jsonl", rows(prompt="a" * 300, completion="b"), "model_name_or_path: opt; train_file: rows.jsonl; test_file: h.jsonl; answers: 2"),
]  # fmt: skip

# Models: what must come of it, the name, what happens to the folder, and settings.

CONFIG, BASE = "llama/config.json", "llama/model.safetensors"
MODELS: list[tuple] = [
    ("no", "missing", None, "model_name_or_path: nowhere"),
    ("no", "a hub name that is not there", None, "model_name_or_path: nobody/nothing"),
    ("no", "two slashes", None, "model_name_or_path: a/b/c"),
    ("no", "an empty name", None, "model_name_or_path: ''"),
    ("no", "the weights' file", None, f"model_name_or_path: {BASE}"),
    ("ok", "a slash at the end", None, "model_name_or_path: ./llama/"),
    ("ok", "a name with brackets", move("llama", "my [b] ü model"), "model_name_or_path: my [b] ü model"),
    ("ok", "a link", link("linked", "llama"), "model_name_or_path: linked"),
    ("-", "a revision", None, "model_revision: nothing"),
    ("no", "an empty folder", folder("new"), "model_name_or_path: new"),
    ("no", "an adapter", None, "model_name_or_path: adapter"),
    ("no", "a checkpoint of a run", None, f"model_name_or_path: {TWO}"),
    ("no", "no config", remove(CONFIG)),
    ("no", "config: empty", write(CONFIG, "")),
    ("no", "config: cut off", cut(CONFIG, 100)),
    ("no", "config: a list", write(CONFIG, "[]")),
    ("no", "config: an empty object", write(CONFIG, "{}")),
    ("no", "config: no type", edit(CONFIG, model_type=...)),
    ("no", "config: unknown type", edit(CONFIG, model_type="llama17")),
    ("no", "config: code of its own", edit(CONFIG, model_type="x", auto_map={"AutoConfig": "a.B"})),
    *(
        ("no", f"config: {name}={value!r}", edit(CONFIG, **{name: value}))
        for name, value in {
            "hidden_size": 0, "num_attention_heads": 0, "num_hidden_layers": 0, "vocab_size": -1, "head_dim": "four",
            "intermediate_size": None, "hidden_act": "bogus", "rope_parameters": "fast", "num_key_value_heads": 3,
        }.items()
    ),
    ("no", "config: another width than the weights", edit(CONFIG, hidden_size=16)),
    ("no", "config: more layers than the weights", edit(CONFIG, num_hidden_layers=3)),
    ("-", "config: fewer layers than the weights", edit(CONFIG, num_hidden_layers=1)),
    ("no", "config: a larger vocabulary than the weights", edit(CONFIG, vocab_size=300)),
    ("-", "config: dtype bogus", edit(CONFIG, dtype="bogus"), "dtype: auto"),
    ("ok", "config: dtype bfloat16", edit(CONFIG, dtype="bfloat16"), "dtype: auto"),
    ("-", "config: quantised by an unknown method", edit(CONFIG, quantization_config={"quant_method": "bogus"})),
    ("-", "config: quantised by GPTQ", edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4})),
    ("no", "config: biases that the weights lack", edit(CONFIG, attention_bias=True)),
    ("-", "config: another architecture", edit(CONFIG, architectures=["GPT2LMHeadModel"])),
    ("no", "weights: missing", remove(BASE)),
    ("no", "weights: empty", write(BASE, "")),
    ("no", "weights: cut off", cut(BASE, 2000)),
    ("no", "weights: garbage", write(BASE, os.urandom(4000))),
    ("no", "weights: a huge header", write(BASE, b"\xff" * 16)),
    ("no", "weights: a folder", [remove(BASE), folder(BASE)]),
    ("no", "weights: a Git LFS pointer", write(BASE, "version https://git-lfs.github.com/spec/v1\n")),
    ("no", "weights: NaN", tensors(BASE, each(lambda values: values * float("nan")))),
    ("no", "weights: one tensor missing", tensors(BASE, lambda content: dict(list(content.items())[:-1]))),
    ("-", "weights: one too many", tensors(BASE, lambda content: {**content, "more": torch.ones(2)})),
    ("-", "weights: integers", tensors(BASE, each(torch.Tensor.int))),
    ("-", "weights: of two dtypes", tensors(BASE, lambda c: {k: v.half() if "q_proj" in k else v for k, v in c.items()})),
    ("no", "weights: another shape", tensors(BASE, each(lambda values: values[..., :4]))),
    ("no", "weights: pickled, and garbage", [remove(BASE), write("llama/pytorch_model.bin", b"cos\nsystem\n")]),
    ("ok", "index: good", sharded()),
    ("no", "index: a shard missing", sharded(more="b.safetensors")),
    ("no", "index: garbage", [remove(BASE), write(f"{BASE}.index.json", "{")]),
    ("no", "index: no map", [remove(BASE), write(f"{BASE}.index.json", "{}")]),
    ("-", "generation config: garbage", write("llama/generation_config.json", "{")),
    ("no", "tokenizer: missing", remove("llama/tokenizer.json", "llama/tokenizer_config.json")),
    ("no", "tokenizer: garbage", write("llama/tokenizer.json", "{")),
    ("no", "tokenizer: a list", write("llama/tokenizer.json", "[]")),
    ("no", "tokenizer: config garbage", write("llama/tokenizer_config.json", "{")),
    ("-", "tokenizer: unknown class", edit("llama/tokenizer_config.json", tokenizer_class="NoTokenizer")),
    ("-", "tokenizer: no padding token", edit("llama/tokenizer_config.json", pad_token=...)),
    ("-", "tokenizer: no end of sequence", edit("llama/tokenizer_config.json", eos_token=...)),
    ("no", "tokenizer: nothing but a length", edit("llama/tokenizer_config.json", model_max_length="x"), "max_length: null"),
    ("no", "tokenizer: larger than the embedding", grown()),
    ("ok", "tokenizer: as large as the embedding", grown(count=2)),
    ("no", "tokenizer: larger, and the tokens used", [grown(), write("rows.jsonl", rows(text="a <more19>"))]),
    ("-", "template: raises", [write("llama/chat_template.jinja", "{{ raise_exception('no') }}"), CHAT_ROWS]),
    ("no", "template: not Jinja", [write("llama/chat_template.jinja", "{% for"), CHAT_ROWS]),
    ("no", "template: says nothing", [write("llama/chat_template.jinja", " "), CHAT_ROWS]),
    ("no", "template: unknown filter", [write("llama/chat_template.jinja", "{{ messages | bogus }}"), CHAT_ROWS]),
    ("no", "template: divides by zero", [write("llama/chat_template.jinja", "{{ 1 // 0 }}"), CHAT_ROWS]),
    ("no", "template: for strict turns", [write("llama/chat_template.jinja", "{{ messages[5]['content'] + 'a' }}"), CHAT_ROWS]),
    ("no", "template_path: with more tokens", [grown(to="t"), CHAT_ROWS], "chat_template_path: t"),
    ("-", "template_path: a tokenizer without one", [grown(to="t", template=None), CHAT_ROWS], "chat_template_path: t"),
    ("no", "template_path: garbage", [write("t.jinja", "{% for"), CHAT_ROWS], "chat_template_path: t.jinja"),
    ("no", "a state-space model", model("m", "Mamba", state_size=4), "model_name_or_path: m"),
    ("no", "a fused order that is not known", model("m", "OpenAIGPT", n_embd=8, n_head=2), "model_name_or_path: m"),
    ("no", "an encoder and decoder", model("m", "T5", hf.AutoModelForSeq2SeqLM, d_model=8), "model_name_or_path: m"),
    ("-", "an encoder", model("m", "Bert", hf.AutoModelForMaskedLM), "model_name_or_path: m"),
    ("ok", "fused projections", model("m", "GPT2", n_embd=8, n_head=2, n_layer=2), "model_name_or_path: m"),
    ("no", "a dead key in fused projections", model("m", "GPT2", n_embd=8, n_head=2), "model_name_or_path: m; bias_term: key"),
]  # fmt: skip

# Launch configurations: what is put into one that works, or a name for `--launch`.

LAUNCHED = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_machines": 1, "num_processes": 1,
            "mixed_precision": "no", "use_cpu": True}  # fmt: skip
LAUNCH: list[tuple] = [
    ("ok", "good", {}),
    *(("no", f"named {name!r}", name) for name in ("zero4", "", "../zero2", "llama", "missing.yaml", "zero2.yaml")),
    ("no", "empty", b""),
    ("no", "a list", b"- a\n"),
    ("no", "a scalar", b"zero2\n"),
    ("no", "binary", bytes(range(256))),
    ("no", "tabs", b"a:\n\tb: 1\n"),
    ("-", "JSON in YAML's name", json.dumps(LAUNCHED).encode()),
    ("no", "no fields", b"{}"),
    ("no", "processes: 0", {"num_processes": 0}),
    ("no", "processes: -1", {"num_processes": -1}),
    ("no", "processes: two", {"num_processes": "two"}),
    ("no", "processes: null", {"num_processes": None}),
    ("no", "machines: none", {"num_machines": 0}),
    ("no", "machines: many", {"num_machines": "many"}),
    ("no", "type: bogus", {"distributed_type": "BOGUS"}),
    ("no", "type: a list", {"distributed_type": ["NO"]}),
    ("no", "FSDP", {"distributed_type": "FSDP", "fsdp_config": {}}),
    ("no", "TPU", {"distributed_type": "XLA"}),
    ("no", "precision: bogus", {"mixed_precision": "fp7"}),
    ("no", "an unknown field", {"no_such": 1}),
    ("no", "environment: SageMaker", {"compute_environment": "AMAZON_SAGEMAKER"}),
    *(
        ("no", f"DeepSpeed: {config!r}", {"distributed_type": "DEEPSPEED", "deepspeed_config": config})
        for config in (None, "text", [], {"zero_stage": 0}, {"zero_stage": 7}, {"zero_stage": "two"},
            {"deepspeed_config_file": "missing.json"}, {"deepspeed_config_file": "recipe.yaml"},
            {"deepspeed_config_file": "rows.jsonl"})
    ),
]  # fmt: skip

# Adapters: what must come of `beft info` and of `beft merge`, and options of the merge.

ADAPTERS: list[tuple] = [
    ("ok", "ok", "good"),
    ("no", "no", "missing", remove("adapter")),
    ("no", "no", "empty folder", [remove("adapter"), folder("adapter")]),
    ("no", "no", "a file", [remove("adapter"), write("adapter", "a")]),
    ("no", "no", "no config", remove(ADAPTER)),
    ("no", "no", "config: empty", write(ADAPTER, "")),
    ("no", "no", "config: a list", write(ADAPTER, "[]")),
    ("no", "no", "config: binary", write(ADAPTER, bytes(range(256)))),
    ("no", "no", "config: a folder", [remove(ADAPTER), folder(ADAPTER)]),
    ("no", "no", "config: LoRA", edit(ADAPTER, peft_type="LORA")),
    ("no", "no", "config: no type", edit(ADAPTER, peft_type=...)),
    ("no", "no", "config: type of a list", edit(ADAPTER, peft_type=["BEFT"])),
    ("-", "-", "config: modules_to_save of text", edit(ADAPTER, modules_to_save="lm_head")),
    ("-", "-", "config: modules_to_save of numbers", edit(ADAPTER, modules_to_save=[1])),
    ("-", "no", "config: base of a number", edit(ADAPTER, base_model_name_or_path=7)),
    ("ok", "no", "config: no base", edit(ADAPTER, base_model_name_or_path=None)),
    ("-", "no", "config: targets of another model", edit(ADAPTER, target_modules=["c_attn"])),
    ("-", "-", "config: unknown fields", edit(ADAPTER, no_such=1)),
    ("ok", "no", "config: base not there", edit(ADAPTER, base_model_name_or_path="nowhere")),
    ("no", "no", "weights: missing", remove(WEIGHTS)),
    ("no", "no", "weights: empty", write(WEIGHTS, "")),
    ("no", "no", "weights: cut off", cut(WEIGHTS, 150)),
    ("no", "no", "weights: garbage", write(WEIGHTS, os.urandom(400))),
    ("no", "no", "weights: a folder", [remove(WEIGHTS), folder(WEIGHTS)]),
    ("no", "no", "weights: pickled", move(WEIGHTS, "adapter/adapter_model.bin")),
    ("no", "no", "weights: NaN", tensors(WEIGHTS, each(lambda values: values * float("nan")))),
    ("no", "no", "weights: no tensor", tensors(WEIGHTS, lambda content: {})),
    ("no", "no", "weights: LoRA's", tensors(WEIGHTS, lambda c: {k.replace("beft_bias", "lora_A.weight"): v for k, v in c.items()})),
    ("no", "no", "weights: one more that is foreign", tensors(WEIGHTS, lambda c: {**c, "more": torch.ones(1)})),
    ("-", "no", "weights: shorter", tensors(WEIGHTS, each(lambda values: values[..., :2]))),
    ("-", "no", "weights: longer", tensors(WEIGHTS, each(lambda values: values.repeat(1, 2)))),
    ("-", "no", "weights: scalars", tensors(WEIGHTS, each(lambda values: values.sum()))),
    ("-", "no", "weights: no elements", tensors(WEIGHTS, each(lambda values: values[..., :0]))),
    ("-", "-", "weights: integers", tensors(WEIGHTS, each(torch.Tensor.int))),
    ("-", "no", "weights: a layer too far", tensors(WEIGHTS, lambda c: {k.replace("layers.1", "layers.9"): v for k, v in c.items()})),
    ("-", "-", "weights: a layer missing", tensors(WEIGHTS, lambda c: dict(list(c.items())[:1]))),
    ("-", "no", "weights: of a norm", tensors(WEIGHTS, lambda c: {k.replace("self_attn.v_proj", "input_layernorm"): v for k, v in c.items()})),
    ("-", "no", "weights: of the MLP", tensors(WEIGHTS, lambda c: {k.replace("self_attn.v_proj", "mlp.down_proj"): v.repeat(1, 2) for k, v in c.items()})),
    ("ok", "ok", "scores: missing", remove("adapter/beft_scores.json")),
    ("no", "-", "scores: garbage", write("adapter/beft_scores.json", "{")),
    ("no", "-", "scores: a list", write("adapter/beft_scores.json", "[]")),
    ("no", "-", "scores: no terms", edit("adapter/beft_scores.json", terms=...)),
    ("no", "-", "scores: terms of text", edit("adapter/beft_scores.json", terms="value")),
    ("-", "-", "scores: another term", edit("adapter/beft_scores.json", selected="query")),
    ("-", "-", "scores: markup", edit("adapter/beft_scores.json", versions={"[/b]": "[bold"})),
    ("-", "-", "scores: versions of a list", edit("adapter/beft_scores.json", versions=[1])),
    ("-", "-", "scores: quantised by nonsense", edit("adapter/beft_scores.json", quantization={"load_in_9bit": True})),
    ("-", "-", "a link to a secret", link("adapter/tokenizer.json", "../secret")),
    ("-", "-", "weights linked out of the folder", [move(WEIGHTS, "w"), link(WEIGHTS, "../w")]),
    ("-", "-", "config linked to a secret", link(ADAPTER, "../secret")),
    ("ok", "-", "a larger tokenizer", grown(to="adapter")),
]  # fmt: skip
MERGES: list[tuple] = [
    ("no", "output: the base", None, "--output llama"),
    ("no", "output: the adapter", None, "--output adapter"),
    ("no", "output: in the adapter", None, "--output adapter/merged"),
    ("no", "output: not empty", write("merged/a", "b"), ""),
    ("no", "output: a file", write("merged", "b"), ""),
    ("ok", "output: an empty folder", folder("merged"), ""),
    ("-", "output: a link to a folder", [folder("new"), link("merged", "new")], ""),
    ("no", "output: a link to nothing", link("merged", "nothing/there"), ""),
    ("no", "output: under a file", None, "--output recipe.yaml/merged"),
    ("no", "output: here", None, "--output ."),
    ("no", "output: an empty name", None, "--output="),
    ("no", "output: too long a name", None, f"--output {'x' * 300}"),
    ("ok", "output: brackets", None, "--output a/[b]/ü"),
    ("no", "base: missing", None, "--base nowhere"),
    ("no", "base: a file", None, f"--base {BASE}"),
    ("no", "base: another model", None, "--base opt"),
    ("no", "base: the adapter", None, "--base adapter"),
    ("no", "base: wider", model("m", "Llama", hidden_size=16, num_key_value_heads=1), "--base m"),
    ("no", "base: fewer layers", model("m", "Llama", num_hidden_layers=1, num_key_value_heads=1), "--base m"),
    ("no", "base: quantised", edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), ""),
    ("no", "base: no config", remove(CONFIG), ""),
    ("no", "base: config garbage", write(CONFIG, "{"), ""),
    ("no", "base: no weights", remove(BASE), ""),
    ("no", "base: weights empty", write(BASE, ""), ""),
    ("no", "base: weights cut off", cut(BASE, 3000), "--no-verify"),
    ("no", "base: weights garbage", write(BASE, os.urandom(4000)), "--no-verify"),
    ("no", "base: NaN", tensors(BASE, each(lambda values: values * float("nan"))), ""),
    ("no", "base: no values' weight", tensors(BASE, lambda c: {k: v for k, v in c.items() if "v_proj" not in k}), ""),
    ("no", "base: other widths than its config", tensors(BASE, each(lambda values: values[..., :4])), "--no-verify"),
    ("-", "base: of two dtypes", tensors(BASE, lambda c: {k: v.half() if "v_proj" in k else v for k, v in c.items()}), ""),
    ("-", "base: integers", tensors(BASE, each(torch.Tensor.int)), "--no-verify"),
    ("-", "base: 8-bit floats", tensors(BASE, each(lambda values: values.to(torch.float8_e4m3fn))), "--no-verify"),
    ("ok", "index: good", sharded(), ""),
    ("ok", "index: good, linked", sharded(), "--link"),
    ("no", "index: out of the folder", [write("victim.safetensors", "v"), sharded(more="../victim.safetensors")], "--no-verify"),
    ("no", "index: an absolute path", sharded(more="/etc/passwd"), "--no-verify"),
    ("no", "index: a number", sharded(more=7), "--no-verify"),
    ("no", "index: null", sharded(more=None), "--no-verify"),
    ("no", "index: a folder", [folder("llama/s"), sharded(more="s")], "--no-verify"),
    ("no", "index: a tensor that no shard has", sharded(more="a.safetensors"), "--no-verify"),
    ("no", "index: garbage", write(f"{BASE}.index.json", "{"), ""),
    ("no", "index: a list", write(f"{BASE}.index.json", "[]"), ""),
    ("no", "index: map of a list", write(f"{BASE}.index.json", '{"weight_map": []}'), ""),
    ("-", "a link to a secret", link("llama/notes.txt", "../secret"), ""),
    ("-", "a link to a folder above", link("llama/up", ".."), ""),
    ("-", "a link to nothing", link("llama/notes.txt", "nothing"), ""),
    ("-", "weights linked out of the folder", [move(BASE, "w"), link(BASE, "../w")], ""),
    ("ok", "output projection", None, "--output-projection"),
    ("no", "output projection of a fused model", model("m", "GPT2", n_embd=8, n_head=2), "--base m --output-projection"),
]  # fmt: skip

# Checkpoints: what must come of resuming, what happened to the run, and settings.

RESUMED = "--output_dir run --max_steps 4 --save_strategy steps --save_steps 2 --resume_from_checkpoint true"
AT_TWO = f"resume_from_checkpoint: {TWO}"
SCORES = f"{TWO}/beft_scores.json"
CHECKPOINTS: list[tuple] = [
    ("ok", "good", None),
    ("ok", "good, the older one", None, AT_TWO),
    *(
        ("ok", f"the newest damaged: {file}, {what}", change(f"{FOUR}/{file}"))
        for file in (MANIFEST, "adapter_model.safetensors", "trainer_state.json", "optimizer.pt", "beft_scores.json")
        for what, change in {"missing": remove, "garbage": partial(write, content="{"), "a list": partial(write, content="[]")}.items()
        if what != "a list" or file == MANIFEST
    ),
    *(
        ("ok", f"the newest's manifest: {name}={value!r}", edit(f"{FOUR}/{MANIFEST}", **{name: value}))
        for name, value in {"files": ..., "engine": 7, "processes": "one", "run": "text"}.items()
    ),
    ("ok", "the newest's manifest: files of text", edit(f"{FOUR}/{MANIFEST}", files={"a": "b"})),
    ("no", "the newest's manifest: files elsewhere", edit(f"{TWO}/{MANIFEST}", files={"../../secret": {"bytes": 1, "sha256": ""}}), AT_TWO),
    ("ok", "the newest empty", [remove(FOUR), folder(FOUR)]),
    ("ok", "the newest a file", [remove(FOUR), write(FOUR, "a")]),
    ("-", "the newest a link to nothing", [remove(FOUR), link(FOUR, "nothing")]),
    ("ok", "a name that is no number", folder("run/checkpoint-last")),
    ("ok", "a number beyond all", folder("run/checkpoint-99999999999999999999")),
    ("no", "none left", remove(TWO, FOUR)),
    ("no", "no run", remove("run")),
    ("no", "a file as run", [remove("run"), write("run", "a")]),
    ("no", "given: damaged", write(f"{TWO}/{MANIFEST}", "{"), AT_TWO),
    ("no", "given: no manifest", remove(f"{TWO}/{MANIFEST}"), AT_TWO),
    ("no", "given: missing", None, "resume_from_checkpoint: run/checkpoint-3"),
    ("no", "given: a file", None, "resume_from_checkpoint: rows.jsonl"),
    ("no", "given: an empty folder", folder("new"), "resume_from_checkpoint: new"),
    ("no", "given: the run itself", None, "resume_from_checkpoint: run"),
    ("no", "given: an adapter", None, "resume_from_checkpoint: adapter"),
    ("no", "given: yes", None, "resume_from_checkpoint: 'yes'"),
    ("ok", "given: true as text", None, "resume_from_checkpoint: 'true'"),
    *(
        ("no", f"whole by its manifest: {name}", [change, "seal"], AT_TWO)
        for name, change in {
            "one tensor missing": tensors(f"{TWO}/adapter_model.safetensors", lambda c: dict(list(c.items())[:1])),
            "tensors too many": tensors(f"{TWO}/adapter_model.safetensors", lambda c: {**c, "more": torch.ones(1)}),
            "another shape": tensors(f"{TWO}/adapter_model.safetensors", each(lambda values: values[..., :2])),
            "not finite": tensors(f"{TWO}/adapter_model.safetensors", each(lambda values: values / 0)),
            "weights of garbage": write(f"{TWO}/adapter_model.safetensors", "garbage"),
            "state of garbage": write(f"{TWO}/trainer_state.json", "{"),
            "state of a list": write(f"{TWO}/trainer_state.json", "[]"),
            "state without steps": edit(f"{TWO}/trainer_state.json", global_step=...),
            "steps of text": edit(f"{TWO}/trainer_state.json", global_step="two"),
            "scores of garbage": write(SCORES, "{"),
            "scores of a list": write(SCORES, "[]"),
            "another term": edit(SCORES, selected="query"),
            "a term that is none": edit(SCORES, selected="output"),
            "optimizer of garbage": write(f"{TWO}/optimizer.pt", "garbage"),
            "scheduler of garbage": write(f"{TWO}/scheduler.pt", "garbage"),
            "random state of garbage": write(f"{TWO}/rng_state.pth", "garbage"),
            "adapter config of garbage": write(f"{TWO}/adapter_config.json", "{"),
            "a LoRA adapter": edit(f"{TWO}/adapter_config.json", peft_type="LORA"),
        }.items()
    ),
    ("no", "another base", None, f"model_name_or_path: opt; {AT_TWO}"),
    ("no", "another base of the same shapes", tensors(BASE, each(lambda values: values + 0.1)), AT_TWO),
    ("ok", "the same base elsewhere", move("llama", "moved"), f"model_name_or_path: moved; {AT_TWO}"),
    ("no", "another term", None, f"bias_term: query; {AT_TWO}"),
    ("no", "other data", write("rows.jsonl", ROWS[::-1]), AT_TWO),
    ("no", "fewer rows", write("rows.jsonl", ROWS[:6]), AT_TWO),
    *(
        ("no", f"other settings: {setting}", None, f"{setting}; {AT_TWO}")
        for setting in ("seed: 7", "learning_rate: 1e-4", "max_steps: 6", "per_device_train_batch_size: 1", "dtype: bfloat16",
            "gradient_accumulation_steps: 2", "relative_learning_rate: 3e-2", "lr_scheduler_type: constant", "max_length: 32",
            "optim: sgd", "load_in_8bit: true")
    ),
    ("ok", "other settings, allowed", None, f"max_steps: 6; allow_changed_resume: true; {AT_TWO}"),
    ("no", "another base, allowed", None, f"model_name_or_path: opt; allow_changed_resume: true; {AT_TWO}"),
    ("no", "started anew in a finished run of another term", None, "output_dir: adapter; bias_term: query; resume_from_checkpoint: false"),
    ("no", "started anew in a base model", None, "output_dir: llama; resume_from_checkpoint: false"),
    ("-", "started anew in a damaged run", write("adapter/beft_scores.json", "{"), "output_dir: adapter; resume_from_checkpoint: false"),
]  # fmt: skip

# Command lines: the exit code, and the line.

USAGE = """
2 --nothing
2 nothing
2 check
2 train
2 info
2 merge
2 merge --adapter adapter
2 merge --adapter adapter --output merged --nothing
2 info adapter more
2 score recipe.yaml --steps 5,ten
2 score recipe.yaml --steps 0
2 score recipe.yaml --steps=
2 score recipe.yaml --method bogus
0 score recipe.yaml --steps 1,2
1 score recipe.yaml --steps 100
1 score recipe.yaml --output recipe.yaml
1 score recipe.yaml --model_name_or_path nowhere
1 check missing.yaml
1 train missing.yaml
1 check llama
1 train llama
1 check -
1 check recipe.yaml --seed
1 train recipe.yaml --seed
1 check recipe.yaml --seed x
1 train recipe.yaml --lerning_rate=1
1 check recipe.yaml --lerning_rate=1
1 check recipe.yaml stray
1 train recipe.yaml stray
1 check recipe.yaml -s 1
1 check recipe.yaml --config missing.yaml
1 train recipe.yaml --config missing.yaml
0 check recipe.yaml --seed=1 --seed=2
0 check recipe.yaml --json
0 check recipe.yaml --dry-run
1 check recipe.yaml --dry-run --max_steps x
1 check recipe.yaml --[b] [/b]
0 info run/checkpoint-2
1 info llama
1 info recipe.yaml
1 info [/b]
0 --help
"""


def seal() -> None:
    """Writes the manifest of a checkpoint anew, as if its files had always been so."""
    written = json.loads(Path(TWO, MANIFEST).read_text())
    Path(TWO, MANIFEST).unlink()
    from beft_trl.checkpoints import mark_complete

    mark_complete(TWO, written["engine"], written["processes"], written["run"])


def both(group: str, name: str, must: str, settings: str = "", prepare: Any = None, recipe: str = RECIPE) -> Case:
    """A case that `beft check` and `beft train` must see alike. Settings take the place of the recipe's."""
    for line in filter(None, settings.split("; ")):
        key = line.split(":")[0]
        recipe = re.sub(rf"^{re.escape(key)}:.*\n", "", recipe, flags=re.MULTILINE) + f"{line}\n"
    steps = prepare if isinstance(prepare, list) else [prepare] if prepare else []
    steps = [seal if step == "seal" else step for step in steps]
    commands = [["check", "recipe.yaml"], ["train", "recipe.yaml"]]
    return Case(group, name, must, commands, [write("recipe.yaml", recipe), *steps])


def cases() -> Iterator[Case]:
    """All of them."""
    for key, *values in FIELDS:
        for must, texts in zip(("no", "ok", "-"), values, strict=True):
            for text in filter(None, texts.split(" | ")):
                yield both("recipe", f"{key}: {text[:60]}", must, f"{key}: {text}")
    for line in TOGETHER.strip().splitlines():
        must, settings = line.split(maxsplit=1)
        yield both("recipe", settings, must, settings)
    for name, (must, content) in YAML.items():
        case = both("recipe as YAML", name, must)
        yield Case(**{**vars(case), "prepare": [write("recipe.yaml", content.replace(b"+", RECIPE.encode(), 1))]})
    for must, name, file, content, *settings in DATA:
        named = f"train_file: {json.dumps(file, ensure_ascii=False)}" if file else ""
        prepare = write(file, content) if file else content
        yield both("data", name, must, "; ".join(filter(None, [named, *settings])), prepare)
    for must, name, prepare, *settings in MODELS:
        yield both("model", name, must, *settings or [""], prepare=prepare)
    for must, name, content in LAUNCH:
        case = both("launch", name, must)
        launch = content if isinstance(content, str) else "launch.yaml"
        if launch != content:
            data = json.dumps({**LAUNCHED, **content}) if isinstance(content, dict) else content
            case.prepare.append(write(launch, data))
        yield Case(**{**vars(case), "commands": [[*command, "--launch", launch] for command in case.commands]})
    merging = ["merge", "--adapter", "adapter", "--output", "merged"]
    for told, merged, name, *prepare in ADAPTERS:
        steps = prepare[0] if prepare and isinstance(prepare[0], list) else prepare
        yield Case("adapter", f"info, {name}", told, [["info", "adapter"]], steps)
        yield Case("adapter", f"merge, {name}", merged, [merging], steps)
    for must, name, prepare, options in MERGES:
        steps = prepare if isinstance(prepare, list) else [prepare] if prepare else []
        yield Case("merge", name, must, [[*merging, *options.split()]], steps)
    for must, name, prepare, *settings in CHECKPOINTS:
        words = RESUMED.replace("--", "; ").split("; ")[1:]
        resumed = "; ".join(word.strip().replace(" ", ": ") for word in words)
        yield both("checkpoint", name, must, "; ".join([resumed, *settings]), prepare)
    for line in USAGE.strip().splitlines():
        code, _, words = line.partition(" ")
        yield Case("command line", f"beft {words}", code, [words.split()])


# Running them.


@dataclass
class Result:
    """What came of one command."""

    arguments: str
    code: int
    tracebacks: int
    error: str
    written: list[str]
    seconds: float
    where: str = ""


def forked(function: Callable[[], Any], place: Path, limit: float = LIMIT) -> int:
    """The exit code of a function that runs in a process of its own, with its output in files of `place`."""

    def start() -> None:
        os.setsid()
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(HOME=os.getcwd(), HF_DATASETS_CACHE=str(place / "cache"))
        datasets.config.HF_DATASETS_CACHE = str(place / "cache")
        function()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode or 0


def beft(arguments: list[str], place: Path) -> Result:
    """Runs `beft ARGUMENTS` in the current folder."""

    def command() -> None:
        sys.argv = ["beft", *arguments]
        cli.main()

    before, started = files(), time.monotonic()
    code = forked(command, place)
    output, errors = ((place / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    both_texts = output + errors
    told = re.findall(r"^(?:Error|Problem): ?(.*)", both_texts, re.MULTILINE) or both_texts.strip().splitlines()[-1:]
    frames = re.findall(r"beft_trl/(\w+\.py)\", line (\d+)", errors)
    after = files()
    written = sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name))
    return Result(
        " ".join(arguments),
        code,
        both_texts.count("Traceback (most recent call last)") + (code < 0),
        f"did not end in {LIMIT} s" if code == -signal.SIGKILL else " / ".join(told)[:1500],
        [name for name in written if not name.endswith("_beft.lock")],
        round(time.monotonic() - started, 2),
        ":".join(frames[-1]) if frames else "",
    )


def files() -> dict[str, tuple[int, int]]:
    """Size and time of every file below the current folder."""
    found = (Path(root, name) for root, _, names in os.walk(".") for name in names)
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def faults(case: Case, results: list[Result]) -> list[str]:
    """What is wrong with what came of a case, each with its kind first."""
    found = []
    for result in results:
        word = result.arguments.split()[0]
        if result.tracebacks:
            found.append(f"traceback: {word}, {result.where}")
        looks = word in ("check", "info")
        if (result.code or looks) and result.written:
            found.append(f"half-written: {word} left {', '.join(result.written[:4])}")
        wanted = {"ok": result.code == 0, "no": result.code == 1, "-": result.code in (0, 1)}
        if not wanted.get(case.must, str(result.code) == case.must):
            found.append(f"unexpected: {word} ended in {result.code} instead of {case.must}")
        if not result.code and word == "train":
            missing = {"adapter_config.json", "adapter_model.safetensors", "beft_scores.json"} - {
                Path(name).name for name in result.written
            }
            found += [f"half-written: train did not write {name}" for name in sorted(missing)]
        leaked = [name for name in result.written if Path(name).is_file() and SECRET.encode() in Path(name).read_bytes()]
        found += [f"half-written: {word} copied a secret to {name}" for name in leaked]
    if len({result.code for result in results}) > 1:
        found.append("disagree: " + ", ".join(f"{result.arguments.split()[0]} {result.code}" for result in results))
    return found


def run_case(number: int, scratch: Path) -> dict[str, Any]:
    """Prepares and runs a case in a copy of the world, in a worker process."""
    case, place = TABLE[number], scratch / str(number)
    shutil.copytree(scratch / "world", place / "work")
    os.chdir(place / "work")
    for step in case.prepare:
        step()
    results = []
    for arguments in case.commands:
        results.append(beft(arguments, place))
    found = faults(case, results)
    os.chdir(scratch)
    shutil.rmtree(place)
    record = {"group": case.group, "name": case.name, "must": case.must, "faults": found}
    return {**record, "commands": [asdict(result) for result in results]}


def report(records: list[dict[str, Any]]) -> None:
    """Prints a line for each group, and every fault with the error that came with it."""
    kinds = ("traceback", "disagree", "half-written", "unexpected")
    print("| group | cases | commands | exit 0 | exit 1 | exit 2 | " + " | ".join(kinds) + " |")
    print("|---|" + "---:|" * (5 + len(kinds)))
    for group in [*dict.fromkeys(record["group"] for record in records), "all"]:
        of_group = [record for record in records if group in (record["group"], "all")]
        codes = [command["code"] for record in of_group for command in record["commands"]]
        counts = [len(of_group), len(codes), *(codes.count(code) for code in range(3))]
        counts += [sum(any(f.startswith(kind) for f in record["faults"]) for record in of_group) for kind in kinds]
        print(f"| {group} | " + " | ".join(map(str, counts)) + " |")
    for record in records:
        for fault in record["faults"]:
            print(f"\n{record['group']}: {record['name']}\n  {fault}")
        if record["faults"]:
            for command in record["commands"]:
                print(f"  {command['code']} {command['arguments'].split()[0]}: {command['error'][:400]}")


TABLE = list(cases())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="cases to run, as in 'merge: *' or '*CSV*'")
    parser.add_argument("--output", type=Path, help="JSON file for what came of each command")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [
        number for number, case in enumerate(TABLE) if fnmatch.fnmatch(f"{case.group}: {case.name}", arguments.only)
    ]
    output = arguments.output and arguments.output.absolute()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "world").mkdir()
        if forked(lambda: world(scratch / "world"), scratch):
            sys.exit((scratch / "stderr").read_text())
        with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("fork")) as pool:
            records = list(pool.map(partial(run_case, scratch=scratch), chosen))
    report(records)
    if output:
        output.write_text(json.dumps(records, indent=1, ensure_ascii=False))
    sys.exit(any(record["faults"] for record in records))


if __name__ == "__main__":
    main()
