"""What the frozen layers give is kept by row: the same losses and biases as without, and no layer computed twice."""

import copy

import pytest
import torch
from architectures import DECODERS, WITH_HEADS
from conftest import losses, make_llama, make_opt, make_rows, make_tokenizer
from datasets import Dataset
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    set_seed,
)

from beft_trl import BeftTrainer, BeftTrainingArguments, find_bias_sites
from beft_trl.frozen_cache import FrozenLayersCache, states_bytes
from beft_trl.spans import frozen_below, sites_in
from beft_trl.tuner import attach_deltas


LAYERS = 4
UPPER = {"bias_layers": "upper", "bias_term": "value", "per_device_train_batch_size": 2, "max_steps": 14}


def make_equal_rows(count: int = 6) -> Dataset:
    """Rows of one length, so that every batch has one shape, for which kernels round alike."""
    rows = make_rows(40)
    return rows.filter(lambda row: len(row["prompt"].split()) == 5).select(range(count))


def deltas(trainer):
    return {name: values.clone() for name, values in trainer.model.named_parameters() if "beft_bias" in name}


def calls_of_layers(model):
    """How often each layer's feed-forward part is computed from here on."""
    calls = [0] * LAYERS
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *call, number=number: calls.__setitem__(number, calls[number] + 1))
    return calls


def with_and_without(make_trainer, make_model, rows=None, trainer=None, **settings):
    """The trainers of two runs that differ in nothing but the cache."""
    runs = []
    for cached in (None, False):
        run = make_trainer(
            make_model(), rows if rows is not None else make_equal_rows(), copy.copy(trainer),
            cache_frozen_layers=cached, **{**UPPER, **settings},
        )  # fmt: skip
        run.train()
        runs.append(run)
    return runs


def assert_same(found, expected, tolerance=0.0):
    for loss, other in zip(losses(found), losses(expected), strict=True):
        assert loss == pytest.approx(other, rel=tolerance, abs=tolerance)
    for name, values in deltas(found).items():
        assert values.any()
        torch.testing.assert_close(values, deltas(expected)[name], rtol=0, atol=tolerance)


MODELS = {
    "llama": lambda: make_llama(num_hidden_layers=LAYERS),
    "opt": lambda: make_opt(num_hidden_layers=LAYERS),
    "one layer of bf16": lambda: make_llama(num_hidden_layers=LAYERS).to(torch.bfloat16),
}


@pytest.mark.parametrize(
    ("term", "name"),
    [("auto", "llama"), *(("value", name) for name in MODELS)]
    + [pytest.param("auto", name, marks=pytest.mark.matrix) for name in MODELS if name != "llama"],
)
def test_losses_and_biases_are_bit_equal(make_trainer, name, term):
    found, expected = with_and_without(make_trainer, MODELS[name], bias_term=term)
    assert found.frozen_cache.batches["skipped"] >= 7
    assert_same(found, expected)


