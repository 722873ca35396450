"""Fine-tunes one attention bias term of a causal language model.

The demo, a real model without a hub or a GPU:

    accelerate launch examples/sft_opt.py

OPT from the hub, with one field of the recipe overridden:

    accelerate launch examples/sft_opt.py --config recipes/opt-125m/beft.yaml --learning_rate 1e-3

Every field of `BeftScriptArguments`, `BeftSFTConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig` can stand in
the recipe or on the command line.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from make_demo_model import DEMO_MODEL, make_demo_model
from transformers import AutoTokenizer
from trl import get_quantization_config

from beft_trl import BeftSFTTrainer
from beft_trl.recipe import held_out_rows, load_rows, parse_recipe


DEMO_RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


def main(script_args, training_args, model_args, dataset_args):
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    rows = load_rows(script_args, dataset_args, chat=tokenizer.chat_template is not None)
    held_out = held_out_rows(rows, script_args, training_args)

    trainer = BeftSFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=rows[script_args.dataset_train_split],
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
    )
    say = trainer.accelerator.print
    questions = held_out.select(range(min(script_args.answers, len(held_out)))) if held_out is not None else []

    # DeepSpeed has no engine to evaluate with before training.
    before = None if trainer.is_deepspeed_enabled else measure(trainer, held_out, questions)
    started = time.monotonic()
    output = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    scored = time.monotonic() - started - output.metrics["train_runtime"]
    after = measure(trainer, held_out, questions)
    trainer.save_model(training_args.output_dir)

    say(f"Ranking: {' > '.join(trainer.bias_scores.ranking) or 'not scored'}; trained: {trainer.selected_bias_term}")
    for name in after:
        say(f"Held-out {name}: {f'{before[name]:.3f} before, ' if before else ''}{after[name]:.3f} after")
    for row in range(min(3, len(questions))):
        say(f"  {text_of(questions[row]['prompt'])[-72:]!r}")
        say(f"    before {before.answers[row]!r}, after {after.answers[row]!r}" if before else after.answers[row])
    adapter = Path(training_args.output_dir) / "adapter_model.safetensors"
    if trainer.accelerator.is_main_process:
        say(f"Adapter: {adapter}, {adapter.stat().st_size:,} bytes")
    say(f"Seconds: {scored:.1f} scoring, {output.metrics['train_runtime']:.1f} training")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    # Gloo's threads may still be letting go of the last collective's tensors: a process that exits meanwhile aborts.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


class Measured(dict):
    """Held-out figures by name, and the answers behind them."""

    answers: list[str]


def measure(trainer, held_out, questions) -> Measured:
    """Loss on the held-out rows, and the share of questions answered exactly as their completion."""
    measured = Measured()
    if held_out is not None:
        measured["loss"] = trainer.evaluate()["eval_loss"]
    measured.answers = answer(trainer.model, trainer.processing_class, [row["prompt"] for row in questions])
    if len(questions):
        right = [text_of(row["completion"]).strip() for row in questions]
        measured["accuracy"] = sum(map(str.__eq__, right, measured.answers)) / len(right)
    return measured


@torch.inference_mode()
def answer(model, tokenizer, prompts, batch_size=16, max_new_tokens=8) -> list[str]:
    """Greedy answers to conversational or plain prompts."""
    model.eval()
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        chat = not isinstance(batch[0], str)
        if chat:
            batch = [
                tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in batch
            ]
        inputs = tokenizer(
            batch, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not chat
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def text_of(message) -> str:
    return message if isinstance(message, str) else message[-1]["content"]


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = parse_recipe(sys.argv[1:] or ["--config", str(DEMO_RECIPE)])
    with PartialState().main_process_first():
        if model_args.model_name_or_path == str(DEMO_MODEL) and not DEMO_MODEL.exists():
            make_demo_model()
    main(script_args, training_args, model_args, dataset_args)
