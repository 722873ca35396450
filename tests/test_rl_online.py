"""Reinforcement learning with one bias: rewards, generation and what vLLM is sent."""

import math
import re
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
import torch
from conftest import make_llama, make_opt, make_tokenizer
from datasets import Dataset
from rl_trainers import BATCH, COMMON, ONLINE, make, prompts, short_answers
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from beft_trl import BeftGRPOConfig, BeftGRPOTrainer, BeftRLOOConfig, BeftRLOOTrainer
from beft_trl.compat.rollouts import send_only_biases


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_only_learnt_tokens_count_for_the_size_of_the_outputs(kind, tmp_path, monkeypatch):
    """The mean over what the loss sees, by hand: prompts and completions, and no token of the generation."""
    scored = {"bias_term": "auto", "score_steps": 1, "max_steps": 1}
    trainer = make(kind, tmp_path / "out", settings=scored)
    path = "model.layers.0.self_attn.v_proj"
    sizes = []
    compute_loss = type(trainer).compute_loss

    def note(self, model, inputs, *others, **kwargs):
        if not sizes:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            plain, outputs = make_llama(), []
            plain.get_submodule(path).register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
            plain(input_ids=ids, attention_mask=mask)
            sizes.append(outputs[0][mask.bool()].square().mean().sqrt().item())
        return compute_loss(self, model, inputs, *others, **kwargs)

    monkeypatch.setattr(type(trainer), "compute_loss", note)
    # One step of Adam moves every number by the rate, so that the anchor's length follows from the importance.
    scores = trainer.score()
    site = next(layer for layer in scores.terms["value"].layers if layer.layer == 0)
    assert scores.anchor == "activation" and site.importance > 0
    relative = {"bias_term": "value", "learning_rate": None, "relative_learning_rate": 0.1}
    trainer = make(kind, tmp_path / "relative", settings=scored | relative)
    trainer.train()
    assert trainer.learning_rates[path] == pytest.approx(0.1 * sizes[0], rel=1e-4)


def async_of(values):
    async def reward(completions, **columns):
        return values

    return reward


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("values", [None, 1.0, ["good"] * 4, [[1.0]] * 4, [1.0, math.inf, 0.0, 0.0]], ids=str)
def test_rewards_of_a_wrong_kind_are_named(values, asynchronous, tmp_path):
    def reward(completions, **columns):
        return values

    trainer = make("GRPO", tmp_path, reward_funcs=[async_of(values) if asynchronous else reward])
    with pytest.raises((TypeError, ValueError), match=r"\breward returned\b"):
        trainer.train()


