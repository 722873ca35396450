"""Runs the `beft` command on hundreds of hostile recipes, data files, models, launch files, adapters and checkpoints.

python examples/benchmarks/hostile.py --output hostile.json

Each case has a folder of its own with two tiny models, good rows, an adapter and a run with checkpoints. `ok` says
that its commands must succeed, `no` that they must be refused, `-` that either will do, and `late` that only the
weights or the run itself show the fault. No command may end in a traceback, `beft check` and `beft train` must agree
(but for `late`), and what is refused must leave the files as they were.
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
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "1000"
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path.home() / ".cache/torch_extensions")  # DeepSpeed builds for a minute

import datasets
import pyarrow
import torch
import transformers as hf
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from beft_trl import checkpoints, cli, merge  # noqa: F401  for the forks that run the commands
from beft_trl.cli import check, info, run  # noqa: F401


with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  which accelerate imports if there is one

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
CHAT = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 6
CONFIG, BASE, SCORES = "llama/config.json", "llama/model.safetensors", "adapter/beft_scores.json"
ADAPTER, WEIGHTS, MANIFEST = "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "beft_checkpoint.json"
TWO, FOUR = "run/checkpoint-2", "run/checkpoint-4"
AB = "prompt,completion\n"
LAUNCHED = {
    **{"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no"},
    **{"num_machines": 1, "num_processes": 1, "use_cpu": True},
}
M, OPT = "model_name_or_path: m", "model_name_or_path: opt"
LONG = {"prompt": "a" * 100, "completion": "b"}
HELD_OUT = "train_file: rows.jsonl; test_file: h.jsonl; eval_strategy: epoch"
RESUMED = "output_dir: run; max_steps: 4; save_strategy: steps; save_steps: 2; resume_from_checkpoint: "


# What a case does to its folder, when it is its turn.


def later(function: Callable) -> Callable[..., Prepare]:
    return lambda *values, **named: partial(function, *values, **named)


@later
def write(path: str, content: Any) -> None:
    """Writes text, bytes, or a list as JSON lines."""
    if isinstance(content, list):
        content = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in content)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


@later
def edit(path: str, change: str) -> None:
    """Sets keys of a JSON file, or removes `-key`."""
    content = json.loads(Path(path).read_text())
    content |= {} if change.startswith("-") else flow(change)
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if f"-{key}" != change}))


@later
def tensors(path: str, change: Callable[[str, torch.Tensor], dict]) -> None:
    """Puts in the place of every tensor of a file those that are made of it."""
    made = [change(name, values) for name, values in load_file(path).items()]
    content = {name: values.contiguous() for group in made for name, values in group.items()}
    save_file(content, path, metadata={"format": "pt"})


@later
def remove(*paths: str) -> None:
    for path in paths:
        shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)


@later
def folder(path: str) -> None:
    remove(path)()
    os.makedirs(path)


@later
def link(path: str, target: str) -> None:
    Path(path).unlink(missing_ok=True)
    os.symlink(target, path)


@later
def table(path: str, *rows: dict) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


@later
def tokenizer(path: str = "llama", more: int = 0, template: str | None = TEMPLATE) -> None:
    """Writes a tokenizer with a token for each byte, three of its own, and `more`."""
    tokens = ["<unk>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<more{number}>" for number in range(more)]
    bytewise = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, **names)
    made.add_tokens([f"<more{number}>" for number in range(more)])
    made.chat_template = template
    made.save_pretrained(path)


@later
def model(
    name: str, path: str = "m", auto: Any = hf.AutoModelForCausalLM, template: Any = None, **config: Any
) -> None:
    """Writes a model of a few thousand parameters with its tokenizer."""
    sizes = {"vocab_size": 264, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 128, "pad_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    made = auto.from_config(getattr(hf, f"{name}Config")(**{**sizes, **config}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)  # no bias is zero
    made.save_pretrained(path)
    tokenizer(path, template=template)()


@later
def sharded(**index: Any) -> None:
    """Puts the weights of the base in a shard that an index names."""
    names = dict.fromkeys(load_file(BASE), "a.safetensors")
    os.rename(BASE, "llama/a.safetensors")
    write(f"{BASE}.index.json", json.dumps({"metadata": {}, "weight_map": {**names, **index}}))()


@later
def sealed(*changes: Prepare) -> None:
    """Changes a checkpoint, and writes its manifest anew as if its files had always been so."""
    written = json.loads(Path(TWO, MANIFEST).read_text())
    remove(f"{TWO}/{MANIFEST}")()
    for change in changes:
        change()
    checkpoints.mark_complete(TWO, written["engine"], written["processes"], written["run"])


def flow(text: str) -> dict[str, Any]:
    return yaml.safe_load("{" + text + "}")


def world() -> None:
    """Writes what every case has a copy of."""
    model("Llama", "llama", template=TEMPLATE, num_key_value_heads=1)()
    model("OPT", "opt", word_embed_proj_dim=8, ffn_dim=16)()
    contents = {"rows.jsonl": ROWS, "h.jsonl": ROWS, "recipe.yaml": RECIPE, "secret": SECRET}
    contents |= {"rows.json": json.dumps(ROWS), "rows.csv": AB + "a,b\n" * 8, "launch.yaml": json.dumps(LAUNCHED)}
    for name, content in contents.items():
        write(name, content)()
    table("rows.parquet", *ROWS)()
    sys.argv = ["beft", "train", "recipe.yaml", *re.sub("(^|; )(.*?): ", r" --\2=", f"{RESUMED}false").split()]
    try:
        cli.main()
    finally:
        shutil.copytree("run", "adapter", ignore=shutil.ignore_patterns("checkpoint-*", "_*"))
        remove(*map(str, Path("run").glob("*.*")))()  # as if it had been killed at the end


# Recipes: settings that take the place of the good ones, in YAML as it stands.

SETTINGS = r"""
no  bias_term: output | bias_term: Value | bias_term: [value] | bias_term: {a: 1} | bias_term: '' | biasterm: value
ok  bias_term: key | bias_term: all | bias_term: auto | score_method: fisher
-   bias_term: null | model_name_or_path: ~/llama | disable_tqdm: text | learning_rate: 1e30
-   gradient_accumulation_steps: 1.0 | train_file: ~/rows.jsonl
no  bias_term: key; model_name_or_path: opt | score_method: gradient | score_method: [beft]
ok  bias_term: auto; model_name_or_path: opt; score_anchor: bias | torch_dtype: float32
ok  relative_learning_rate: 3e-2; model_name_or_path: opt
no  bias_term: auto; score_anchor: bias | bias_term: auto; score_anchor: mean | bias_term: auto; score_steps: 0
no  bias_term: auto; score_steps: 2.5 | bias_term: auto; score_steps: 1000 | bias_term: auto; score_learning_rate: 0
no  bias_term: auto; score_learning_rate: .nan | bias_term: auto; score_learning_rate: .inf | relative_learning_rate: 0
late bias_term: auto; score_learning_rate: 1e30
-   bias_term: auto; optim: sgd | relative_learning_rate: null | relative_learning_rate: 1e30
no  learning_rate: 0 | learning_rate: -1e-3 | learning_rate: .nan | learning_rate: .inf | learning_rate: fast
no  learning_rate: [1e-3] | learning_rate: {a: 1} | learning-rate: 1e-3 | lerning_rate: 1e-3
no  relative_learning_rate: .inf | learning_rate: 1e-3; relative_learning_rate: 0.1
ok  bias_layers: all | bias_layers: 1 | bias_layers: [0, 1] | bias_layers: 0-1; bias_term: auto | bias_layers: '0, 1'
no  bias_layers: lower | bias_layers: 2 | bias_layers: 1-9 | bias_layers: [] | bias_layers: null | bias_layers: -1
no  bias_layers: [a] | bias_layers: {a: 1} | bias_layers: 1-0 | bias_layers: true | num_train_epochs: many
ok  max_steps: -1; num_train_epochs: 1
-   bias_layers: 0.5
ok  learning_rate: 1e-3 | learning_rate: '0.01' | relative_learning_rate: 1e-1 | weight_decay: 0 | weight_decay: 0.1
no  weight_decay: -1 | weight_decay: none | relative_learning_rate: a tenth
no  max_steps: 1.5 | max_steps: many | max_steps: [2] | max_steps: 0; num_train_epochs: 0
-   max_steps: true | max_steps: 2e0 | max_steps: 0:02 | max_steps: 0b10
ok  max_steps: '2' | max_steps: 0x2 | max_steps: -1; num_train_epochs: 0.1
no  max_steps: -1; num_train_epochs: -1 | max_steps: -1; num_train_epochs: .nan | max_steps: -1; num_train_epochs: .inf
no  per_device_train_batch_size: 0 | per_device_train_batch_size: -2 | per_device_train_batch_size: auto
ok  per_device_train_batch_size: 1000 | gradient_accumulation_steps: 100 | max_length: null | max_length: 1_000_000
no  gradient_accumulation_steps: 0 | gradient_accumulation_steps: -1 | max_length: 0 | max_length: 1 | max_length: -1
no  max_length: 1.5 | max_length: long | dataloader_drop_last: true; per_device_train_batch_size: 100
no  dataloader_drop_last: true; per_device_train_batch_size: 100; max_steps: -1 | dataloader_num_workers: -1
no  warmup_steps: 1% | warmup_steps: .nan | lr_scheduler_type: bogus | lr_scheduler_kwargs: {no_such: 1}
ok  warmup_steps: 0.5 | warmup_steps: 1000 | lr_scheduler_type: polynomial | lr_scheduler_kwargs: '{}'
-   warmup_steps: -1 | lr_scheduler_type: cosine_with_min_lr | lr_scheduler_type: reduce_lr_on_plateau
no  lr_scheduler_kwargs: fast | lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: low}
ok  lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: 0.1}
-   lr_scheduler_type: cosine_with_min_lr; lr_scheduler_kwargs: {min_lr_rate: 1e-1}
no  optim: adam | optim: 1 | adam_beta1: 1.5 | adam_beta1: x | adam_epsilon: -1 | max_grad_norm: x
ok  optim: sgd | optim: adafactor | max_grad_norm: 0 | neftune_noise_alpha: 5 | label_smoothing_factor: 0.1
-   optim: galore_adamw | optim: lomo | optim: adamw_8bit | optim_args: nonsense | optim_args: a=b
-   max_grad_norm: .nan
no  seed: zero | seed: 1.5 | label_smoothing_factor: 2 | label_smoothing_factor: -1 | train_sampling_strategy: bogus
-   seed: -1 | seed: 4294967296 | seed: 1180591620717411303424 | seed: null | neftune_noise_alpha: -1
-   full_determinism: true
no  dtype: float33 | dtype: int8 | dtype: complex64 | bf16: maybe | bf16: true; fp16: true | log_level: loud
ok  dtype: auto | dtype: bfloat16
no  model_init_kwargs: {torch_dtype: bfloat16}
-   dtype: float16 | dtype: float64 | dtype: null | dtype: Tensor | bf16: true | bf16: null | fp16: true
no  model_init_kwargs: text | model_init_kwargs: [a] | model_init_kwargs: {dtype: bfloat16, torch_dtype: float16}
no  model_init_kwargs: {no_such: 1} | attn_implementation: bogus | gradient_checkpointing_kwargs: text
-   model_init_kwargs: {num_hidden_layers: 1} | model_init_kwargs: {num_hidden_layers: x} | use_liger_kernel: true
-   model_init_kwargs: {device_map: auto} | attn_implementation: flash_attention_2 | activation_offloading: true
ok  gradient_checkpointing: true | attn_implementation: eager
no  model_init_kwargs: '{"dtype": "bfloat16"}'
no  load_in_8bit: maybe | load_in_8bit: true; load_in_4bit: true | load_in_4bit: true; bnb_4bit_quant_type: fp5
-   load_in_8bit: true | load_in_4bit: true | load_in_4bit: true; bnb_4bit_quant_storage: float33
no  load_in_8bit: true; model_init_kwargs: {quantization_config: {load_in_4bit: true}}
no  save_strategy: sometimes | save_steps: x | save_total_limit: x | eval_strategy: steps | eval_strategy: bogus
-   save_strategy: no | save_strategy: best | save_strategy: steps; save_steps: 0
-   save_strategy: steps; save_steps: -1
-   save_strategy: steps; save_steps: 1.5 | save_strategy: steps; save_total_limit: -1 | eval_on_start: true
-   logging_steps: 0 | logging_steps: -1 | logging_steps: 0.5 | report_to: wandb | report_to: all
-   report_to: tensorboard
-   eval_strategy: steps; eval_steps: 0; test_file: h.jsonl
no  logging_steps: x | report_to: bogus
-   eval_strategy: steps; eval_steps: -1; test_file: h.jsonl | eval_strategy: no | eval_strategy: off
no  load_best_model_at_end: true; eval_strategy: epoch; save_strategy: steps; test_file: h.jsonl
ok  load_best_model_at_end: true; eval_strategy: epoch; save_strategy: epoch; test_file: h.jsonl
no  metric_for_best_model: a; load_best_model_at_end: 1; eval_strategy: epoch; save_strategy: epoch; test_file: h.jsonl
no  save_strategy: best; eval_strategy: epoch; test_file: h.jsonl; metric_for_best_model: eval_nothing
-   lr_scheduler_type: reduce_lr_on_plateau; eval_strategy: epoch; test_file: h.jsonl | metric_for_best_model: accuracy
ok  packing: true; max_length: 16 | packing_strategy: bfd | report_to: [] | save_strategy: epoch; save_total_limit: 1
-   packing: true; max_length: null | padding_free: true | pad_to_multiple_of: 0 | pad_to_multiple_of: -8
no  packing_strategy: bogus | truncation_mode: keep_middle | loss_type: bogus | assistant_only_loss: true
no  pad_token: <nope>
-   truncation_mode: keep_end | loss_type: chunked_nll | loss_type: dft | pad_token: '' | eos_token: <pad>
-   eos_token: <nope>
no  dataset_kwargs: text | dataset_num_proc: many | dataset_num_proc: -1 | chat_template_path: missing
-   dataset_kwargs: [a] | dataset_kwargs: {no_such: 1} | dataset_kwargs: {skip_prepare_dataset: true}
-   dataset_num_proc: 0
-   dataset_num_proc: 1000 | dataset_text_field: null | dataset_text_field: [a] | chat_template_path: opt
-   chat_template_path: rows.jsonl | completion_only_loss: false | dataset_train_split: '' | dataset_train_split: a/b
-   dataset_train_split: test | dataset_streaming: true | remove_unused_columns: false | label_names: [nothing]
no  deepspeed: missing.json | deepspeed: rows.jsonl | fsdp: full_shard | fsdp: bogus | accelerator_config: {no_such: 1}
-   deepspeed: zero2 | accelerator_config: text | parallelism_config: text | ddp_backend: bogus
-   torch_compile_backend: bogus
no  output_dir: recipe.yaml | output_dir: rows.jsonl/out | output_dir: /dev/null/out | output_dir: "a\0b"
ok  output_dir: ünï [b] $x/out | output_dir: ./out/ | output_dir: out] | output_dir: ~/out | trust_remote_code: true
-   output_dir: '' | output_dir: null | output_dir: 7 | push_to_hub: true | hub_model_id: a/b/c | lora_r: 16
no  use_peft: true | answers: -1 | answers: all | answers: 4 | resume_from_checkpoint: missing
no  resume_from_checkpoint: [a]
ok  test_file: rows.jsonl; dataset_test_split: train
ok  answers: 4; test_file: h.jsonl | answers: 1000; test_file: h.jsonl | test_file: h.jsonl
no  train_file: null | dataset_name: . | dataset_name: no/such | datasets: [{path: rows.jsonl, type: alpaca}]
no  datasets: text
-   datasets: [] | datasets: [1] | datasets: [{path: json, data_files: rows.jsonl}] | test_file: rows.jsonl
-   dataset_name: null
no  1: 2 | null: x | env: text | env: [a] | test_file: missing.jsonl
-   config: recipe.yaml | env: null | env: {HOSTILE: 1} | auto_find_batch_size: true | run_name: [a]
-   ignore_data_skip: maybe
"""
# Whole recipes, `+` for the good one.
RECIPES = {
    "no": {
        "empty": b"", "comments only": b"# a\n", "a scalar": b"llama\n", "one key": b"model_name_or_path: llama\n",
        "tab as indentation": b"+model_init_kwargs:\n\tdtype: float32\n", "unclosed quote": b"+run_name: 'a\n",
        "unclosed bracket": b"+run_name: [a\n", "percent sign": b"+run_name: %a\n", "NUL bytes": b"+\0\0",
        "UTF-16": RECIPE.encode("utf-16"), "Latin-1": b"+run_name: caf\xe9\n", "a list as key": b"+? [a, b]\n: 1\n",
        "two documents": b"+---\nseed: 1\n", "a key twice": b"+seed: 1\nseed: 2\n", "alias of nothing": b"+seed: *a\n",
        "a nested key twice": b"+model_init_kwargs: {dtype: float32, dtype: bfloat16}\n",
        "an alias of itself": b"+lr_scheduler_kwargs: &a {a: *a}\n",
        "a tag that runs code": b"+run_name: !!python/object/apply:os.system ['touch pwned']\n",
    },
    "ok": {
        "byte-order mark": b"\xef\xbb\xbf+", "Windows line ends": RECIPE.replace("\n", "\r\n").encode(),
        "anchor": b"+model_init_kwargs: &a {dtype: float32}\n", "JSON": json.dumps(yaml.safe_load(RECIPE)).encode(),
    },
    "-": {
        "aliases that grow": b"+run_name: [&a [x, x, x, x, x, x, x, x, x]" + b"".join(
            b", &%c [%s]" % (98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(6)) + b"]\n",
        "a date": b"+run_name: 2026-01-01\n", "an emoji": "+run_name: \N{PILE OF POO}\n".encode(),
    },
}  # fmt: skip

# Data: rows in YAML, six of the same, or with `+` one after six good ones.

COLUMNS = r"""
no  prompt: 7, completion: 8.5 | prompt: [a], completion: b | prompt: {a: 1}, completion: b
no  prompt: a, completion: true
no  + prompt: 7, completion: b | + prompt: null, completion: b | + prompt: a, completion: null | + prompt: a
-   + prompt: '', completion: b | + prompt: a, completion: '' | prompt: '', completion: ''
-   prompt: "a\0b", completion: c
-   prompt: a, completion: [{role: assistant, content: b}] | prompt: a, chosen: b, rejected: c
-   prompt: a, completion: b, image: c
no  question: a, answer: b | prompt: a | completion: a | label: 1 | text: 7 | text: [a] | text: {a: 1} | text: null
ok  text: unused, prompt: a, completion: b | prompt: a, completion: b, '': 1 | prompt: a, completion: b, tools: null
-   text: '' | text: a | text: </s><pad><unk> | text: a, messages: [{role: user, content: b}]
no  + text: null | + text: [a] | + text: a, prompt: b, completion: c | prompt: .nan, completion: a
ok  instruction: a, input: '', output: b | instruction: a, input: null, output: b | instruction: a, output: b
no  + instruction: null, output: b | + instruction: a, output: null | instruction: [a], output: b | + instruction: a
-   instruction: a, output: 7 | instruction: a, input: [b], output: c
-   instruction: a, input: b, output: c, history: []
no  messages: [] | messages: null | messages: a | messages: {role: user, content: a} | messages: [a, b] | messages: 7
no  messages: [{role: user}] | messages: [{content: a}] | messages: [{role: null, content: a}] | + messages: null
no  messages: [{role: user, content: 7}] | + messages: [{role: user, content: null}] | messages: '[{"role": "user"}]'
-   + messages: [] | messages: [{role: bot, content: a}] | messages: [{role: user, content: [{type: text, text: a}]}]
-   messages: [{role: user, content: a}] | messages: [{role: assistant, content: a}, {role: assistant, content: b}]
-   messages: [{role: user, content: a}, {role: assistant, content: b}], tools: '[{'
ok  messages: [{role: system, content: a}, {role: user, content: b}, {role: assistant, content: c}]
-   conversations: [{from: human, value: a}, {from: gpt, value: b}] | conversations: [{role: user, content: a}]
-   conversations: [{from: human, value: a}, {from: function_call, value: b}, {from: observation, value: c}]
-   conversations: [{from: human, value: a}, {from: martian, value: b}]
no  conversations: [] | conversations: [a, b]
no  conversations: [{from: human, value: null}] | conversations: [{from: human}] | conversations: a
ok  input_ids: [3, 4, 5, 6] | input_ids: [3, 4], labels: [3, 4] | + input_ids: [3, 4, 5], labels: [-100, -100, -100]
no  + input_ids: [3, 264, 5] | input_ids: [3, -4, 5] | input_ids: [3, 1099511627776] | input_ids: [3.5, 4.5]
no  input_ids: [a, b] | input_ids: 3 4 5 | input_ids: [[3, 4]] | input_ids: [3, null, 5] | input_ids: [] | input_ids: 7
no  input_ids: [3, 4], labels: [3, 264] | input_ids: [3, 4], labels: [-1, 4] | input_ids: [3, 4, 5], labels: [3, 4]
no  input_ids: [3, 4], labels: [-100, -100] | input_ids: [3, 4], labels: [3, -100] | input_ids: [3, 4], labels: '34'
no  + input_ids: [3, 4], labels: null | input_ids: [3, 4, 5], completion_mask: [1] | labels: [3, 4]
-   + input_ids: [] | input_ids: [3] | input_ids: [3, 4], completion_mask: [7, -1]
-   input_ids: [3, 4], attention_mask: [0, 0]
"""
GOOD = {row.split(":")[0]: flow(row) for row in ("text: a", "instruction: a, output: b", "input_ids: [3, 4, 5]")}
GOOD |= {"prompt": ROWS[0], "messages": CHAT[0]}
# Files: what must come of it, what it is, its name and content, and settings.
FILES: list[tuple] = [
    ("no", "broken last line", "a.jsonl", [*ROWS, '{"prompt": "a", \n']),
    ("no", "missing brace in line 3", "a.jsonl", [*ROWS[:2], '{"prompt": "a", "completion": "b"\n', *ROWS]),
    ("no", "trailing comma", "a.jsonl", '{"prompt": "a", "completion": "b",}\n' * 4),
    ("no", "single quotes", "a.jsonl", "{'prompt': 'a', 'completion': 'b'}\n" * 4),
    ("-", "two rows in a line", "a.jsonl", json.dumps(ROWS[0]) * 2),
    ("-", "a list over lines as .jsonl", "a.jsonl", json.dumps(ROWS, indent=2)),
    ("-", "rows under a key", "a.json", json.dumps({"data": ROWS})),
    ("-", "columns of lists", "a.json", json.dumps({"prompt": ["a"] * 4, "completion": ["b"] * 4})),
    ("no", "a list of lists", "a.json", "[[1, 2], [3]]"),
    ("-", "a list of texts", "a.json", '["a", "b"]'),
    ("no", "empty objects", "a.jsonl", "{}\n{}\n"),
    ("no", "null rows", "a.jsonl", "null\nnull\n"),
    ("no", "UTF-16", "a.jsonl", json.dumps(ROWS[0]).encode("utf-16")),
    ("no", "Latin-1", "a.jsonl", b'{"prompt": "caf\xe9", "completion": "a"}\n' * 4),
    ("ok", "byte-order mark", "a.jsonl", b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode()),
    ("no", "NUL bytes", "a.jsonl", b"\0" * 100),
    ("no", "whitespace only", "a.jsonl", " \n\n"),
    ("-", "empty lines between", "a.jsonl", ["\n", *ROWS, "\n\n", *ROWS]),
    ("-", "gzip as .jsonl", "a.jsonl", gzip.compress(json.dumps(ROWS).encode())),
    ("no", "half a surrogate", "a.jsonl", '{"prompt": "\\ud800", "completion": "a"}\n' * 3),
    ("-", "a key twice", "a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n' * 3),
    ("-", "nested a thousand times", "a.jsonl", '{"prompt": ' + "[" * 1000 + "]" * 1000 + "}\n"),
    ("no", "a prompt of turns among texts", "a.jsonl", [*ROWS, {"prompt": CHAT[0]["messages"], "completion": "a"}]),
    ("ok", "one row", "a.jsonl", ROWS[:1]),
    ("-", "upper-case suffix", "a.JSONL", ROWS),
    ("no", "text file", "a.txt", ROWS),
    ("no", "no suffix", "a", ROWS),
    ("no", "a link to itself", "", link("a.jsonl", "a.jsonl"), "train_file: a.jsonl"),
    ("no", "an address", "", None, "train_file: https://example.com/a.jsonl"),
    ("no", "a list of files", "", None, "train_file: [rows.jsonl, h.jsonl]"),
    *(("ok", f"named {name}", name, ROWS) for name in ("a b.jsonl", "[a]ü.jsonl", "a*?.jsonl", "a#b%20.jsonl")),
    ("-", "named a::b.jsonl", "a::b.jsonl", ROWS),
    ("no", "CSV, ragged", "a.csv", AB + "a,b\nc,d,e\n"),
    ("no", "CSV, unclosed quote", "a.csv", AB + 'a,"b\nc,d\n'),
    ("no", "CSV, semicolons", "a.csv", "prompt;completion\na;b\n"),
    ("no", "CSV, header only", "a.csv", AB),
    ("no", "CSV, no header", "a.csv", "a,b\nc,d\n"),
    ("-", "CSV, a column twice", "a.csv", "prompt,prompt,completion\na,b,c\n"),
    ("ok", "CSV, byte-order mark", "a.csv", b"\xef\xbb\xbf" + AB.encode() + b"a,b\n" * 4),
    ("no", "CSV, Latin-1", "a.csv", AB.encode() + b"caf\xe9,b\n"),
    ("ok", "CSV, the text NA", "a.csv", AB + "country code of Namibia,NA\n" * 4),
    ("-", "CSV, an empty cell", "a.csv", AB + "a,\nb,c\n"),
    ("-", "CSV, numbers", "a.csv", AB + "1,2\n" * 4),
    ("ok", "CSV, line end in quotes", "a.csv", AB + '"a\nb",c\n'),
    ("no", "CSV, NUL bytes", "a.csv", b"\0" * 50),
    ("no", "Parquet, no rows", "", table("a.parquet"), "train_file: a.parquet"),
    ("no", "Parquet, dates", "", table("a.parquet", {"text": date(2026, 1, 1)}), "train_file: a.parquet"),
    ("no", "Parquet, bytes", "", table("a.parquet", {"text": b"\xff\xfe"}), "train_file: a.parquet"),
    ("ok", "a long text", "a.jsonl", [{"text": "word " * 20_000}] * 6),
    ("no", "texts beyond the positions", "a.jsonl", [{"text": "word " * 100}], f"{OPT}; max_length: null"),
    ("no", "tokens beyond the positions", "a.jsonl", [{"input_ids": [3] * 500}], f"{OPT}; max_length: null"),
    ("no", "prompts that fill max_length", "a.jsonl", [LONG]),
    ("ok", "one prompt that fills max_length", "a.jsonl", [*ROWS, LONG]),
    ("no", "turns without a template", "a.jsonl", CHAT, OPT),
    ("no", "held out: broken", "h.jsonl", '{"prompt"\n', HELD_OUT),
    ("no", "held out: empty", "h.jsonl", "", HELD_OUT),
    ("no", "held out: unknown columns", "h.jsonl", [{"question": "a"}], HELD_OUT),
    ("no", "held out: null", "h.jsonl", [*ROWS, {"prompt": None, "completion": "a"}], HELD_OUT),
    ("no", "held out: masked", "h.jsonl", [LONG], HELD_OUT),
    ("no", "held out: tokens out of range", "h.jsonl", [{"input_ids": [3, 999]}], HELD_OUT),
    ("ok", "held out: of another kind", "h.csv", AB + "a,b\n", HELD_OUT.replace("h.jsonl", "h.csv")),
    ("-", "held out: in another format", "h.jsonl", [{"text": "a"}] * 6, HELD_OUT),
    ("no", "answers: no prompts", "h.jsonl", [{"text": "a"}], f"{HELD_OUT}; answers: 2"),
    ("-", "answers: turns", "h.jsonl", CHAT, f"{HELD_OUT}; answers: 2"),
    ("-", "answers: beyond the positions", "h.jsonl", [LONG] * 3, f"{HELD_OUT}; answers: 2; {OPT}; max_length: 110"),
]

# Damage that every file can have, and what must come of it, for adapters of `beft info` and of `beft merge`.

DAMAGE: dict[str, Callable[[str], Prepare]] = {
    "missing": remove,
    "empty": partial(write, content=""),
    "garbage": partial(write, content="{"),
    "list": partial(write, content="[]"),
    "binary": partial(write, content=bytes(range(256)) * 4),
    "folder": folder,
    "cut": lambda path: partial(os.truncate, path, 30),
    "nan": partial(tensors, change=lambda name, values: {name: values * float("nan")}),
    "narrow": partial(tensors, change=lambda name, values: {name: values[..., :2]}),
    "fewer": partial(tensors, change=lambda name, values: {name: values} if "layers.1" not in name else {}),
    "more": partial(tensors, change=lambda name, values: {name: values, "more": torch.ones(1)}),
    "none": partial(tensors, change=lambda name, values: {}),
    "moved": partial(tensors, change=lambda name, values: {name.replace("layers.1", "layers.9"): values}),
    "int": partial(tensors, change=lambda name, values: {name: values.int()}),
    "mixed": partial(tensors, change=lambda name, values: {name: values.half() if "v_proj" in name else values}),
}
DAMAGED = """
group    file                                  missing empty   garbage list    binary  folder  cut
recipe   recipe.yaml                           no      no      no      no      no      no      no
data     rows.jsonl                            no      no      no      no      no      no      no
data     rows.json                             no      no      no      no      no      no      no
data     rows.csv                              no      no      no      no      no      no      -
data     rows.parquet                          no      no      no      no      no      no      no
launch   launch.yaml                           no      no      no      no      no      no      -
model    llama/config.json                     no      no      no      no      no      no      no
model    llama/model.safetensors               no      no      no      no      no      no      no
model    llama/model.safetensors.index.json    no      no      no      no      no      no      no
model    llama/generation_config.json          ok      -       -       -       -       -       -
model    llama/tokenizer.json                  no      no      no      no      no      no      no
model    llama/tokenizer_config.json           -       no      no      no      no      -       no
model    llama/chat_template.jinja             ok      -       ok      ok      -       -       -
adapter  adapter/adapter_config.json           no/no   no/no   no/no   no/no   no/no   no/no   no/no
adapter  adapter/adapter_model.safetensors     no/no   no/no   no/no   no/no   no/no   no/no   no/no
adapter  adapter/beft_scores.json              ok/ok   no/-    no/-    no/-    no/-    -/-     no/-
merge    llama/config.json                     no      no      no      no      no      no      no
merge    llama/model.safetensors               no      no      no      no      no      no      no
merge    llama/model.safetensors.index.json    no      no      no      no      no      no      no
merge    llama/tokenizer.json                  -       -       -       -       -       -       -
newest   run/checkpoint-4/beft_checkpoint.json ok      ok      ok      ok      ok      ok      ok
newest   run/checkpoint-4/trainer_state.json   ok      ok      ok      ok      ok      ok      ok
newest   run/checkpoint-4/optimizer.pt         ok      ok      ok      ok      ok      ok      ok
given    run/checkpoint-2/beft_checkpoint.json no      no      no      no      no      no      no
given    run/checkpoint-2/trainer_state.json   no      no      no      no      no      no      no
given    run/checkpoint-2/optimizer.pt         -       no      no      no      no      no      no
given    run/checkpoint-2/rng_state.pth        -       no      no      no      no      -       no
given    run/checkpoint-2/scheduler.pt         -       no      no      no      no      -       no
given    run/checkpoint-2/beft_scores.json     no      no      no      no      no      no      no
given    run/checkpoint-2/adapter_config.json  -       -       -       -       -       -       -
given    run/checkpoint-2/adapter_model.safetensors no no      no      no      no      no      no
"""
TENSORS = """
group    file                                  nan     narrow  fewer   more    none    moved   int     mixed
model    llama/model.safetensors               late    no      no      -       no      no      -       -
adapter  adapter/adapter_model.safetensors     no/no   -/no    -/-     no/no   no/no   -/no    -/-     -/-
merge    llama/model.safetensors               no      no      no      -       no      no      -       -
given    run/checkpoint-2/adapter_model.safetensors no no      no      no      no      no      -       -
"""
# Keys of JSON and YAML files; `-key` is without one.
KEYS = [
    ("model", CONFIG, r"""