def test_each_frozen_layer_is_computed_once_for_a_row_and_twice_more_as_a_proof(make_trainer):
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), make_equal_rows(6), **{**UPPER, "max_steps": 30})
    calls = calls_of_layers(trainer.model)
    trainer.train()  # ten epochs of three batches
    batches = trainer.frozen_cache.batches
    assert calls[2] == calls[3] == 30
    assert calls[0] == calls[1] == batches["computed"] == 3 + 2
    assert batches["skipped"] == 25


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(make_trainer, reentrant):
    found, expected = with_and_without(
        make_trainer, MODELS["llama"], gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert found.frozen_cache.batches["skipped"]
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rows_of_other_lengths_differ_by_rounding_only(make_trainer, name):
    found, expected = with_and_without(make_trainer, MODELS[name], make_rows(6), max_steps=24)
    assert found.frozen_cache.batches["skipped"] >= 10
    assert_same(found, expected, tolerance=2e-5)


@pytest.mark.parametrize("make", [make_llama, make_opt])
def test_padding_on_the_left(make_trainer, make):
    """A row's states depend on where it starts in a model that counts positions from the padding on."""

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": [[0] * (longest - len(row["input_ids"])) + row["input_ids"] for row in rows],
            "attention_mask": [[0] * (longest - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows],
            "labels": [[-100] * (longest - len(row["labels"])) + row["labels"] for row in rows],
        }
        return {name: torch.tensor(values) for name, values in batch.items()}

    found, expected = with_and_without(
        make_trainer, lambda: make(num_hidden_layers=LAYERS), make_rows(3), {"data_collator": collate}, max_steps=24
    )
    assert found.frozen_cache.batches["skipped"]
    assert_same(found, expected, tolerance=2e-5)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packed_rows(make_trainer, strategy):
    found, expected = with_and_without(
        make_trainer, MODELS["llama"], make_rows(16), packing=True, packing_strategy=strategy, max_length=24
    )
    assert found.frozen_cache.batches["skipped"]
    assert_same(found, expected, tolerance=2e-5)


def test_rows_one_after_the_other_without_padding_are_kept_by_row(make_trainer):
    found, expected = with_and_without(
        make_trainer, MODELS["llama"], make_rows(5), padding_free=True, max_length=None, max_steps=40
    )
    assert found.frozen_cache.batches["skipped"] >= 10
    rows = 5  # and not the pairs that a batch has put together
    assert len(found.frozen_cache._kept) == rows
    assert_same(found, expected, tolerance=2e-5)


def test_rows_that_see_each_other_end_it(make_trainer, caplog):
    """GPT-2 has no rule for rows one after the other: without flash attention each sees those before it."""
    rows = make_equal_rows(5)

    def make():
        set_seed(0)
        sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "n_inner": 48}
        none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, eos_token_id=1, **sizes, **none))

    def collate(batch):
        """One row, whose mask lets a token see all that come before it, and whose positions begin again."""
        tokens = [token for row in batch for token in row["input_ids"]]
        return {
            "input_ids": torch.tensor([tokens]),
            "labels": torch.tensor([[label for row in batch for label in row["labels"]]]),
            "attention_mask": torch.tensor([[n + 1 for n, row in enumerate(batch) for _ in row["input_ids"]]]),
        }

    found, expected = with_and_without(make_trainer, make, rows, {"data_collator": collate}, max_steps=24)
    assert "not the same twice" in caplog.text
    assert found.frozen_cache.bytes == 0
    assert_same(found, expected)


def test_a_layer_that_gives_other_numbers_each_time_ends_it(make_trainer, caplog):
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), make_equal_rows(), **UPPER)
    trainer.model.get_base_model().model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output + 0.1 * torch.randn_like(output)
    )
    calls = calls_of_layers(trainer.model)
    trainer.train()
    assert "not the same twice" in caplog.text
    assert calls[0] == calls[3]


def test_a_base_that_is_changed_between_two_runs_ends_it(make_trainer, caplog):
    runs = []
    for cached in (None, False):
        trainer = make_trainer(
            make_llama(num_hidden_layers=LAYERS), make_equal_rows(), **UPPER, cache_frozen_layers=cached
        )
        trainer.train()
        with torch.no_grad():
            trainer.model.get_base_model().model.layers[1].mlp.down_proj.weight.mul_(2)
        trainer.train()
        runs.append(trainer)
    assert "not the same twice" in caplog.text
    assert_same(*runs)


def test_evaluation_scores_and_the_best_model_are_those_without(make_trainer):
    settings = {
        "bias_term": "auto", "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4,
        "load_best_model_at_end": True, "max_steps": 12,
    }  # fmt: skip
    held_out = {"eval_dataset": make_equal_rows(8).select([6, 7])}
    found, expected = with_and_without(make_trainer, MODELS["llama"], None, held_out, **settings)
    for name in ("eval_loss", "loss"):
        logs = [[log[name] for log in run.state.log_history if name in log] for run in (found, expected)]
        assert logs[0] == logs[1]
    assert_same(found, expected)
    assert found.score().to_dict()["terms"] == expected.score().to_dict()["terms"]
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


def test_a_resumed_run_ends_where_the_whole_one_does(make_trainer, tmp_path):
    def make():
        settings = {**UPPER, "save_strategy": "steps", "save_steps": 7}
        return make_trainer(make_llama(num_hidden_layers=LAYERS), make_equal_rows(), **settings)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-7")
    assert resumed.frozen_cache.batches["skipped"]
    for name, values in deltas(resumed).items():
        assert torch.equal(values, deltas(whole)[name])


