import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from architectures import build
from conftest import make_llama, make_opt, make_rows, make_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from beft_trl import BeftSFTTrainer, BeftTrainerMixin, BiasScores, find_bias_sites
from beft_trl.tuner import delta


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("make_model", [make_opt, make_llama])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_phase_two_is_bit_equal_to_a_run_with_the_term_given(make_trainer, make_model, settings):
    auto = make_trainer(make_model(), **settings)
    auto.train()
    given = make_trainer(make_model(), bias_term=auto.selected_bias_term, **settings)
    given.train()
    assert losses(auto) == losses(given)
    found, expected = tensors(auto.model), tensors(given.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    metrics = ("loss", "grad_norm", "num_tokens", "entropy", "epoch", "step")
    assert [[entry.get(name) for name in metrics] for entry in auto.state.log_history if "loss" in entry] == [
        [entry.get(name) for name in metrics] for entry in given.state.log_history if "loss" in entry
    ]


@pytest.mark.parametrize("bias_term", ["auto", "value", "all"])
def test_only_the_chosen_deltas_change(make_trainer, bias_term):
    trainer = make_trainer(make_opt(), bias_term=bias_term)
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    chosen = {"all": ("q_proj", "v_proj")}.get(bias_term) or (
        {"query": "q_proj", "value": "v_proj"}[trainer.selected_bias_term],
    )
    moved = [name for name, tensor in after.items() if "beft_bias" in name and tensor.any()]
    assert len(moved) == 2 * len(chosen)
    assert all(any(projection in name for projection in chosen) for name in moved)
    base_weights = [name for name in after if "beft_bias" not in name]
    assert len(base_weights) > 30
    for name in base_weights:
        # A projection that lost its delta is no longer wrapped, so its weights go by their plain name.
        old = before[name] if name in before else before[name.replace("_proj.", "_proj.base_layer.")]
        assert torch.equal(after[name], old), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_train_in_fp32(make_trainer, dtype):
    trainer = make_trainer(make_llama().to(dtype), bias_term="value")
    trainer.train()
    assert trainer.model.dtype == dtype
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    state = trainer.optimizer.optimizer.state
    assert {values["exp_avg"].dtype for values in state.values()} == {torch.float32}


def full_batch(tokenizer, rows):
    """The rows as one padded batch, made without TRL."""
    sequences, labels = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        sequences.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([-100] * len(prompt) + completion))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(ids) for ids in sequences], batch_first=True),
    }