no  -model_type | model_type: llama17 | model_type: x, auto_map: {AutoConfig: a.B} | hidden_size: 0 | hidden_size: 16
no  num_attention_heads: 0 | num_hidden_layers: 0 | num_hidden_layers: 3 | vocab_size: -1 | vocab_size: 300
no  intermediate_size: null | hidden_act: bogus | rope_parameters: fast | num_key_value_heads: 3 | attention_bias: true
-   num_hidden_layers: 1 | dtype: bogus | dtype: bfloat16 | architectures: [GPT2LMHeadModel] | head_dim: four
-   quantization_config: {quant_method: bogus} | quantization_config: {quant_method: gptq, bits: 4}
"""),
    ("model", "llama/tokenizer_config.json", r"""
-   tokenizer_class: NoTokenizer | -pad_token | -eos_token | model_max_length: x | eos_token: <nope>
"""),
    ("launch", "launch.yaml", r"""
ok  use_cpu: true
no  num_processes: 0 | num_processes: -1 | num_processes: two | num_processes: null | num_machines: 0
no  num_machines: many
no  distributed_type: BOGUS | distributed_type: [NO] | distributed_type: FSDP, fsdp_config: {} | distributed_type: XLA
no  mixed_precision: fp7 | no_such: 1 | compute_environment: AMAZON_SAGEMAKER
no  distributed_type: DEEPSPEED, deepspeed_config: text | distributed_type: DEEPSPEED, deepspeed_config: []
no  distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 0} | distributed_type: DEEPSPEED
no  distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 7} | -distributed_type
no  distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: two}
no  distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: missing.json}
no  distributed_type: DEEPSPEED, deepspeed_config: {deepspeed_config_file: rows.jsonl}
"""),
    ("adapter", ADAPTER, r"""
