"""A search's rows, the space that it tries, and its choice: the best by chance is not taken for better."""

from statistics import stdev

import numpy as np
import pytest
import torch
from conftest import make_llama

from beft_trl import find_bias_sites
from beft_trl.evaluation import RowLoss


optuna = pytest.importorskip("optuna")
from beft_trl.tuning.judge import compare  # noqa: E402
from beft_trl.tuning.outcome import choose  # noqa: E402
from beft_trl.tuning.space import Settings, space_around  # noqa: E402
from beft_trl.tuning.split import split_rows  # noqa: E402
from beft_trl.tuning.study import Record, Soup  # noqa: E402


@pytest.mark.parametrize("folds", [None, 3, 5])
def test_development_rows_are_of_every_class_and_no_training_rows(folds):
    classes = ["a"] * 20 + ["b"] * 11 + ["c"] * 9
    splits = split_rows(classes, folds, seed=1)
    assert len(splits) == (folds or 1)
    for split in splits:
        assert sorted(split.train + split.development) == list(range(40))
        for name in "abc":
            share = classes.count(name) / (folds or 4)
            assert abs(sum(classes[number] == name for number in split.development) - share) <= 1
    judged = [number for split in splits for number in split.development]
    assert len(judged) == len(set(judged)) == (40 if folds else 10)
    assert split_rows(classes, folds, seed=1) == splits != split_rows(classes, folds, seed=2)


@pytest.mark.parametrize("folds", [None, 3])
def test_equal_rows_are_not_learnt_and_judged_by(folds):
    rows = [f"row {number % 12}" for number in range(30)]
    for fold in split_rows([row[-1] for row in rows], folds, 0, rows):
        learnt, judged = ({rows[number] for number in part} for part in fold)
        assert learnt and judged and not learnt & judged
        assert sorted(fold.train + fold.development) == list(range(30))
    different = [f"row {number}" for number in range(30)]
    assert split_rows(different, folds, 0, different) == split_rows(different, folds, 0)
    with pytest.raises(ValueError, match="5 rows that differ, of 30"):
        split_rows(rows, folds, 0, [number % 5 for number in range(30)])


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="folds=1"):
        split_rows(["a"] * 9, 1, 0)
    with pytest.raises(ValueError, match=r"\b9 rows.*\b5 parts.*folds"):
        split_rows(["a"] * 9, 5, 0)


def losses(*values):
    return [RowLoss(value, 2, True) for value in values]


def test_the_error_is_that_of_the_difference():
    """Paired: rows that are hard for both say nothing of the difference."""
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(60, generator=generator).abs() * 100
    gains = torch.randn(60, generator=generator) + 0.3
    default, winner = losses(*(hard + gains).tolist()), losses(*hard.tolist())
    found = compare([default], [winner])
    assert found.difference == pytest.approx(gains.sum().item() / 120, rel=1e-4)
    assert found.error == pytest.approx(gains.std().item() / 2 / 60**0.5, rel=1e-4)
    assert found.factor == pytest.approx(1.671, rel=0.01)  # Student's t with 59 degrees of freedom, of a table
    assert compare([default[:11]], [winner[:11]], 10).factor == pytest.approx(3.169, rel=0.02)  # 10 degrees, 0.5 %
    assert found.ahead == (found.difference > found.factor * found.error)

    # Folds that differ by more than their rows would: all rows of one are wrong together.
    shifts = [0.0] * 20 + [5.0] * 20 + [-4.0] * 20
    shifted = losses(*(hard + gains + torch.tensor(shifts)).tolist())
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    found = compare([shifted[part] for part in parts], [winner[part] for part in parts])
    of_folds = [(gains[part].mean().item() + shifts[part.start]) / 2 for part in parts]
    assert found.error == pytest.approx(stdev(of_folds) / 3**0.5, rel=1e-4)
    assert found.factor == pytest.approx(2.920, rel=0.01)  # 2 degrees of freedom
    assert not compare([losses(1, 1)], [losses(1, 1)]).ahead


