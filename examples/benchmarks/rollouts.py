"""Whether vLLM, after GRPO has sent it the trained biases, answers as the trained model does in Transformers.

In an environment with vLLM and this package, and a base with biases (`beft merge --base NAME --output FOLDER`):

    python examples/benchmarks/rollouts.py --base FOLDER --rows examples/data/support_train.jsonl

It trains a few steps with TRL's colocated engine, for shorter answers, and compares greedy tokens before and after.
"""

import argparse
import functools
import os
import tempfile


PROMPTS, NEW_TOKENS = 20, 16


def main(arguments: argparse.Namespace) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as TRL's colocated mode needs it: the engine in this process
    import torch
    from datasets import load_dataset
    from tasks import QUIET
    from trl.generation import vllm_generation
    from vllm import SamplingParams

    from beft_trl import BeftGRPOConfig, BeftGRPOTrainer

    # In fp32 and without compiling, so that tokens can be compared.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    rows = load_dataset("json", data_files=arguments.rows, split="train").remove_columns("completion")
    with tempfile.TemporaryDirectory() as folder:
        args = BeftGRPOConfig(
            folder, max_steps=arguments.steps, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=8, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256,
            vllm_gpu_memory_utilization=0.3 if torch.cuda.is_available() else 0.1, relative_learning_rate=0.2,
            use_cpu=not torch.accelerator.is_available(), model_init_kwargs={"dtype": "float32"}, **QUIET,
        )  # fmt: skip
        trainer = BeftGRPOTrainer(arguments.base, short, args=args, train_dataset=rows)
        tokenizer, generation = trainer.processing_class, trainer.vllm_generation
        texts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in rows.select(range(PROMPTS))
        ]
        prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]

        def answers() -> list[list[int]]:
            greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
            return [
                list(each.outputs[0].token_ids) for each in generation.llm.generate(prompts, greedy, use_tqdm=False)
            ]

        before = answers()
        trainer.train()
        generation.sync_weights()
        after, model = answers(), trainer.model.eval()
        same = 0
        for prompt, answer in zip(prompts, after, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]], device=model.device)
            written = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            same += answer == written.tolist()
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    print(f"Answers that training changed: {changed} of {PROMPTS}; those of Transformers: {same} of {PROMPTS}.")


def short(completions, **columns) -> list[float]:
    return [-float(len(turns[0]["content"])) for turns in completions]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, default=3)
    main(parser.parse_args())
