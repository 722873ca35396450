"""Pretrains a small OPT on the text of the data folder: a model with native biases that is no random toy.

python examples/benchmarks/pretrain_opt.py --data-dir DATA --minutes 40

It learns from the SST-2 training sentences and the Alpaca instructions that no task of `tasks.py` uses. Every
other sentence ends in a verdict of a few words, drawn by its label: so the model knows of sentiment before it is asked
for it in the words of the task, as a real one does. It is written to models/opt-small with its own byte-level BPE
tokenizer.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tasks import FAST_BF16, QUICK_MODEL, QUICK_TASK, alpaca_prompt, load_task, pretraining_alpaca, pretraining_sst2
from tokenizers import ByteLevelBPETokenizer
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, set_seed


LENGTH, BATCH = 128, 16
VERDICTS = {
    "0": ("I hated it.", "A bad one.", "It was a waste of time."),
    "1": ("I loved it.", "A good one.", "It was worth the time."),
}
PEAK_LEARNING_RATE, WARMUP = 2e-3, 0.02


def texts_of(data_dir: Path) -> list[str]:
    draw = random.Random(0)
    texts = [
        f"{sentence} {draw.choice(VERDICTS[label])}" if index % 2 else sentence
        for index, (sentence, label) in enumerate(pretraining_sst2(data_dir))
    ]
    texts += [alpaca_prompt(row) + " " + row["output"] for row in pretraining_alpaca(data_dir)]
    draw.shuffle(texts)
    return texts


def main(texts: list[str], output: Path, minutes: float) -> None:
    set_seed(0)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<pad>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )
    tokens = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], 1]])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    held_out, rows = rows[::50], rows[torch.arange(len(rows)) % 50 != 0]

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=4096, hidden_size=256, ffn_dim=1024, num_hidden_layers=6, num_attention_heads=4,
            word_embed_proj_dim=256, max_position_embeddings=512, dropout=0.0, pad_token_id=0, bos_token_id=1,
            eos_token_id=1,
        )
    )  # fmt: skip
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    started, step, losses = time.monotonic(), 0, []
    while (passed := (time.monotonic() - started) / (60 * minutes)) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * passed))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(passed / WARMUP, cosine)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 250 == 0:
            mean = sum(losses[-250:]) / 250
            print(f"{passed:.0%} step {step} loss {mean:.3f} held out {nll(model, held_out):.3f}", flush=True)

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {
        "parameters": model.num_parameters(), "tokens": rows.numel(), "epochs": step * BATCH / len(rows),
        "steps": step, "minutes": minutes, "held_out_nll": nll(model, held_out), "uniform_nll": math.log(4096),
    }  # fmt: skip
    print(json.dumps(record))


@torch.inference_mode()
def nll(model: OPTForCausalLM, rows: torch.Tensor) -> float:
    batches = rows.split(BATCH)
    return sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches) / len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("models/opt-small"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--quick", action="store_true", help="models/opt-quick, of the demo's messages, in 5 seconds")
    arguments = parser.parse_args()
    if arguments.quick:
        rows = load_task(QUICK_TASK, None, seed=0).train
        main([row["prompt"] + row["completion"] for row in rows], Path(QUICK_MODEL), 5 / 60)
    else:
        main(texts_of(arguments.data_dir), arguments.output, arguments.minutes)
