"""Draws what the results hold: python examples/benchmarks/pictures.py

Each picture stands in this folder's README, and is left out where its results are missing.
"""

from pathlib import Path
from statistics import fmean, geometric_mean, stdev

import cost
import defaults
import forgetting
import grpo
import quality
import records
import selection
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from tasks import MODELS


IMAGES = Path(__file__).parents[1] / "images"
FIGURES = {"accuracy": "accuracy over rows", "nll": "loss over rows"}
KINDS = {"BEFT": "tab:blue", "PEFT BEFT": "tab:cyan", "output bias": "tab:cyan", "LoRA": "tab:orange"}


def draw_quality(arms: dict[str, list[dict]], axes: Axes) -> None:
    """Test loss of each arm, best first, with the spread over seeds and the number of trained parameters.

    Left out is the model as it was, whose loss is many times that of the others.
    """
    losses = {arm: [line["test"]["nll"] for line in lines] for arm, lines in arms.items() if lines[0]["trainable"]}
    names = sorted(losses, key=lambda arm: fmean(losses[arm]))
    for row, arm in enumerate(names):
        spread = stdev(losses[arm]) if len(losses[arm]) > 1 else 0.0
        axes.errorbar(fmean(losses[arm]), row, xerr=spread, fmt="o", color=color_of(arm), capsize=3)
    axes.set_yticks(range(len(names)), [f"{arm} ({arms[arm][0]['trainable']:,})" for arm in names], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="loss on the test rows")


def draw_selection(judged: dict[tuple, list[selection.Judgement]], model: str, axes: Axes) -> None:
    """How many times the second term's score the first has, over the scoring steps; geometric mean of the cells."""
    anchors = list(dict.fromkeys(key[1] for key in judged if key[0] == model))
    lines = {f"importance, from the {anchor}": (anchor, "importance") for anchor in anchors}
    lines |= {score: (anchors[0], score) for score in ("magnitude", "fisher")}  # which the anchor does not change
    for label, line in lines.items():
        cells = {key[3]: cells for key, cells in judged.items() if key[:3] == (model, *line)}
        margins = [geometric_mean(cell.margin for cell in of_steps) for of_steps in cells.values()]
        axes.plot([str(steps) for steps in cells], margins, "o-", label=label)
    axes.set(yscale="log", xlabel="scoring steps", ylabel="score of the first term, of the second's")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0.85))


def draw_curve(arms: dict[str, dict[int, list[dict]]], figure: str, axes: Axes) -> None:
    """A figure of the test rows over the number of rows to learn from, for each arm, with the spread over seeds."""
    for arm in defaults.ARMS[1:]:
        found = {rows: [line["test"][figure] for line in lines] for rows, lines in sorted(arms[arm].items())}
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
        axes.errorbar(list(found), list(map(fmean, found.values())), yerr=spread, fmt="o-", capsize=3, label=arm)
    counts = sorted({rows for by_rows in arms.values() for rows in by_rows})
    axes.set(xscale="log")
    axes.set_xticks(counts, [str(rows) for rows in counts])
    axes.minorticks_off()
    if figure == "nll":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def draw_cost(arms: dict[str, list[dict]], axes: Axes) -> None:
    """Seconds a step, relative to the floor."""
    times = {arm: cost.seconds(lines) / cost.seconds(arms["floor"]) for arm, lines in arms.items()}
    axes.barh(list(times), list(times.values()), color="tab:blue")
    for row, ratio in enumerate(times.values()):
        axes.annotate(f"{ratio:.2f}", (ratio, row), (3, -3), textcoords="offset points", fontsize=7)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set(xlabel="step time, of a frozen forward and backward pass")


def draw_rewards(arms: dict[str, list[dict]], axes: Axes) -> None:
    """Mean reward of the answers over the steps, five at a time, a line for each seed."""
    for arm, lines in arms.items():
        for seed, line in enumerate(lines):
            rewards = line["rewards"]
            means = [fmean(rewards[max(0, step - 4) : step + 1]) for step in range(len(rewards))]
            label = None if seed else arm
            axes.plot(range(1, len(means) + 1), means, style_of(arm, arms), color=color_of(arm), label=label)
    axes.set(xlabel="steps", ylabel="mean reward of an answer")
    axes.legend(fontsize=7)