@pytest.mark.parametrize(
    "given", [3, [short_answers, 3], (short_answers,), [None]], ids=["number", "one of them", "tuple", "none"]
)
def test_what_gives_no_reward_is_refused(given, tmp_path):
    with pytest.raises(TypeError, match="reward_funcs has .*gives no reward. Give a function"):
        make("GRPO", tmp_path, reward_funcs=given)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_prompts_that_leave_no_position_for_an_answer_are_named(kind, turns, tmp_path):
    """OPT has 64 positions, answers have up to 6 tokens, and the template writes a word for the end of each turn."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} w0 {% endfor %}"
    words = lambda count: " ".join(["w1"] * (count - turns))  # noqa: E731
    rows = [*[words(58)] * 4, words(59)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}] if turns else text} for text in rows])
    trainer, config = {"GRPO": (BeftGRPOTrainer, BeftGRPOConfig), "RLOO": (BeftRLOOTrainer, BeftRLOOConfig)}[kind]
    settings = COMMON | ONLINE | {"max_steps": 1}

    def count(completions, **columns):
        return [float(number) for number in range(len(completions))]

    def make_with(rows):
        args = config(str(tmp_path), **settings)
        return trainer(make_opt(), count, args=args, train_dataset=rows, processing_class=tokenizer)

    message = "row 5 of the train dataset has 59 tokens.*max_completion_length=6.*65 in all.*64 positions"
    with pytest.raises(ValueError, match=message):
        make_with(rows)
    make_with(rows.select(range(4))).train()


def test_a_tied_head_is_not_cast(tmp_path):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True"):
        make("GRPO", tmp_path, make_llama(tie_word_embeddings=True), settings={"cast_lm_head_to_fp32": True})


def no_differences(completions, **columns):
    return [1.0] * len(completions)


def make_hopeless(folder, reward=no_differences, **settings):
    return BeftGRPOTrainer(
        make_llama(), reward, train_dataset=prompts(), processing_class=make_tokenizer(),
        args=BeftGRPOConfig(str(folder), **(COMMON | ONLINE | settings)),
    )  # fmt: skip


@pytest.mark.parametrize(("term", "error"), [("auto", ValueError), ("value", RuntimeError)])
def test_rewards_that_never_differ_are_named(tmp_path, term, error):
    with pytest.raises(error, match="num_generations"):
        make_hopeless(tmp_path, bias_term=term).train()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_rewards_that_do_not_differ_for_long_are_warned_of(tmp_path, caplog):
    def late(completions, trainer_state, **columns):
        return [float(number % 2) * (trainer_state.global_step >= 10) for number in range(len(completions))]

    caplog.set_level("WARNING", logger="beft_trl")
    make_hopeless(tmp_path, late, bias_term="value", max_steps=12).train()
    assert sum("Nothing was learnt in 10 steps. The rewards never differed" in text for text in caplog.messages) == 1


@pytest.mark.parametrize("steps", [0, 2])
def test_a_resumed_run_may_learn_nothing_more(steps, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "bias_term": "value"}
    first = make_hopeless(tmp_path, short_answers, **saved)
    first.train()
    second = make_hopeless(tmp_path, **saved)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{4 - steps}"))
    if not steps:
        found, expected = second.model.state_dict(), first.model.state_dict()
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_completions_of_which_no_token_counts_are_named(tmp_path):
    trainer = make_hopeless(
        tmp_path, short_answers, bias_term="value", mask_truncated_completions=True,
        generation_kwargs={"min_new_tokens": 6},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="mask_truncated_completions=True.*max_completion_length"):
        trainer.train()


def test_the_reference_is_the_base_with_the_biases_off(tmp_path):
    """TRL's estimate of the divergence is 0 in the first step, and only there; no second copy is in memory."""
    trainer = make("GRPO", tmp_path, settings={"max_steps": 3, "learning_rate": 0.3})
    trainer.train()
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == 0 and all(value > 0 for value in divergence[1:])
    assert trainer.ref_model is None
    base = sum(parameter.numel() for parameter in make_llama().parameters())
    deltas = sum(parameter.numel() for name, parameter in trainer.model.named_parameters() if "beft_bias" in name)
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) == base + deltas


def make_rollouts(trainer, sleeps):
    """TRL's sender of weights, without the engine that it sends them to."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation.enable_sleep_mode = trainer.model, sleeps
    generation._dist = DistributedBackend(trainer.accelerator)
    send_only_biases(generation, trainer._trained_biases)
    return dict(generation._iter_named_params())


@pytest.mark.parametrize("name", ["qwen2", "bloom"])
def test_what_vllm_is_sent_makes_the_base_the_trained_model(tmp_path, name):
    """The biases into the base as it was loaded, and all that an engine which slept is sent into a model of noise."""
    model = architectures.build(name)
    model.config.name_or_path = ""
    base = {key: values.clone() for key, values in model.state_dict().items()}
    trainer = make("GRPO", tmp_path, model, settings={"learning_rate": 0.1})
    trainer.train()
    with torch.inference_mode():
        expected = trainer.model.eval()(**BATCH).logits
    plain = architectures.build(name)
    biases = make_rollouts(trainer, sleeps=False)
    assert all(path.endswith(".bias") for path in biases) and len(biases) == plain.config.num_hidden_layers
    plain.load_state_dict(base | biases)
    with torch.inference_mode():
        torch.testing.assert_close(plain(**BATCH).logits, expected, rtol=0, atol=1e-5)
        assert not torch.equal(architectures.build(name)(**BATCH).logits, expected)
        noise = type(plain)(plain.config).eval()
        missing, unexpected = noise.load_state_dict(make_rollouts(trainer, sleeps=True), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        torch.testing.assert_close(noise(**BATCH).logits, expected, rtol=0, atol=1e-5)


def test_rollouts_of_a_base_without_biases_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="beft merge --base"):
        make("GRPO", tmp_path, settings={"use_vllm": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_vllm_answers_as_the_trained_model(tmp_path):
    """TRL's colocated engine, in a separate process: greedy tokens of vLLM against those of Transformers."""
    pytest.importorskip("vllm")
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}  # of a size that vLLM has
    make_llama(**heads, attention_bias=True, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [{"prompt": [{"role": "user", "content": f"w{number} w5"}], "completion": "w6"} for number in range(24)]
    Dataset.from_list(turns).to_json(tmp_path / "rows.jsonl")
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "rollouts.py"
    command = [sys.executable, script, "--base", tmp_path / "base", "--rows", tmp_path / "rows.jsonl"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    changed, same = map(int, re.findall(r"(\d+) of 20", run.stdout))
    assert changed > 0 and same == 20
