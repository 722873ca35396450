"""The precision that a run asks for is the one that it computes in, whatever ran before it."""

import pytest
import torch
from conftest import make_llama, make_rows

from beft_trl import find_bias_sites


def seen_dtypes(trainer):
    """The dtypes of what the projections give in training steps, filled when the trainer trains."""
    seen = set()
    for site in find_bias_sites(trainer.model):
        trainer.model.get_base_model().get_submodule(site.module).register_forward_hook(
            lambda module, args, output: seen.add(output.dtype) if torch.is_grad_enabled() else None
        )
    return seen


def figures(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("before", ["scoring", "evaluation", "scoring and evaluation", "training"])
def test_bf16_computes_in_bf16_after_anything(make_trainer, before):
    eval_dataset = {"eval_dataset": make_rows(8, seed=1)}
    trainer = make_trainer(
        make_llama(), trainer=eval_dataset, bf16=True, bias_term="auto" if "scoring" in before else "value"
    )
    if "evaluation" in before:
        trainer.evaluate()
    if before == "training":
        trainer.train()
    seen = seen_dtypes(trainer)
    trainer.train()
    assert seen == {torch.bfloat16}
    given, plain = (
        make_trainer(make_llama(), trainer=eval_dataset, bias_term=trainer.selected_bias_term, bf16=bf16)
        for bf16 in (True, False)
    )
    given.train()
    plain.train()
    assert figures(given) != figures(plain)  # the two precisions can be told apart
    if before != "training":
        assert figures(trainer) == figures(given)


def test_a_score_after_training_leaves_the_precision_of_the_next_run(make_trainer):
    runs = []
    for scored in (False, True):
        trainer = make_trainer(make_llama(), bf16=True)
        trainer.train()
        if scored:
            trainer.score()
        trainer.train()
        runs.append(figures(trainer))
    assert runs[0] == runs[1]


def test_fp16_on_a_cpu_is_refused(make_config):
    """accelerate would compute in fp32 without a word."""
    with pytest.raises(ValueError, match="fp16=True"):
        make_config(fp16=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_on_a_gpu_are_those_of_a_run_with_the_term_given(make_trainer, precision):
    """fp16 scales its gradients, which no CPU does."""
    settings = {"bf16": False, "use_cpu": False, precision: True}
    auto = make_trainer(make_llama(), **settings)
    seen = seen_dtypes(auto)
    auto.train()
    given = make_trainer(make_llama(), bias_term=auto.selected_bias_term, **settings)
    given.train()
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert figures(auto) == figures(given)