def test_answers_and_copies_of_the_model_know_nothing_of_it(make_trainer):
    found, expected = with_and_without(make_trainer, MODELS["llama"])
    assert not any("forward" in vars(layer) for layer in found.model.get_base_model().model.layers)
    tokens = torch.arange(3, 9)[None]
    for model in (found.model, copy.deepcopy(found.model)):
        answers = [each.eval().generate(input_ids=tokens, max_new_tokens=8) for each in (model, expected.model)]
        assert torch.equal(*answers)


def test_states_of_all_layers_are_those_without(make_trainer):
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), make_equal_rows(), **UPPER)
    trainer.train()
    model, tokens = trainer.model.eval(), torch.arange(3, 9)[None]
    plain = model(input_ids=tokens, output_hidden_states=True).hidden_states
    with trainer.frozen_cache.in_use():
        for _ in range(4):
            model(input_ids=tokens)
            found = model(input_ids=tokens, output_hidden_states=True).hidden_states
            assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


def test_an_encoder_is_cached_too(make_config):
    def run(cached):
        set_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes, **dropout))
        args = BeftTrainingArguments(
            make_config().output_dir, bias_term="value", bias_layers="upper", cache_frozen_layers=cached, max_steps=20,
            per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1,
        )  # fmt: skip
        types = [[0, 0, 0], [0, 1, 1]]  # two rows of the same tokens are not the same row
        rows = [
            {"input_ids": [5, 6, 7 + row % 3], "token_type_ids": types[row % 2], "labels": row % 2} for row in range(6)
        ]
        trainer = BeftTrainer(model, args, train_dataset=rows)
        trainer.train()
        return trainer

    found, expected = run(None), run(False)
    assert found.frozen_cache.batches["skipped"]
    assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "llava"])
def test_every_architecture_gives_the_logits_that_it_does_without(name):
    config = copy.deepcopy(DECODERS[name])
    for key, value in vars(config).items():
        if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            setattr(config, key, max(value, LAYERS))
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    if name == "gpt_neo":
        config.attention_layers = ["global", "local"] * 2
    if vars(config).get("layer_types"):
        config.layer_types = (config.layer_types * LAYERS)[:LAYERS]
    if name == "smollm3":
        config.no_rope_layers = [1, 0, 1, 0]
    set_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    sites = sites_in(find_bias_sites(base), "upper")
    model = attach_deltas(base, sites).eval()
    cache = FrozenLayersCache(frozen_below(model, sites), 2**20)
    tokens, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    plain = model(**batch).logits[mask.bool()]
    with cache.in_use():
        for _ in range(4):
            found = model(**batch).logits[mask.bool()]
    assert cache.batches == {"computed": 3, "skipped": 1}
    assert torch.equal(found, plain)


