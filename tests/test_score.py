"""What a scoring pass finds, against computations without this package, and that it leaves no trace."""

import numpy as np
import pytest
import torch
from architectures import build
from conftest import full_batch, make_llama, make_opt, make_rows, make_tokenizer, tensors
from safetensors.torch import load_file
from transformers import TrainerCallback

from beft_trl import BiasScores, find_bias_sites


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


@pytest.mark.parametrize("packing", [False, True])
def test_packing_and_padding_free_batches_are_scored(make_trainer, packing):
    trainer = make_trainer(make_llama(), packing=packing, max_length=32)
    trainer.train()
    assert trainer.bias_scores.anchor == "activation"
    assert len(trainer.bias_scores.ranking) == 3


def test_scores_survive_their_file(make_trainer, tmp_path):
    trainer = make_trainer(make_llama())
    trainer.train()
    trainer.bias_scores.to_json(tmp_path / "scores.json")
    assert BiasScores.from_json(tmp_path / "scores.json") == trainer.bias_scores


@pytest.mark.parametrize(
    ("kind", "bias_term"),
    [
        ("llama", "auto"),
        ("llama", "all"),
        ("bloom", "value"),
        *(pytest.param(*each, marks=pytest.mark.matrix) for each in (("llama", "value"), ("llama", "key"))),
        pytest.param("bloom", "auto", marks=pytest.mark.matrix),
    ],
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


@pytest.mark.parametrize("steps", [0, -1])
def test_a_score_of_no_steps_is_refused(make_trainer, steps):
    with pytest.raises(ValueError, match=f"score_steps={steps} cannot score"):
        make_trainer().score(steps)


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