def test_scores_equal_those_of_native_biases_trained_without_the_package(make_trainer):
    """Plain OPT, its own q and v biases unfrozen, three AdamW steps on the one batch, scored with NumPy."""
    rows = make_rows(8)
    trainer = make_trainer(
        make_opt(), rows, per_device_train_batch_size=8, score_steps=3, score_learning_rate=1e-3, max_steps=3
    )
    trainer.train()

    model, batch = make_opt().train(), full_batch(make_tokenizer(), rows)
    sites = [site for site in find_bias_sites(model) if site.term != "key"]
    biases = {site: model.get_submodule(site.module).bias for site in sites}
    before = {site: bias.detach().numpy().copy() for site, bias in biases.items()}
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW([bias.requires_grad_() for bias in biases.values()], lr=1e-3, weight_decay=0.0)
    first_gradient = {}
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        for site, bias in biases.items():
            first_gradient.setdefault(site, bias.grad.numpy().copy())
        torch.nn.utils.clip_grad_norm_(biases.values(), 1.0)
        optimizer.step()

    scores = trainer.bias_scores
    assert scores.anchor == "bias" and scores.steps == 3
    for site in sites:
        b0, b1 = before[site].astype(np.float64), biases[site].detach().numpy().astype(np.float64)
        found = next(layer for layer in scores.terms[site.term].layers if layer.layer == site.layer)
        assert found.importance == pytest.approx(1 - b1 @ b0 / max(b1 @ b1, b0 @ b0), rel=2e-3)
        assert found.magnitude == pytest.approx(np.abs(b1 - b0).mean(), rel=1e-3)
        # Without updates every batch is the same one, so the mean over the batches is the first gradient's.
        assert found.fisher == pytest.approx(np.mean(first_gradient[site].astype(np.float64) ** 2), rel=1e-3)
    assert scores.terms["key"].dead and not scores.terms["key"].layers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activation_anchor_is_the_mean_output_over_real_tokens(make_trainer, checkpointing):
    rows = make_rows(8)
    batch = full_batch(make_tokenizer(), rows)
    assert not batch["attention_mask"].all()  # there is padding to leave out
    trainer = make_trainer(
        make_llama(),
        rows,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        gradient_checkpointing=checkpointing,
        score_steps=1,
        max_steps=2,
    )
    trainer.train()

    model = make_llama()
    outputs = {}
    sites = find_bias_sites(model)
    for site in sites:
        model.get_submodule(site.module).register_forward_hook(
            lambda module, args, output, site=site: outputs.__setitem__(site, output.detach())
        )
    model(**batch)
    real = batch["attention_mask"].bool()
    assert trainer.bias_scores.anchor == "activation"
    for site in sites:
        b0 = outputs[site][real].double().mean(0).numpy()
        found = next(layer for layer in trainer.bias_scores.terms[site.term].layers if layer.layer == site.layer)
        # One Adam step moves every element by the learning rate, so ||b1||^2 follows from the score and the anchor.
        assert found.magnitude == pytest.approx(1e-3, rel=1e-2)
        bound = 1e-3 * np.sqrt(len(b0)) / np.linalg.norm(b0)
        assert 0 < found.importance <= bound * 1.01
    # The anchor itself, by the projections of a second look: a score of a known change.
    value = next(site for site in sites if site.term == "value")
    gradients = native_gradients(make_llama(), value, batch)
    b0 = outputs[value][real].double().mean(0).numpy()
    b1 = b0 - 1e-3 * np.sign(gradients)
    found = trainer.bias_scores.terms["value"].layers[0].importance
    assert found == pytest.approx(1 - b1 @ b0 / max(b1 @ b1, b0 @ b0), rel=5e-3)


@pytest.mark.parametrize("bias_term", ["value", "auto", "all"])
def test_a_relative_learning_rate_is_that_share_of_the_size_of_the_outputs(make_trainer, bias_term):
    """Adam's first step moves every element by its learning rate."""
    rows = make_rows(8)
    trainer = make_trainer(
        make_llama(), rows, bias_term=bias_term, relative_learning_rate=0.03, max_steps=1, score_steps=1,
        per_device_train_batch_size=8, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()

    batch = full_batch(make_tokenizer(), rows)
    real = batch["attention_mask"].bool()
    model = make_llama()
    moved = 0
    for site in find_bias_sites(model):
        outputs = []
        keep = outputs.append
        hook = model.get_submodule(site.module).register_forward_hook(lambda *call, keep=keep: keep(call[-1].detach()))
        model(**batch)
        hook.remove()
        delta = tensors(trainer.model).get(f"base_model.model.{site.module}.beft_bias.default")
        if delta is not None:
            moved += 1
            size = outputs[0][real].double().square().mean().sqrt().item()
            assert delta.abs().max().item() == pytest.approx(0.03 * size, rel=1e-3)
    assert moved == (6 if bias_term == "all" else 2)
    rates = trainer.learning_rates.values()
    logged = trainer.state.log_history[-2]
    assert logged["learning_rate"] == pytest.approx(np.median(list(rates)))
    assert (logged["learning_rate_min"], logged["learning_rate_max"]) == pytest.approx((min(rates), max(rates)))
    assert all(group["params"] for group in trainer.optimizer.param_groups)


def test_a_relative_learning_rate_leaves_the_scores_alone(make_trainer):
    plain, relative = (make_trainer(relative_learning_rate=rate) for rate in (None, 0.03))
    plain.train()
    relative.train()
    assert relative.bias_scores == plain.bias_scores
    assert len(relative.learning_rates) == 2 and not plain.learning_rates


def test_a_relative_learning_rate_resumes(make_trainer, tmp_path):
    settings = {"relative_learning_rate": 0.03, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(**settings)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-3"
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(values, tensors(whole.model)[name]) for name, values in tensors(resumed.model).items())
    for allowed in (False, True):  # the optimizer's groups would be others
        with pytest.raises(ValueError, match="relative_learning_rate"):
            other = make_trainer(output_dir=str(tmp_path / "other"), allow_changed_resume=allowed)
            other.train(resume_from_checkpoint=checkpoint)


def native_gradients(model, site, batch):
    """The gradient of a zero bias put into a bias-free projection of a plain model."""
    projection = model.get_submodule(site.module)
    projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))
    model(**batch).loss.backward()
    return projection.bias.grad.double().numpy()


