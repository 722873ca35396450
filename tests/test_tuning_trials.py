"""The trials of a search next to ordinary runs of the same settings, and how they are judged and stopped."""

import pytest
import torch
from conftest import class_rows, full_batch, make_llama, make_opt, make_tokenizer, tensors
from safetensors.torch import load_file
from torch.nn import functional
from transformers import BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from beft_trl import BeftSFTConfig, BeftSFTTrainer, tune
from beft_trl.deltas import gather_deltas


pytest.importorskip("optuna")
from beft_trl.tuning.space import Settings  # noqa: E402
from beft_trl.tuning.split import Fold, split_rows  # noqa: E402
from beft_trl.tuning.trials import Bench, Stopped  # noqa: E402


SETTINGS = {
    "bias_layers": "upper",
    "relative_learning_rate": 0.1,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "score_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def four_layers(make=make_llama):
    return make(num_hidden_layers=4)


def never(step, loss):
    return None


@pytest.fixture
def make_bench(tmp_path):
    """A function that makes a bench on 24 rows, and its base."""

    def make(base=None, folds=None, rows=None, **settings):
        args = BeftSFTConfig(str(tmp_path / "bench"), **{**SETTINGS, **settings})
        rows = class_rows(24) if rows is None else rows
        trainer = BeftSFTTrainer(
            four_layers() if base is None else base, args, train_dataset=rows, processing_class=make_tokenizer()
        )
        completions = [row["completion"] for row in rows]
        return Bench(trainer, split_rows(completions, folds, seed=0))

    return make


def ordinary(settings, rows, folder, base=None, **changes):
    """The deltas of a run of these settings that knows nothing of a search."""
    found = {"bias_term": settings.term, "bias_layers": settings.layers, "relative_learning_rate": settings.rate}
    args = BeftSFTConfig(str(folder), **{**SETTINGS, **found, "max_steps": settings.steps, **changes})
    trainer = BeftSFTTrainer(
        four_layers() if base is None else base, args, train_dataset=rows, processing_class=make_tokenizer()
    )
    trainer.train()
    return gather_deltas(trainer.model, trainer.trained_sites), trainer


def independent_loss(model, rows):
    """The mean over the completions' tokens, on one padded batch that TRL and the search have no part in."""
    batch = full_batch(make_tokenizer(), rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100).item()


TRIALS = [
    Settings("value", "upper", 0.1, 12),
    Settings("all", "all", 0.05, 5),
    Settings("query", "3", 0.2, 9),
    Settings("value", "upper", 0.1, 12),
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trial_is_bit_for_bit_an_ordinary_run(make_bench, tmp_path, checkpointing):
    """Whatever trials of other spans the base has been through, and however often they were looked at."""
    options = {"cache_frozen_layers": False, "gradient_checkpointing": checkpointing}
    base = four_layers()
    before = tensors(base)
    modules = [(name, type(module)) for name, module in base.named_modules()]
    bench = make_bench(base, **options)
    train = class_rows(24).select(bench.folds[0].train)
    for number, settings in enumerate(TRIALS):
        trained = bench.run(settings, tmp_path / "trials", never)
        expected, trainer = ordinary(settings, train, tmp_path / str(number), **options)
        (found,) = trained.deltas
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[site], expected[site]) for site in expected)
        development = class_rows(24).select(bench.folds[0].development)
        (rows,) = trained.rows
        loss = sum(row.nll for row in rows) / sum(row.tokens for row in rows)
        assert loss == pytest.approx(independent_loss(trainer.model.eval(), development), rel=1e-5)
        assert [(name, type(module)) for name, module in base.named_modules()] == modules
    assert all(torch.equal(values, base.state_dict()[name]) for name, values in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


class WithoutTheEnd:
    """A collator of the user's: the last token of a row is not learnt."""

    def __init__(self):
        self.collate = DataCollatorForLanguageModeling(pad_token_id=0)

    def __call__(self, rows):
        return self.collate([{**row, "labels": [*row["labels"][:-1], -100]} for row in rows])


def test_a_trial_has_the_score_steps_and_the_collator_of_the_trainer(tmp_path):
    """Three scoring steps, where twelve steps would have two: the rates are measured over as many batches."""
    rows, found = class_rows(24), {}
    for steps in (2, 3):
        args = BeftSFTConfig(str(tmp_path / "bench"), **{**SETTINGS, "score_steps": steps})
        trainer = BeftSFTTrainer(
            four_layers(), args, train_dataset=rows, processing_class=make_tokenizer(), data_collator=WithoutTheEnd()
        )
        bench = Bench(trainer, split_rows([row["completion"] for row in rows], None, seed=0))
        (found[steps],) = bench.run(TRIALS[0], tmp_path / "trials", never).deltas
    args = BeftSFTConfig(str(tmp_path / "run"), **{**SETTINGS, "score_steps": 3, "bias_term": "value"})
    trainer = BeftSFTTrainer(
        four_layers(),
        args,
        train_dataset=rows.select(bench.folds[0].train),
        processing_class=make_tokenizer(),
        data_collator=WithoutTheEnd(),
    )
    trainer.train()
    expected = gather_deltas(trainer.model, trainer.trained_sites)
    assert all(torch.equal(found[3][site], expected[site]) for site in expected)
    assert not any(torch.equal(found[2][site], expected[site]) for site in expected)
    assert bench.development[0][0]["labels"][-1] == -100


def test_trials_share_what_the_frozen_layers_give(make_bench, tmp_path):
    bench = make_bench()
    first, second = TRIALS[0], TRIALS[0]._replace(term="key", rate=0.05)
    train = class_rows(24).select(bench.folds[0].train)
    for settings in (first, second):
        (found,) = bench.run(settings, tmp_path / "trials", never).deltas
        expected, _ = ordinary(settings, train, tmp_path / settings.term)
        for site, values in expected.items():
            torch.testing.assert_close(found[site], values, rtol=1e-3, atol=1e-5)
        (cache,) = bench._caches.values()
        if settings is first:
            computed = cache.batches["computed"]
    assert cache.batches["computed"] == computed  # the second trial computed none of them
    bench.run(Settings("value", "3", 0.1, 2), tmp_path / "trials", never)
    assert len(bench._caches) == 2


def test_the_scores_choose_what_an_ordinary_run_would_train(tmp_path):
    rows = class_rows(24)
    args = BeftSFTConfig(str(tmp_path / "out"), **{**SETTINGS, "cache_frozen_layers": False})
    trainer = BeftSFTTrainer(four_layers(), args, train_dataset=rows, processing_class=make_tokenizer())
    tuned = tune(trainer, trials=1)
    default = tuned.choice.default
    train = rows.select(split_rows([row["completion"] for row in rows], None, args.seed)[0].train)
    automatic = Settings("auto", "upper", 0.1, 12)
    expected, run = ordinary(automatic, train, tmp_path / "auto", cache_frozen_layers=False)
    assert default.settings == automatic._replace(term=run.selected_bias_term)
    found = load_file(tmp_path / "out-tuned" / "trials" / "0.safetensors")
    assert len(found) == len(expected)
    for site, values in expected.items():
        torch.testing.assert_close(found[f"0.{site.term}.{site.layer}"], values, rtol=1e-4, atol=1e-6)
    # The adapter is that of a run on all rows.
    expected, run = ordinary(default.settings, rows, tmp_path / "all", cache_frozen_layers=False)
    saved = load_file(tmp_path / "out-tuned" / "adapter_model.safetensors")
    for site, values in expected.items():
        name = f"base_model.model.{site.module}.beft_bias"
        torch.testing.assert_close(saved[name].flatten(), values, rtol=1e-4, atol=1e-6)
    assert tuned.figures == {} and not (tmp_path / "out-tuned" / "tuned.yaml").exists()


def test_folds_judge_every_row_by_a_model_that_has_not_learnt_it(make_bench, tmp_path):
    bench = make_bench(folds=3)
    told = []
    trained = bench.run(TRIALS[0], tmp_path / "trials", lambda step, loss: told.append(loss))
    assert [len(fold) for fold in trained.rows] == [8, 8, 8] and len(trained.deltas) == 3
    means = [loss for loss in told if loss is not None]
    assert len(means) == 3  # one look for each fold, at the mean so far
    for number, fold in enumerate(bench.folds):
        _, trainer = ordinary(TRIALS[0], class_rows(24).select(fold.train), tmp_path / str(number))
        expected = independent_loss(trainer.model.eval(), class_rows(24).select(fold.development))
        of_fold = trained.rows[number]
        assert sum(row.nll for row in of_fold) / sum(row.tokens for row in of_fold) == pytest.approx(
            expected, rel=1e-3
        )
    everything = [row for fold in trained.rows for row in fold]
    assert means[-1] == pytest.approx(sum(row.nll for row in everything) / sum(row.tokens for row in everything))


def test_a_trial_is_stopped_where_the_study_says(make_bench, tmp_path):
    bench = make_bench()
    steps = []

    def watch(step, loss):
        steps.append((step, loss is not None))
        return TimeoutError() if step == 7 else None

    with pytest.raises(Stopped) as stopped:
        bench.run(TRIALS[0], tmp_path / "trials", watch)
    assert isinstance(stopped.value.__cause__, TimeoutError)
    assert steps == [(step, step in (3, 6)) for step in range(1, 8)]  # four looks at twelve steps
    (found,) = bench.run(TRIALS[1], tmp_path / "trials", never).deltas
    train = class_rows(24).select(bench.folds[0].train)
    expected, _ = ordinary(TRIALS[1], train, tmp_path / "after")
    assert all(torch.equal(found[site], expected[site]) for site in expected)


def test_a_mean_is_judged_with_its_biases_in_the_model(make_bench, tmp_path):
    bench = make_bench(four_layers(make_opt))
    sites = [site for site in bench.sites if site.term == "value" and site.layer > 1]
    biases = {site: torch.randn(32, generator=torch.Generator().manual_seed(site.layer)) for site in sites}
    (rows,) = bench.judge_deltas(Settings("value", "upper", 0.1, 2), [biases], tmp_path / "trials")
    model = four_layers(make_opt).eval()
    for site, values in biases.items():
        model.get_submodule(site.module).bias.data += values
    expected = independent_loss(model, class_rows(24).select(bench.folds[0].development))
    assert sum(row.nll for row in rows) / sum(row.tokens for row in rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_trial_on_a_quantised_base_is_an_ordinary_run(tmp_path, bits):
    """Which TRL takes otherwise if it is loaded already: it would train in 16 bits, or quantise again."""
    pytest.importorskip("bitsandbytes")
    make_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    rows = class_rows(16)

    def trainer(name, settings):
        found = {"bias_term": settings.term, "bias_layers": settings.layers, "relative_learning_rate": settings.rate}
        changes = {"max_steps": settings.steps, "cache_frozen_layers": False}
        args = BeftSFTConfig(str(tmp_path / name), **{**SETTINGS, **found, **changes})
        quantization = BitsAndBytesConfig(**{f"load_in_{bits}": True})
        return BeftSFTTrainer(
            str(tmp_path / "base"), args, train_dataset=rows, processing_class=make_tokenizer(),
            quantization_config=quantization,
        )  # fmt: skip

    bench = Bench(trainer("bench", TRIALS[0]), [Fold(list(range(12)), [12, 13, 14, 15])])
    for number, settings in enumerate(TRIALS[:2]):
        (found,) = bench.run(settings, tmp_path / "trials", never).deltas
        rows = class_rows(16).select(range(12))
        run = trainer(str(number), settings)
        run.train()
        for site, values in gather_deltas(run.model, run.trained_sites).items():
            assert found[site].dtype == torch.float32
            torch.testing.assert_close(found[site], values, rtol=1e-4, atol=1e-6)