def test_rows_with_more_tokens_weigh_more():
    """The error of a ratio of sums, against draws of the rows with replacement."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 9, 400)
    gains = generator.normal(0.1, 0.5, 400) * tokens
    default = [RowLoss(10 * count + gain, int(count), True) for gain, count in zip(gains, tokens, strict=True)]
    winner = [RowLoss(10.0 * count, int(count), True) for count in tokens]
    drawn = generator.integers(0, 400, (4000, 400))
    assert compare([default], [winner]).error == pytest.approx(
        np.std(gains[drawn].sum(1) / tokens[drawn].sum(1)), rel=0.05
    )


@pytest.mark.parametrize(
    ("rows", "folds", "of_fold", "heavy"),
    [
        (8, None, 0.0, False), (32, None, 0.0, False), (32, None, 0.0, True), (120, 5, 0.0, False),
        (120, 5, 0.15, False), (120, 5, 0.3, False), (120, 3, 0.3, False),
    ],
)  # fmt: skip
def test_noise_seldom_takes_the_place_of_the_default(rows, folds, of_fold, heavy):
    """Sixteen trials that are equally good: how often the best by chance would be chosen, out of 400 searches."""
    generator, replaced = np.random.default_rng(0), 0
    part = np.arange(rows) % (folds or 1)
    for _ in range(400):
        noise = generator.exponential(1, (16, rows)) ** 2 if heavy else generator.normal(0, 1, (16, rows))
        noise += of_fold * generator.normal(0, 1, (16, folds or 1))[:, part]
        values = 10 + generator.exponential(1, rows) + noise
        best = values.mean(1).argmin()
        split = [
            [[RowLoss(value, 1, True) for value in trial[part == fold]] for fold in range(folds or 1)]
            for trial in (values[0], values[best])
        ]
        replaced += best != 0 and compare(*split, 15).ahead
    assert replaced / 400 <= 0.05


def test_what_is_better_takes_the_place_of_the_default():
    generator, replaced = np.random.default_rng(0), 0
    for _ in range(100):
        values = 10 + generator.exponential(1, 32) + generator.normal(0, 1, (16, 32))
        values[5] -= 1.5
        best = values.mean(1).argmin()
        replaced += best == 5 and compare([losses(*values[0])], [losses(*values[best])], 15).ahead
    assert replaced > 90


def space():
    default = Settings("value", "upper", 0.05, 400)
    return space_around(default, ["value", "key", "query"], find_bias_sites(make_llama(num_hidden_layers=6)))


def test_the_space_is_around_the_recipe_and_begins_with_it():
    found = space()
    default, larger, *others = found.first()
    assert default == found.default
    assert larger == default._replace(rate=larger.rate) and larger.rate == pytest.approx(5**0.5 * default.rate)
    assert others == [default._replace(term=term) for term in ("key", "query", "all")]
    assert found.layers == ("upper", "all", "4-5")
    assert found.steps == (200, 800)
    assert found.rates == pytest.approx((0.01, 0.25))
    sites = make_llama()
    fixed = space_around(Settings("key", "1", 0.05, 3), [], find_bias_sites(sites))
    assert fixed.terms == ("key",) and fixed.layers == ("1", "all")  # the upper half of two layers is layer 1


@pytest.mark.parametrize(
    ("affordable", "most"), [(float("inf"), 800), (10_000, 800), (500.5, 500), (40, 400), (0, 400)]
)
def test_more_steps_than_the_default_are_tried_if_there_is_time(affordable, most):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    tried = [space().suggest(study.ask(), affordable).steps for _ in range(60)]
    assert 200 <= min(tried) < 300 and most - 100 < max(tried) <= most


def record(number, settings, rows, state="done"):
    total = sum(row.nll for row in rows) / sum(row.tokens for row in rows)
    return Record(number, settings, state, total, 1.0, 1.0, [rows] if state == "done" else None)


def test_the_default_stays_unless_another_is_ahead_by_more_than_chance():
    found = space()
    other = found.default._replace(rate=0.1)
    default = record(0, found.default, losses(4, 4, 4, 4))
    noisy = record(1, other, losses(0.5, 7, 0.5, 7))  # lower in the mean, by less than the spread
    clear = record(2, other._replace(steps=800), losses(3.5, 3.48, 3.52, 3.5))
    pruned = record(3, other._replace(steps=200), losses(0.1), "pruned")
    kept = choose(found, [default, noisy, pruned], None)
    assert kept.kind == "default" and kept.members == [found.default]
    assert "can be by chance" in kept.sentence()
    won = choose(found, [default, noisy, clear, pruned], None)
    assert won.kind == "trial" and won.winner is clear
    soup = Soup([clear, noisy], [losses(3, 3, 3, 3)], 1.0)
    assert choose(found, [default, noisy, clear], soup).members == [clear.settings, noisy.settings]
    crowd = [
        record(number, other._replace(rate=0.05 + number / 1e6), losses(4, 4.1), "pruned") for number in range(4, 80)
    ]
    for each in crowd:
        assert each.loss is not None
    doubtful = record(2, other._replace(steps=800), losses(3.5, 3.8, 3.3, 3.6))
    assert choose(found, [default, doubtful], None).kind == "trial"
    assert (
        choose(found, [default, doubtful, *crowd], None).kind == "default"
    )  # the best of many, the stopped among them
    worse = Soup([clear, noisy], [losses(3.8, 3.8, 3.8, 3.8)], 1.0)
    assert choose(found, [default, noisy, clear], worse).kind == "trial"
    single = choose(found, [default], None)
    assert single.kind == "default" and single.verdict is None
    with pytest.raises(ValueError, match="default"):
        choose(found, [noisy], None)