@pytest.mark.parametrize("planted", ["query", "key", "value"])
@pytest.mark.parametrize("method", ["beft", "magnitude", "fisher"])
def test_a_planted_term_is_chosen(make_trainer, planted, method):
    """The loss is cut off from the outputs of two projections, so the bias of the third is the only useful one."""
    trainer = make_trainer(make_llama(), score_method=method)
    for site in find_bias_sites(trainer.model):
        if site.term != planted:
            trainer.model.get_base_model().get_submodule(site.module).register_forward_hook(
                lambda module, args, output: output.detach()
            )
    trainer.train()
    assert trainer.selected_bias_term == trainer.bias_scores.ranking[0] == planted


def test_uniform_attention_leaves_the_value_as_the_only_useful_term(make_trainer):
    """Keys of zero make every score equal whatever the query: a model in which only the value bias can learn."""
    model = make_opt()
    for name, parameter in model.named_parameters():
        if ".k_proj." in name:
            torch.nn.init.zeros_(parameter)
    trainer = make_trainer(model, score_anchor="activation")
    trainer.train()
    assert trainer.bias_scores.ranking == ["value", "query"]
    assert trainer.bias_scores.terms["query"].score("importance") == 0
    assert trainer.bias_scores.terms["query"].score("fisher") == 0


def test_biases_shorter_than_their_change_are_no_anchor(make_trainer):
    def scored(size: float, anchor: str):
        model = make_opt()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.mul_(size)
        return make_trainer(model, score_anchor=anchor).score()

    by_bias = scored(1e-6, "bias")
    for term in by_bias.ranking:
        assert by_bias.terms[term].score("importance") == pytest.approx(1, abs=1e-2)
    assert scored(1e-6, "auto").anchor == "activation"
    assert scored(1.0, "auto").anchor == "bias"


