"""What the winner of a search is: an ordinary run on all rows, or the mean of some."""

import pytest
import torch
from conftest import class_rows, make_llama, make_tokenizer
from safetensors.torch import load_file

from beft_trl import BeftSFTConfig, BeftSFTTrainer
from beft_trl.evaluation import RowLoss


pytest.importorskip("optuna")
from beft_trl.cli.tune import _Result, _train_winner  # noqa: E402
from beft_trl.tuning.judge import Verdict  # noqa: E402
from beft_trl.tuning.outcome import Choice  # noqa: E402
from beft_trl.tuning.space import Settings  # noqa: E402
from beft_trl.tuning.split import split_rows  # noqa: E402
from beft_trl.tuning.study import Record, Soup  # noqa: E402
from beft_trl.tuning.trials import Bench  # noqa: E402


@pytest.fixture
def make_run(tmp_path):
    """A function that makes the trainer of settings, in a folder of a name."""

    def make(name, settings):
        args = BeftSFTConfig(
            str(tmp_path / name), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            bias_term=settings.term, bias_layers=settings.layers, relative_learning_rate=settings.rate,
            max_steps=settings.steps, logging_steps=1,
        )  # fmt: skip
        model = make_llama(num_hidden_layers=4)
        return BeftSFTTrainer(model, args, train_dataset=class_rows(16), processing_class=make_tokenizer())

    return make


def trained(run):
    run.train()
    run.save_model()
    return load_file(f"{run.args.output_dir}/adapter_model.safetensors")


def test_a_soup_is_the_mean_of_runs_on_all_rows(make_run, tmp_path):
    settings = [Settings("value", "upper", 0.1, 6), Settings("value", "upper", 0.2, 9)]
    runs = [trained(make_run(str(number), each)) for number, each in enumerate(settings)]
    bench = Bench(make_run("bench", settings[0]), [])
    records = [Record(number, each, "done", 1.0, 1.0, 1.0, []) for number, each in enumerate(settings)]
    soup = Soup(records, [[RowLoss(1.0, 1, True)]], 1.0)
    choice = Choice("soup", records, records[0], records[0], soup, Verdict(0.1, 0.01, 3.0, True))
    _train_winner(bench, choice, _Result(tmp_path / "out", None, "on rows", True))
    # The learning curve of its last member would not be that of the mean.
    assert (tmp_path / "1" / "beft_curve.png").is_file() and not (tmp_path / "out" / "beft_curve.png").exists()
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == runs[0].keys()
    for name, values in found.items():
        torch.testing.assert_close(values, (runs[0][name] + runs[1][name]) / 2, rtol=1e-3, atol=1e-5)


def test_the_winner_has_nothing_of_what_the_trials_kept(make_run, tmp_path):
    """In 16 bits the frozen layers give a row something else in another batch: here it is made wrong altogether."""
    settings, completions = Settings("value", "upper", 0.1, 6), class_rows(16)["completion"]
    expected = trained(make_run("run", settings))
    bench = Bench(make_run("bench", settings), split_rows(completions, None, 0))
    trial = bench.run(settings, tmp_path / "trials", lambda step, loss: None)
    (cache,) = bench._caches.values()
    for kept in cache._kept.values():
        kept.states.mul_(3)
    record = Record(0, settings, "done", 1.0, 1.0, 1.0, trial.rows)
    choice = Choice("default", [record], record, record, None, None)
    _train_winner(bench, choice, _Result(tmp_path / "out", None, "on rows", True))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