no/no  peft_type: LORA | -peft_type | peft_type: [BEFT]
-/no   base_model_name_or_path: 7 | target_modules: [c_attn] | base_model_name_or_path: nowhere
ok/no  base_model_name_or_path: null | -base_model_name_or_path
-/-    modules_to_save: lm_head | modules_to_save: [1] | no_such: 1 | target_modules: null
"""),
    ("adapter", SCORES, r"""
no/-  -terms | terms: value | terms: {value: null}
-/-   selected: query | selected: 7 | versions: {'[/b]': '[bold'} | versions: [1] | quantization: {load_in_9bit: true}
"""),
    ("newest", f"{FOUR}/{MANIFEST}", r"""
ok  -files | engine: 7 | processes: one | run: text | files: {a: b} | files: {../../secret: {bytes: 1, sha256: ''}}
"""),
    ("given", f"{TWO}/trainer_state.json", "no  global_step: two | -global_step | global_step: -1"),
    ("given", f"{TWO}/adapter_config.json", "-  peft_type: LORA"),
    ("given", f"{TWO}/beft_scores.json", "no  selected: query | selected: output"),
]  # fmt: skip

# The rest: what must come of it, what it is, what happens to the folder, and settings or options.

MODELS: list[tuple] = [
    *(
        ("no", name, None, f"model_name_or_path: {name}")
        for name in ("nowhere", "nobody/nothing", "a/b/c", "''", "7", BASE, "adapter", "rows.jsonl")
    ),
    ("ok", "a slash at the end", None, "model_name_or_path: ./llama/"),
    ("ok", "a name with brackets", partial(os.renames, "llama", "my [b] ü"), "model_name_or_path: my [b] ü"),
    ("ok", "a link", link("linked", "llama"), "model_name_or_path: linked"),
    ("-", "a revision", None, "model_revision: nothing"),
    ("no", "an empty folder", folder("m"), M),
    ("no", "a Git LFS pointer", write(BASE, "version https://git-lfs.github.com/spec/v1\n"), ""),
    ("no", "pickled garbage", [remove(BASE), write("llama/pytorch_model.bin", b"cos\nsystem\n")], ""),
    ("no", "a shard missing", sharded(more="b.safetensors"), ""),
    ("ok", "tokenizer larger than the embedding", tokenizer(more=20), ""),
    ("ok", "tokenizer as large as the embedding", tokenizer(more=5), ""),
    ("no", "tokenizer larger, and used", [tokenizer(more=20), write("rows.jsonl", [{"text": "<more19> a"}] * 4)], ""),
    *(
        ("no", f"template {template}", [write("llama/chat_template.jinja", template), write("rows.jsonl", CHAT)], "")
        for template in ("{{ raise_exception('no') }}", "{% for", " ", "{{ messages | bogus }}", "{{ 1 // 0 }}",
            "{{ messages[5]['content'] + 'a' }}")
    ),
    ("no", "template_path with more tokens", [tokenizer("t", 20), write("rows.jsonl", CHAT)], "chat_template_path: t"),
    ("-", "template_path without one", [tokenizer("t", 9, None), write("rows.jsonl", CHAT)], "chat_template_path: t"),
    ("no", "template_path of garbage", [write("t", "{% for"), write("rows.jsonl", CHAT)], "chat_template_path: t"),
    ("no", "a state-space model", model("Mamba", state_size=4), M),
    ("no", "a fused order that is not known", model("OpenAIGPT", n_embd=8, n_head=2), M),
    ("no", "an encoder and decoder", model("T5", auto=hf.AutoModelForSeq2SeqLM, d_model=8), M),
    ("-", "an encoder", model("Bert", auto=hf.AutoModelForMaskedLM), M),
    ("ok", "fused projections", model("GPT2", n_embd=8, n_head=2, n_layer=2), M),
]  # fmt: skip
LAUNCHES = ("zero4", "", "../zero2", "llama", "missing.yaml", "zero2.yaml")
ADAPTERS: list[tuple] = [
    ("ok/ok", "good", None),
    ("no/no", "missing", remove("adapter")),
    ("no/no", "empty folder", folder("adapter")),
    ("no/no", "a file", [remove("adapter"), write("adapter", "a")]),
    ("no/no", "pickled weights", partial(os.renames, WEIGHTS, "adapter/adapter_model.bin")),
    ("no/no", "LoRA's tensors", tensors(WEIGHTS, lambda name, values: {name.replace("beft_bias", "lora_A"): values})),
    ("-/no", "wide tensors", tensors(WEIGHTS, lambda name, values: {name: values.repeat(1, 2)})),
    ("-/no", "scalars", tensors(WEIGHTS, lambda name, values: {name: values.sum()})),
    ("-/no", "tensors without elements", tensors(WEIGHTS, lambda name, values: {name: values[..., :0]})),
    ("-/no", "a bias of a norm", tensors(WEIGHTS, lambda name, values: {name.replace("v_proj", "norm"): values})),
    ("ok/-", "a tokenizer linked to a secret", link("adapter/tokenizer.json", "../secret")),
    ("-/-", "weights linked out of the folder", [partial(os.renames, WEIGHTS, "w"), link(WEIGHTS, "../w")]),
    ("no/no", "config linked to a secret", link(ADAPTER, "../secret")),
    ("ok/-", "a larger tokenizer", tokenizer("adapter", 20)),
]  # fmt: skip
MERGES: list[tuple] = [
    *(
        ("no", f"output {name}", None, f"--output={name}")
        for name in ("llama", "adapter", "recipe.yaml/merged", ".", "", "x" * 300)
    ),
    ("no", "output not empty", write("merged/a", "b"), ""),
    ("no", "output a file", write("merged", "b"), ""),
    ("ok", "output an empty folder", folder("merged"), ""),
    ("-", "output a link to a folder", [folder("new"), link("merged", "new")], ""),
    ("no", "output a link to nothing", link("merged", "nothing/there"), ""),
    ("ok", "output in the adapter", None, "--output=adapter/merged"),
    ("-", "output in the base", None, "--output=llama/merged"),
    ("ok", "output with brackets", None, "--output a/[b]/ü"),
    *(("no", f"base {name}", None, f"--base {name}") for name in ("nowhere", BASE, "opt", "adapter", "[/b]")),
    ("no", "base wider", model("Llama", hidden_size=16, num_key_value_heads=1), "--base m"),
    ("no", "base with fewer layers", model("Llama", num_hidden_layers=1, num_key_value_heads=1), "--base m"),
    ("no", "base fused", model("GPT2", n_embd=8, n_head=2), "--base m --output-projection"),
    ("no", "base quantised", edit(CONFIG, "quantization_config: {quant_method: gptq, bits: 4}"), ""),
    ("no", "base of other widths than its config", DAMAGE["narrow"](BASE), "--no-verify"),
    ("-", "base of integers", DAMAGE["int"](BASE), "--no-verify"),
    ("ok", "the base's own tokenizer larger than its embedding", tokenizer(more=20), ""),
    ("no", "the adapter's tokenizer larger than the embedding", tokenizer("adapter", 20), ""),
    ("ok", "index good, linked", sharded(), "--link"),
    *(
        ("no", f"index names {shard!r}", [folder("llama/s"), sharded(more=shard)], "--no-verify")
        for shard in ("../secret", "/etc/passwd", 7, None, "s", "a.safetensors", "", "b.safetensors")
    ),
    ("no", "index with a list as map", write(f"{BASE}.index.json", '{"weight_map": []}'), ""),
    ("-", "a link to a secret", link("llama/notes.txt", "../secret"), ""),
    ("-", "a link to the folder above", link("llama/up", ".."), ""),
    ("-", "a link to nothing", link("llama/notes.txt", "nothing"), ""),
    ("-", "weights linked out of the folder", [partial(os.renames, BASE, "w"), link(BASE, "../w")], ""),
    ("ok", "output projection", None, "--output-projection"),
]  # fmt: skip
CHECKPOINTS: list[tuple] = [
    *(("ok", f"good: {name}", None, name) for name in ("true", "'true'", TWO, FOUR, f"./{TWO}/")),
    *(("no", f"given {name}", None, name) for name in ("run/checkpoint-3", "rows.jsonl", "run", "adapter", "'yes'")),
    ("ok", "the newest empty", folder(FOUR), "true"),
    ("ok", "the newest a file", [remove(FOUR), write(FOUR, "a")], "true"),
    ("-", "the newest a link to nothing", [remove(FOUR), link(FOUR, "nothing")], "true"),
    ("ok", "a name that is no number", folder("run/checkpoint-last"), "true"),
    ("ok", "a number beyond all", folder("run/checkpoint-99999999999999999999"), "true"),
    ("no", "none left", remove(TWO, FOUR), "true"),
    ("no", "no run", remove("run"), "true"),
    ("no", "a file as run", [remove("run"), write("run", "a")], "true"),
    ("no", "files elsewhere", edit(f"{TWO}/{MANIFEST}", "files: {../../secret: {bytes: 1, sha256: ''}}"), TWO),
    ("no", "another base", None, f"{TWO}; {OPT}"),
    ("no", "another base, allowed", None, f"{TWO}; {OPT}; allow_changed_resume: true"),
    ("no", "other weights", tensors(BASE, lambda name, values: {name: values + 0.1}), TWO),
    ("ok", "the same base elsewhere", partial(os.renames, "llama", "m"), f"{TWO}; {M}"),
    ("no", "other data", write("rows.jsonl", ROWS[::-1]), TWO),
    ("no", "fewer rows", write("rows.jsonl", ROWS[:6]), TWO),
    *(
        ("no", f"other settings: {setting}", None, f"{TWO}; {setting}")
        for setting in (
            "bias_term: query", "seed: 7", "learning_rate: 1e-4", "max_steps: 6", "dtype: bfloat16", "optim: sgd",
            "gradient_accumulation_steps: 2", "relative_learning_rate: 3e-2", "max_length: 32", "load_in_8bit: true",
        )
    ),
    ("ok", "other settings, allowed", None, f"{TWO}; max_steps: 6; allow_changed_resume: true"),
    ("no", "anew in a finished run of another term", None, "false; output_dir: adapter; bias_term: query"),
    ("no", "anew in a base model", None, "false; output_dir: llama"),
    ("-", "anew in a damaged run", write(SCORES, "{"), "false; output_dir: adapter"),
]  # fmt: skip

# Command lines, by their exit code.

USAGE = """
2  --nothing | nothing | check | train | info | merge | merge --adapter adapter | info adapter more
2  merge --adapter adapter --output merged --nothing | score recipe.yaml --steps 5,ten | score recipe.yaml --steps 0
2  score recipe.yaml --steps=
0  --help | score recipe.yaml --steps 1,2 | check recipe.yaml --seed=1 --seed=2 | check recipe.yaml --json
0  check recipe.yaml --dry-run | info run/checkpoint-2
1  score recipe.yaml --steps 100 | score recipe.yaml --output recipe.yaml
1  score recipe.yaml --model_name_or_path nowhere | score recipe.yaml --score_method
1  check missing.yaml | train missing.yaml | check llama | train llama | check - | check recipe.yaml --seed
1  train recipe.yaml --seed | check recipe.yaml --seed x | check recipe.yaml --lerning_rate=1 | train recipe.yaml stray
1  train recipe.yaml --lerning_rate=1 | check recipe.yaml stray | check recipe.yaml -s 1
1  check recipe.yaml --config missing.yaml | train recipe.yaml --config missing.yaml | check recipe.yaml --[b] [/b]
1  check recipe.yaml --dry-run --max_steps x | info llama | info recipe.yaml | info [/b]
"""


@dataclass
class Case:
    """One hostile input: what must come of it, what to do to the folder, and the commands to run in it."""

    group: str
    name: str
    must: str
    commands: list[list[str]]
    prepare: list[Prepare]


def listed(prepare: Any) -> list[Prepare]:
    return prepare if isinstance(prepare, list) else [prepare] if prepare else []


def both(group: str, name: str, must: str, settings: str = "", prepare: Any = None, recipe: Any = RECIPE) -> Case:
    """A case that `beft check` and `beft train` must see alike."""
    for setting in filter(None, settings.split("; ")):
        key = setting.split(":")[0]
        recipe = re.sub(rf"^{re.escape(key)}:.*\n", "", recipe, flags=re.MULTILINE) + f"{setting}\n"
    commands = [["check", "recipe.yaml"], ["train", "recipe.yaml"]]
    return Case(group, name, must, commands, [write("recipe.yaml", recipe), *listed(prepare)])


def launched(must: str, name: str, launch: str, prepare: Any = None) -> Case:
    case = both("launch", name, must, prepare=prepare)
    case.commands = [[*command, "--launch", launch] for command in case.commands]
    return case


def of_adapter(must: str, name: str, prepare: Any) -> Iterator[Case]:
    told, merged = must.split("/")
    yield Case("adapter", f"info, {name}", told, [["info", "adapter"]], listed(prepare))
    yield Case("adapter", f"merge, {name}", merged, [MERGE], listed(prepare))


def damaged(group: str, file: str, what: str, must: str, change: Prepare) -> Iterator[Case]:
    """The cases of one damage to one file."""
    name = f"{Path(file).name}: {what}"
    prepare = [sharded(), change] if "index" in file else [change]
    if group == "adapter":
        yield from of_adapter(must, name, change)
    elif group == "merge":
        yield Case(group, name, must, [MERGE], prepare)
    elif group == "launch":
        yield launched(must, name, file, change)
    elif group == "newest" or MANIFEST in file:
        yield both("checkpoint", f"{group}, {name}", must, RESUMED + ("true" if group == "newest" else TWO), change)
    elif group == "given":
        yield both("checkpoint", f"{group}, {name}", must, RESUMED + TWO, sealed(change))
    else:
        settings = {"data": f"train_file: {file}", "model": "dtype: auto"}.get(group, "")
        yield both(group, name, must, settings, prepare)


def lines(text: str) -> Iterator[list[str]]:
    """What must come of each entry of a table in text, and the entry."""
    for line in text.strip().splitlines():
        must, entries = line.split(maxsplit=1)
        yield from ([must, entry] for entry in entries.split(" | "))


MERGE = ["merge", "--adapter", "adapter", "--output", "merged"]


def cases() -> Iterator[Case]:
    """All of them."""
    for must, settings in lines(SETTINGS):
        yield both("recipe", settings, must, settings)
    for must, contents in RECIPES.items():
        for name, content in contents.items():
            yield both("recipe", f"file: {name}", must, recipe=content.replace(b"+", RECIPE.encode(), 1))
    for must, entry in lines(COLUMNS):
        row = flow(entry.removeprefix("+ "))
        good = {**GOOD.get(next(iter(row)), {}), **({"labels": [3, 4, 5]} if "labels" in row else {})}
        content = [good] * 6 + [row] if entry.startswith("+") else [row] * 6
        yield both("data", entry, must, "train_file: a.jsonl", write("a.jsonl", content))
    for must, name, file, content, *settings in FILES:
        named = f"train_file: {json.dumps(file, ensure_ascii=False)}"
        prepare = write(file, content) if file else content
        yield both("data", f"file: {name}", must, "; ".join([named, *settings]), prepare)
    for text in (DAMAGED, TENSORS):
        (_, _, *kinds), *entries = map(str.split, text.strip().splitlines())
        for group, file, *musts in entries:
            for kind, must in zip(kinds, musts, strict=True):
                yield from damaged(group, file, kind, must, DAMAGE[kind](file))
    for group, file, text in KEYS:
        for must, change in lines(text):
            yield from damaged(group, file, change, must, edit(file, change))
    for must, name, prepare, settings in MODELS:
        yield both("model", name, must, settings, prepare)
    yield from (launched("no", f"named {name!r}", name) for name in LAUNCHES)
    for must, name, prepare in ADAPTERS:
        yield from of_adapter(must, name, prepare)
    for must, name, prepare, options in MERGES:
        yield Case("merge", name, must, [[*MERGE, *options.split()]], listed(prepare))
    for must, name, prepare, settings in CHECKPOINTS:
        yield both("checkpoint", name, must, RESUMED + settings, prepare)
    for code, entry in lines(USAGE):
        yield Case("command line", entry, code, [entry.split()], [])


# Running them.


@dataclass
class Result:
    """What came of one command."""

    arguments: str
    code: int
    tracebacks: int
    error: str
    where: str
    changed: list[str]
    seconds: float


def forked(function: Callable[[], Any], place: Path, folder: str) -> int:
    """The exit code of a function in a process of its own, in a folder of `place`, where its output goes."""

    def start() -> None:
        os.setsid()
        os.chdir(place / folder)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        datasets.config.HF_DATASETS_CACHE = str(place / "cache")
        os.environ.update(HOME=os.getcwd(), HF_DATASETS_CACHE=str(place / "cache"))
        function()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode or 0


def beft(arguments: list[str], place: Path) -> Result:
    """Runs `beft ARGUMENTS` in the folder of a case."""

    def command() -> None:
        sys.argv = ["beft", *arguments]
        cli.main()

    before, started = files(), time.monotonic()
    code, after = forked(command, place, "work"), files()
    text = "".join((place / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    told = re.findall(r"(?:Error|Problem): ?(.*)", text) or text.strip().splitlines()[-1:]
    frames = re.findall(r"beft_trl/([\w/]+\.py)\", line (\d+)", text)
    return Result(
        arguments=" ".join(arguments),
        code=code,
        tracebacks=text.count("Traceback (most recent call last)") + (code < 0),
        error=f"did not end in {LIMIT} s" if code == -signal.SIGKILL else " / ".join(told)[:2000] if code else "",
        where=":".join(frames[-1]) if frames else "",
        changed=sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name)),
        seconds=round(time.monotonic() - started, 2),
    )


def files() -> dict[str, tuple[int, int]]:
    """Size and time of every file below the current folder."""
    found = (Path(root, name) for root, _, names in os.walk(".") for name in names)
    kept = (path for path in found if path.name != "_beft.lock" and ".cache" not in path.parts)
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in kept}


def faults(case: Case, results: list[Result]) -> Iterator[str]:
    """What is wrong with what came of a case, each with its kind first."""
    for result in results:
        word = result.arguments.split()[0]
        if result.tracebacks:
            yield f"traceback: {word} {result.where}"
        if result.changed and (result.code or word in ("check", "info")):
            yield f"half-written: {word} left {', '.join(result.changed[:4])}"
        wanted = {"ok": [0], "no": [1], "-": [0, 1], "late": [int(word == "train")]}.get(case.must) or [int(case.must)]
        if result.code not in wanted:
            yield f"unexpected: {word} ended in {result.code} instead of {case.must}"
        names = {Path(name).name for name in result.changed}
        if word == "train" and not result.code and not names >= NEEDED:
            yield f"half-written: train wrote only {', '.join(sorted(names))}"
        for name in result.changed:
            if Path(name).is_file() and SECRET.encode() in Path(name).read_bytes():
                yield f"half-written: {word} copied a secret to {name}"
    if case.must != "late" and len({result.code for result in results}) > 1:
        yield f"disagree: {' and '.join(str(result.code) for result in results)}"


def run_case(number: int, scratch: Path) -> dict[str, Any]:
    """Prepares and runs a case in a copy of the world, in a worker process."""
    case, place = CASES[number], scratch / str(number)
    shutil.copytree(scratch / "world", place / "work")
    os.chdir(place / "work")
    for step in case.prepare:
        step()
    results = [beft(arguments, place) for arguments in case.commands]
    record = {"group": case.group, "name": case.name, "must": case.must, "faults": list(faults(case, results))}
    os.chdir(scratch)
    shutil.rmtree(place)
    return {**record, "commands": [asdict(result) for result in results]}


def report(records: list[dict[str, Any]]) -> None:
    """Prints a line for each group, and every fault with the errors that came with it."""
    kinds = ("traceback", "disagree", "half-written", "unexpected")
    print(f"| group | cases | exit 0 | 1 | 2 | {' | '.join(kinds)} |\n|---|{'---:|' * (4 + len(kinds))}")
    for group in [*dict.fromkeys(record["group"] for record in records), "all"]:
        chosen = [record for record in records if group in (record["group"], "all")]
        codes = [command["code"] for record in chosen for command in record["commands"]]
        counts = [len(chosen), *(codes.count(code) for code in range(3))]
        counts += [sum(kind in "".join(record["faults"]) for record in chosen) for kind in kinds]
        print(f"| {group} | {' | '.join(map(str, counts))} |")
    for record in filter(lambda record: record["faults"], records):
        print(f"\n{record['group']}: {record['name']}", *record["faults"], sep="\n  ")
        for command in record["commands"]:
            print(f"    {command['arguments'].split()[0]}, exit code {command['code']}: {command['error'][:300]}")


CASES = list(cases())
NEEDED = {Path(name).name for name in (ADAPTER, WEIGHTS, SCORES)}  # what a run must write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="cases to run: a part of their names, or 'merge: *index*'")
    parser.add_argument("--output", type=Path, help="JSON file for what came of each command")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    names = [f"{case.group}: {case.name}" for case in CASES]
    chosen = [n for n, name in enumerate(names) if args.only in name or fnmatch.fnmatch(name, args.only)]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "world").mkdir()
        if forked(world, scratch, "world"):
            sys.exit((scratch / "stderr").read_text())
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("fork")) as pool:
            records = list(pool.map(partial(run_case, scratch=scratch), chosen))
    report(records)
    if args.output:
        args.output.write_text(json.dumps(records, indent=1, ensure_ascii=False))
    sys.exit(any(record["faults"] for record in records))


if __name__ == "__main__":
    main()
