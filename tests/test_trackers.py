"""What a tracker of experiments is sent, read back from its own files."""

import pytest
from conftest import make_llama


def test_tensorboard_has_losses_scores_and_learning_rates(make_trainer, tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(make_llama(), report_to="tensorboard", relative_learning_rate=0.05, max_steps=4)
    trainer.train()
    (file,) = (tmp_path / "events").iterdir()  # one run, and none of the scoring pass
    events = accumulators.EventAccumulator(str(file)).Reload()

    def logged(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "learning_rate", "learning_rate_min", "learning_rate_max"):
        assert logged(f"train/{name}") == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history]
    # The schedule has not begun to fall at the first step.
    rates = sorted(trainer.learning_rates.values())
    assert [logged(f"train/learning_rate_{end}")[0][1] for end in ("min", "max")] == pytest.approx(rates)
    for term, scores in trainer.bias_scores.terms.items():
        for score in ("importance", "magnitude", "fisher"):
            assert logged(f"train/beft/{score}/{term}") == [(0, pytest.approx(scores.score(score), rel=1e-6))]
    assert logged("train/beft/trainable_parameters") == [(0, sum(len(site.rows) for site in trainer.trained_sites))]