@pytest.mark.parametrize("quantization", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_quantised_base_is_cached_too(make_trainer, tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "base"
    make_llama(hidden_size=128, num_hidden_layers=LAYERS).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    given = {"quantization_config": BitsAndBytesConfig(**quantization)}
    found, expected = with_and_without(make_trainer, lambda: str(folder), None, given)
    assert found.frozen_cache.batches["skipped"] >= 7
    assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_states_are_in_pinned_memory_and_the_losses_those_without(make_trainer):
    found, expected = with_and_without(make_trainer, MODELS["llama"], use_cpu=False, bf16=True)
    assert found.frozen_cache.batches["skipped"] >= 7
    assert all(kept.states.is_pinned() for kept in found.frozen_cache._kept.values())
    assert_same(found, expected, tolerance=1e-3)


REFUSED = {
    "no frozen layers": ({"bias_layers": "all"}, {}),
    "neftune_noise_alpha=5": ({"neftune_noise_alpha": 5}, {}),
    "dropout=0.1": ({}, {"dropout": 0.1}),
    "layerdrop=0.2": ({}, {"layerdrop": 0.2}),
    "dropout=0.3 of OPTAttention": ({}, {"attention_dropout": 0.3}),
    "torch_compile": ({"torch_compile": True}, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_change_the_result_is_not_cached_and_an_error_if_asked_for(make_trainer, reason):
    settings, config = REFUSED[reason]
    settings = {**UPPER, **settings}
    trainer = make_trainer(make_opt(num_hidden_layers=LAYERS, **config), **settings)
    assert trainer.frozen_cache is None
    with pytest.raises(ValueError, match=reason):
        make_trainer(make_opt(num_hidden_layers=LAYERS, **config), cache_frozen_layers=True, **settings)


ROPE = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rows_whose_states_depend_on_the_longest_of_their_batch_are_not_cached(make_trainer, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]}
    model = make_llama(num_hidden_layers=LAYERS, max_position_embeddings=16, rope_parameters=rope)
    # What a row gives by itself, and next to a long one.
    short, long = torch.randint(3, 60, (1, 10)), torch.randint(3, 60, (1, 30))
    batch = torch.cat([functional.pad(short, (0, 20)), long])
    mask = functional.pad(torch.ones_like(short), (0, 20)), torch.ones_like(long)
    with torch.no_grad():
        by_itself = model.model(input_ids=short, output_hidden_states=True).hidden_states[1][0]
        next_to = model.model(input_ids=batch, attention_mask=torch.cat(mask), output_hidden_states=True)
    assert (next_to.hidden_states[1][0, :10] - by_itself).abs().max() > 1e-2
    with pytest.raises(ValueError, match="beyond 16 positions"):
        make_trainer(model, **UPPER, max_length=17, cache_frozen_layers=True)
    assert make_trainer(model, **UPPER, max_length=16).frozen_cache is not None


def test_rows_whose_states_depend_on_where_they_begin_are_not_cached(make_trainer):
    """Llama 4 scales the queries of its layers without positions by their number in the row of the batch."""
    set_seed(0)
    config = Llama4TextConfig(
        **{**WITH_HEADS, "num_hidden_layers": LAYERS}, num_local_experts=2, intermediate_size_mlp=48, floor_scale=4,
        attn_temperature_tuning=True, no_rope_layers=[1, 0] * 2, initializer_range=0.2, attention_chunk_size=8,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    first, row, positions = torch.randint(3, 60, (1, 6)), torch.randint(3, 60, (1, 6)), torch.arange(6)[None]
    with torch.no_grad():
        by_itself = model.model(input_ids=row, position_ids=positions, output_hidden_states=True)
        after = model.model(
            input_ids=torch.cat([first, row], 1), position_ids=positions.repeat(1, 2), output_hidden_states=True
        )
    assert (after.hidden_states[2][0, 6:] - by_itself.hidden_states[2][0]).abs().max() > 1e-3
    for reason in ("attention_chunk_size=8", "attn_temperature_tuning=True"):
        with pytest.raises(ValueError, match=reason):
            make_trainer(copy.deepcopy(model), **UPPER, cache_frozen_layers=True)
        model.config.attention_chunk_size = None


def test_a_stream_is_not_cached(make_trainer):
    settings = {**UPPER, "cache_frozen_layers": True}
    with pytest.raises(ValueError, match="stream"):
        make_trainer(make_opt(num_hidden_layers=LAYERS), make_rows().to_iterable_dataset(), **settings)


def test_states_that_do_not_fit_are_not_cached(make_trainer, monkeypatch):
    class Memory:
        available = 2000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    with pytest.raises(ValueError, match="GiB"):
        make_trainer(make_opt(num_hidden_layers=LAYERS), **UPPER, cache_frozen_layers=True)


def test_rows_that_never_come_back_are_given_up_at_the_limit(make_trainer, caplog):
    """Rows that are put together anew in each epoch fill the memory, and are of no use."""
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), make_equal_rows(), **UPPER)
    trainer.frozen_cache.limit = 1000
    trainer.train()
    assert "full before a row came back" in caplog.text
    assert trainer.frozen_cache.bytes == 0


def test_the_states_take_what_was_said(make_trainer):
    rows = make_equal_rows()
    trainer = make_trainer(make_llama(num_hidden_layers=LAYERS), rows, **UPPER)
    trainer.train()
    assert trainer.frozen_cache.bytes == states_bytes(trainer) == 6 * (5 + 2 + 1) * 32 * 4
