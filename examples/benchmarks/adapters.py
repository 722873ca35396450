"""Many adapters in one batch: the time of a forward pass with 1, 16, 256 and 1,024 of them, and of loading each.

python examples/benchmarks/adapters.py --model models/SmolLM2-135M-Instruct

A batch has as many rows as adapters, and at least 16, of 16 tokens. BEFT's biases of the value in the upper half of
the layers, next to PEFT's LoRA r=8 of query and value in all layers. The adapters are those of a run that has not
begun: time does not depend on their numbers.
"""

import argparse
import tempfile
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from tasks import QUICK_MODEL
from transformers import AutoModelForCausalLM

from beft_trl import add_adapter, find_bias_sites, load_adapter
from beft_trl.spans import sites_in
from beft_trl.tuner import attach_deltas


ROWS, LENGTH, TURNS = 16, 16, 3
LORA_UP_TO = 256  # PEFT takes longer for each adapter than for the one before


def main(arguments: argparse.Namespace) -> None:
    print("| adapters | rows | form | loading the last one, seconds | forward, of one adapter for all rows |")
    print("|---:|---:|---|---:|---:|")
    for kind in ("BEFT", "LoRA"):
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            made = make(kind, base)
            made.save_pretrained(folder)
            base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
            model, loaded = load_adapter(base, folder, adapter_name="adapter-0").eval(), 1
            for count in arguments.counts:
                if kind == "LoRA" and count > LORA_UP_TO:
                    break
                seconds = 0.0
                while loaded < count:
                    started = time.perf_counter()
                    if kind == "BEFT":
                        add_adapter(model, folder, f"adapter-{loaded}")
                    else:
                        model.load_adapter(folder, f"adapter-{loaded}")
                    seconds, loaded = time.perf_counter() - started, loaded + 1
                rows = max(count, ROWS)
                batch = torch.randint(3, 60, (rows, LENGTH))
                names = [f"adapter-{row % count}" for row in range(rows)]
                model.set_adapter("adapter-0")
                ratio = forward(model, batch, names) / forward(model, batch, None)
                print(f"| {count:,} | {rows:,} | {kind} | {seconds:.2f} | {ratio:.2f} |", flush=True)


def make(kind: str, base):
    if kind == "BEFT":
        sites = [site for site in sites_in(find_bias_sites(base), "upper") if site.term == "value"]
        return attach_deltas(base, sites)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def forward(model, batch, names) -> float:
    given = {} if names is None else {"adapter_names": names}
    seconds = []
    for _ in range(TURNS):
        started = time.perf_counter()
        model(input_ids=batch, use_cache=False, logits_to_keep=1, **given)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 16, 256, 1024])
    parser.add_argument("--quick", action="store_true", help="a few, of models/opt-quick")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.model, parsed.counts = QUICK_MODEL, [1, 4]
    main(parsed)