def test_the_same_seed_gives_the_same_files(make_trainer, tmp_path):
    for name in ("first", "second"):
        trainer = make_trainer(make_llama(), output_dir=str(tmp_path / name))
        trainer.train()
        trainer.save_model()
    for file in ("beft_scores.json", "adapter_model.safetensors", "adapter_config.json", "beft_scores.png"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_the_output_folder_and_its_adapter_in_a_process_without_this_package(make_trainer, tmp_path):
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    trainer = make_trainer(str(base))
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    expected = {"adapter_config.json", "adapter_model.safetensors", "beft_scores.json", "beft_scores.png", "README.md"}
    assert expected <= {path.name for path in out.iterdir()}
    saved = load_file(out / "adapter_model.safetensors")
    projection = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[trainer.selected_bias_term]
    assert set(saved) == {
        f"base_model.model.model.layers.{layer}.self_attn.{projection}.beft_bias" for layer in (0, 1)
    }
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "BEFT" and config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == [f"model.layers.{layer}.self_attn.{projection}" for layer in (0, 1)]

    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "plain = base(input_ids=torch.arange(2, 12)[None]).logits\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2])\n"
        "logits = model(input_ids=torch.arange(2, 12)[None]).logits\n"
        "assert 'beft_trl' not in sys.modules\n"
        "assert not torch.equal(plain, logits)\n"
        "torch.save(logits.detach(), sys.argv[3])\n"
    )
    subprocess.run([sys.executable, "-c", program, base, out, tmp_path / "logits.pt"], check=True, cwd=tmp_path)
    trainer.model.eval()
    logits = trainer.model(input_ids=torch.arange(2, 12)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_resume_continues_with_the_recorded_selection_and_does_not_score(make_trainer, monkeypatch):
    whole = make_trainer(make_llama(), save_strategy="steps", save_steps=3, max_steps=6)
    whole.train()
    expected = tensors(whole.model)

    resumed = make_trainer(make_llama(), save_strategy="steps", save_steps=3, max_steps=6)
    monkeypatch.setattr(BeftTrainerMixin, "score", lambda self: pytest.fail("scored again"))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert resumed.selected_bias_term == whole.selected_bias_term
    assert resumed.bias_scores == whole.bias_scores
    found = tensors(resumed.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(resumed) == losses(whole)


def test_phase_one_is_no_run_of_the_users(make_trainer):
    """No callback, evaluation, save or hub push of the user's sees the scoring pass; its scores are logged once."""

    class Witness(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.events.append(("begin", state.max_steps, args.learning_rate))

        def on_step_end(self, args, state, control, **kwargs):
            self.events.append(("step", state.global_step))

        def on_evaluate(self, args, state, control, **kwargs):
            self.events.append(("evaluate", state.global_step))

        def on_save(self, args, state, control, **kwargs):
            self.events.append(("save", state.global_step))

    witness = Witness()
    trainer = make_trainer(
        make_llama(),
        trainer={"callbacks": [witness], "eval_dataset": make_rows(8, seed=1)},
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=7e-3,
    )
    trainer.train()
    assert witness.events == [
        ("begin", 2, 7e-3),
        *(event for step in (1, 2) for event in (("step", step), ("evaluate", step), ("save", step))),
    ]
    scored = [entry for entry in trainer.state.log_history if "beft/importance/value" in entry]
    assert len(scored) == 1 and scored[0]["step"] == 0
    assert scored[0]["beft/fisher/query"] == trainer.bias_scores.terms["query"].score("fisher")
    best, second = (trainer.bias_scores.terms[term].score("importance") for term in trainer.bias_scores.ranking[:2])
    assert scored[0]["beft/margin"] == pytest.approx(best / second)


def test_training_goes_on_from_a_second_train_call(make_trainer):
    trainer = make_trainer(make_llama())
    trainer.train()
    scores, first = trainer.bias_scores, tensors(trainer.model)
    trainer.train()
    assert trainer.bias_scores is scores
    second = tensors(trainer.model)
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packing", [False, True])
def test_packing_and_padding_free_batches_are_scored(make_trainer, packing):
    trainer = make_trainer(make_llama(), packing=packing, max_length=32)
    trainer.train()
    assert trainer.bias_scores.anchor == "activation"
    assert len(trainer.bias_scores.ranking) == 3


def test_a_plain_trainer_takes_the_mixin(make_config):
    class BeftTrainer(BeftTrainerMixin, Trainer):
        pass

    batch = full_batch(make_tokenizer(), make_rows(16))
    rows = [{name: values[index] for name, values in batch.items()} for index in range(16)]
    trainer = BeftTrainer(make_llama(), make_config(), train_dataset=rows)
    trainer.train()
    assert trainer.bias_scores.ranking and delta(trainer.model, trainer._deltas.sites[0]).any()


def test_scores_survive_their_file(make_trainer, tmp_path):
    trainer = make_trainer(make_llama())
    trainer.train()
    trainer.bias_scores.to_json(tmp_path / "scores.json")
    assert BiasScores.from_json(tmp_path / "scores.json") == trainer.bias_scores


def test_an_explicit_term_is_recorded_without_scores(make_trainer, tmp_path):
    trainer = make_trainer(make_llama(), bias_term="query")
    trainer.train()
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "beft_scores.json").read_text())
    assert record["selected"] == "query" and record["ranking"] == [] and record["method"] is None
    assert not (tmp_path / "out" / "beft_scores.png").exists()


def test_a_model_name_and_a_loaded_model_train_the_same(make_trainer, tmp_path):
    make_opt().save_pretrained(tmp_path / "base")
    by_name = make_trainer(str(tmp_path / "base"), output_dir=str(tmp_path / "a"))
    by_name.train()
    loaded = make_trainer(make_opt(), output_dir=str(tmp_path / "b"))
    loaded.train()
    assert isinstance(by_name, BeftSFTTrainer)
    assert losses(by_name) == losses(loaded)


def test_a_model_with_a_beft_adapter_goes_on_training_it(make_trainer, tmp_path):
    first = make_trainer(make_llama())
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapted = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    second = make_trainer(adapted, output_dir=str(tmp_path / "second"), learning_rate=1e-4, max_steps=2)
    second.train()
    assert second.selected_bias_term == first.selected_bias_term
    assert second.bias_scores.method is None
    second.save_model()
    after = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, values in after.items():
        assert 0 < (values - before[name]).abs().max() <= 2.1e-4
    other = next(term for term in ("query", "key", "value") if term != first.selected_bias_term)
    third = make_trainer(PeftModel.from_pretrained(make_llama(), tmp_path / "adapter"), bias_term=other)
    with pytest.raises(ValueError, match=f"adapter trains the {first.selected_bias_term} bias"):
        third.train()
    relative = make_trainer(
        PeftModel.from_pretrained(make_llama(), tmp_path / "adapter"), relative_learning_rate=0.03, max_steps=1,
        score_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    relative.train()  # from the trained values, at the rates of their layers
    relative.save_model(str(tmp_path / "relative"))
    for key, values in load_file(tmp_path / "relative" / "adapter_model.safetensors").items():
        rate = relative.learning_rates[key.removeprefix("base_model.model.").removesuffix(".beft_bias")]
        assert (values - before[key]).abs().max().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "bias_term"),
    [("llama", "auto"), ("llama", "value"), ("llama", "key"), ("llama", "all"), ("bloom", "auto"), ("bloom", "value")],
)
def test_a_score_after_training_keeps_what_was_trained(make_trainer, tmp_path, kind, bias_term):
    """Of all candidates, with the scores of a pass before training, and what is saved is what was trained."""
    make_model = {"llama": make_llama, "bloom": lambda: build("bloom")}[kind]
    before = make_trainer(make_model(), bias_term=bias_term).score()
    trainer = make_trainer(make_model(), bias_term=bias_term)
    trainer.train()
    trained, terms, selected = tensors(trainer.model), trainer.bias_scores.terms, trainer.selected_bias_term
    trainer.save_model(str(tmp_path / "saved"))
    after = trainer.score()
    assert after.terms == before.terms
    live = 2 if kind == "bloom" else 3
    assert after.ranking == before.ranking and len(after.ranking) == (live if bias_term in ("auto", "all") else 1)
    found = tensors(trainer.model)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert trainer.selected_bias_term == selected and trainer.bias_scores.terms == terms
    trainer.save_model(str(tmp_path / "again"))
    saved, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("saved", "again"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


def test_training_goes_on_after_a_score_as_without_one(make_trainer):
    models = []
    for scored in (False, True):
        trainer = make_trainer(make_llama())
        trainer.train()
        if scored:
            trainer.score()
        trainer.train()
        models.append(tensors(trainer.model))
    assert all(torch.equal(models[1][name], values) for name, values in models[0].items())


def test_a_loss_that_depends_on_no_bias_is_not_the_optimizers_fault(make_trainer):
    """Labels that are all masked, in rows that nothing has looked at."""
    trainer = make_trainer(make_llama())
    collate = trainer.data_collator

    def masked(rows):
        batch = collate(rows)
        batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    trainer.data_collator = masked
    with pytest.raises((ValueError, FloatingPointError), match="masked|loss is nan"):
        trainer.score()