def draw_accuracies(arms: dict[str, list[dict]], axes: Axes) -> None:
    """Share of held-out messages with the right team over the steps, a line for each seed."""
    for arm, lines in arms.items():
        for seed, line in enumerate(lines):
            steps = [int(step) for step in line["accuracy"]]
            label = None if seed else f"{arm} ({line['trainable']:,})"
            style = f"o{style_of(arm, arms)}"
            axes.plot(steps, list(line["accuracy"].values()), style, color=color_of(arm), label=label, markersize=3)
    axes.axhline(1 / 6, color="tab:grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps", ylabel="held-out accuracy", ylim=(0, 1))
    axes.legend(fontsize=7)


def color_of(arm: str) -> str:
    return next((color for kind, color in KINDS.items() if arm.startswith(kind)), "tab:grey")


def style_of(arm: str, arms: dict[str, list[dict]]) -> str:
    """Another line for each learning rate of an arm."""
    return ("-", "--", ":")[[each for each in arms if color_of(each) == color_of(arm)].index(arm)]


def draw_forgetting(lines: list[dict], axes: Axes) -> None:
    """Accuracy in the task over the loss on Alpaca's answers, along the runs of the first seed."""
    for line in lines:
        if line["arm"] in forgetting.ARMS and line["seed"] == 0:
            losses = [mark["alpaca"]["nll"] for mark in line["marks"]]
            rights = [mark["task"]["accuracy"] for mark in line["marks"]]
            axes.plot(losses, rights, "o-", markersize=3, label=line["arm"], color=color_of(line["arm"]))
    axes.set(xlabel="loss on Alpaca's answers", ylabel="accuracy in the task")
    axes.legend(fontsize=7)


def save(name: str, titles: list[str], draw, rows: int = 1) -> None:
    if titles:
        columns = len(titles) // rows
        width = 5.2 if rows == 1 else 3.2
        figure = Figure(figsize=(width * columns, (3.8 if rows == 1 else 2.8) * rows), layout="constrained")
        for title, axes in zip(titles, figure.subplots(rows, columns, squeeze=False).flat, strict=True):
            draw(title, axes)
            axes.set_title(title, fontsize=9)
        figure.savefig(IMAGES / f"{name}.png", dpi=130)
        print(f"Wrote {IMAGES / f'{name}.png'}")


def main() -> None:
    runs = {
        f"{Path(model).name}, {task}": {arm: lines for arm, lines in arms.items() if arm in quality.ARMS}
        for (model, task), arms in quality.best_runs(records.RESULTS / "quality.jsonl").items()
    }
    runs = {title: arms for title, arms in runs.items() if arms}  # of five epochs
    save("quality", list(runs), lambda title, axes: draw_quality(runs[title], axes))

    judged = selection.judgements(records.read(records.RESULTS / "selection.jsonl"))
    models = {Path(key[0]).name: key[0] for key in judged}
    save("selection", list(models), lambda title, axes: draw_selection(judged, models[title], axes))

    small = next(model for model in MODELS if "SmolLM2" in model)
    kinds = {
        kind: arms
        for (model, kind), arms in defaults.curves(records.RESULTS / "defaults.jsonl").items()
        if model == small
    }
    panels = {f"{kind}: {label}": (kind, figure) for figure, label in FIGURES.items() for kind in kinds}

    def draw_panel(title: str, axes: Axes) -> None:
        kind, figure = panels[title]
        draw_curve(kinds[kind], figure, axes)
        if title == next(iter(panels)):
            axes.legend(fontsize=7)

    save("defaults", list(panels), draw_panel, rows=2)

    shapes = cost.by_shape(records.RESULTS / "cost.jsonl")
    first = {
        Path(model).name: shapes[(model, *cost.first_shape(model).values())]
        for model in dict.fromkeys(shape[0] for shape in shapes)
    }
    save("cost", list(first), lambda title, axes: draw_cost(first[title], axes))

    lost: dict[str, list[dict]] = {}
    for line in records.read(records.RESULTS / "forgetting.jsonl"):
        lost.setdefault(f"{Path(line['model']).name}, {line['task']}", []).append(line)
    save("forgetting", list(lost), lambda title, axes: draw_forgetting(lost[title], axes))

    learnt = grpo.runs_of(records.RESULTS / "grpo.jsonl")
    pictures = {"rewards": draw_rewards, "held-out messages": draw_accuracies} if learnt else {}
    save("grpo", list(pictures), lambda title, axes: pictures[title](learnt, axes))


if __name__ == "__main__":
    main()
