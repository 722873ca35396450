"""Median step time and peak memory of `BeftSFTTrainer` beside those of its two floors, on the same batches.

    python examples/benchmarks/step_time.py

- `bare`: a loop over the batches with PEFT's own BEFT tuner on the value projections and the model's own loss.
- `sft`: `trl.SFTTrainer` with the same adapter as its `peft_config`.
- `beft`: `BeftSFTTrainer`; its scoring pass is timed apart.

The model has the sizes of SmolLM2-135M (or those given) and random bf16 weights: time and memory do not depend on
their values. Each arm runs in a process of its own, the arms take turns, and the script prints ratios: on a shared
machine the seconds alone say little.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from peft import BeftConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from beft_trl import BeftSFTConfig, BeftSFTTrainer


VOCABULARY = 49152
ARMS = ("bare", "sft", "beft")


def make_model(args) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_value_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_rows(args) -> Dataset:
    """Random tokens, of which the last `--supervised` count for the loss."""
    ids = torch.randint(3, VOCABULARY, (args.batch * (args.steps + 1), args.length))
    labels = ids.clone()
    labels[:, : args.length - args.supervised] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class Stopwatch(TrainerCallback):
    def __init__(self):
        self.seconds, self.last = [], None

    def on_train_begin(self, *args, **kwargs):
        self.last = now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(now() - self.last)
        self.last += self.seconds[-1]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_bare(args) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = get_peft_model(make_model(args).to(device), BeftConfig(target_modules=["v_proj"])).train()
    deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(deltas, lr=3e-3, weight_decay=0.0)
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    rows, watch = make_rows(args), Stopwatch()
    watch.on_train_begin()
    for step in range(args.steps):
        batch = collate(rows.select(range(step * args.batch, (step + 1) * args.batch)).to_list())
        model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(deltas, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.on_step_end()
    return {"steps": watch.seconds}


def run_trainer(args, trainer_class, config_class, **kwargs) -> dict:
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=3e-3,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_length=None,
        )
        trainer = trainer_class(
            make_model(args),
            config,
            train_dataset=make_rows(args),
            processing_class=make_tokenizer(),
            callbacks=[watch],
            **kwargs,
        )
        started = now()
        output = trainer.train()
    measured = {"steps": watch.seconds}
    if trainer_class is BeftSFTTrainer:
        measured["scoring"] = now() - started - output.metrics["train_runtime"]
        measured["scoring_steps"] = trainer.bias_scores.steps
    return measured


def run_arm(args) -> dict:
    if args.arm == "bare":
        measured = run_bare(args)
    elif args.arm == "sft":
        measured = run_trainer(args, SFTTrainer, SFTConfig, peft_config=BeftConfig(target_modules=["v_proj"]))
    else:
        measured = run_trainer(args, BeftSFTTrainer, BeftSFTConfig)
    if torch.cuda.is_available():
        measured["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        measured["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("batch", 4),
        ("length", 128),
        ("supervised", 16),
        ("steps", 20),
        ("rounds", 2),
        ("layers", 30),
        ("hidden_size", 576),
        ("intermediate_size", 1536),
        ("heads", 9),
        ("key_value_heads", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arm", choices=ARMS, help="run one arm in this process and print its JSON")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args)))
        return
    results = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise SystemExit(run.stderr)
            results[arm].append(json.loads(run.stdout.splitlines()[-1]))
    # The first three steps of an arm pay for warming up.
    medians = {arm: statistics.median(s for run in runs for s in run["steps"][3:]) for arm, runs in results.items()}
    for arm, runs in results.items():
        peak = max(run["peak_bytes"] for run in runs)
        ratio = medians[arm] / medians["bare"]
        print(f"{arm:5} {medians[arm]:8.4f} s a step, {ratio:5.3f} of bare, peak {peak / 2**30:.2f} GiB")
    scoring = statistics.median(run["scoring"] for run in results["beft"])
    share = scoring / (medians["beft"] * args.steps)
    print(f"scoring pass {scoring:.2f} s for {results['beft'][0]['scoring_steps']} steps, {share:.1%} of this run")
    print(f"beft over sft: {medians['beft'] / medians['sft']:.3f}")


if __name__ == "__main__":
    main()
