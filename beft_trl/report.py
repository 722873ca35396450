"""What a person sees of a run: the terminal table, the heat map, the learning curve and the model card."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from rich.table import Table
from rich.text import Text

from .importance import SCORE_OF_METHOD, BiasScores
from .spans import ranges, runs


ANCHORS = {
    "bias": "the model's own bias",
    "activation": "the mean output of its projection over the tokens of the scoring batches",
}
COLUMNS = ("term", "importance", "magnitude", "Fisher", "layers", "parameters", "")
HEAT_MAP_FILE = "beft_scores.png"
CURVE_FILE = "beft_curve.png"
PICTURES = (HEAT_MAP_FILE, CURVE_FILE)
GREY = "0.88"
MEANING = {
    "importance": "relative change",
    "magnitude": "mean absolute change",
    "fisher": "mean squared gradient",
}
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
PAPER = {
    "title": "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes",
    "id": "2509.15974",
    "citation": """@inproceedings{huang-etal-2026-beft,
  title = {{BEFT}: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes},
  author = {Huang, Baichuan and Balashankar, Ananth and Aminifar, Amir},
  booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics},
  year = {2026},
}""",
}


def scores_table(
    scores: BiasScores, trainable: int, total: int | None, learning_rates: Mapping[str, float] | None = None
) -> Table:
    """The scores of every term, with the choice, its margin and why a term is out.

    Args:
        scores (`BiasScores`): what the scoring pass found.
        trainable (`int`): number of parameters that will be trained.
        total (`int`, *optional*): number of parameters of the whole model, or `None` if that is not known.
        learning_rates (`dict[str, float]`, *optional*): of the trained deltas, by the path of their module.
    """
    table = Table(
        title=Text(f"Bias terms of {scores.base_model or 'the model'}"),  # a name may look like markup
        caption=Text(choice(scores, trainable, total, learning_rates)),
    )
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("term", "") else "right")
    for row in _rows(scores):
        name, state = row[0], row[-1]
        table.add_row(*row, style="bold" if name == scores.selected else "dim" if state == "dead" else "")
    return table


def _rows(scores: BiasScores) -> list[list[str]]:
    """One row of `COLUMNS` for each term, the ranked ones first."""
    rows = []
    for name in [*scores.ranking, *(name for name in scores.terms if name not in scores.ranking)]:
        term = scores.terms[name]
        values = [term.score(score) for score in SCORE_OF_METHOD.values()]
        rows.append(
            [
                name,
                *("" if value is None else f"{value:.2e}" for value in values),
                str(len(term.layers) or ""),
                f"{term.parameters:,}",
                "dead" if term.dead else "trained" if scores.selected in (name, "all") else "",
            ]
        )
    return rows


def choice(
    scores: BiasScores, trainable: int, total: int | None, learning_rates: Mapping[str, float] | None = None
) -> str:
    """One paragraph: what is trained, why, how fast, and how much of the model it is."""
    sentences = []
    what = f"the {scores.selected} bias" + (f" of layers {ranges(scores.layers)}" if scores.layers else "")
    if scores.method is None:
        sentences.append(f"Selected: {what}, as asked, without scoring.")
    else:
        by = f"by {scores.ranked_by} after {scores.steps} steps, anchored at {ANCHORS[scores.anchor or 'bias']}"
        margin = f", {scores.margin:.3g} times the second" if scores.margin is not None else ""
        sentences.append(f"Selected: {what}, first {by}{margin}.")
    if learning_rates:
        lowest, highest = min(learning_rates.values()), max(learning_rates.values())
        sentences.append(
            f"Learning rates from {lowest:.1e} to {highest:.1e}, by the size of what each projection gives."
        )
    if total is not None:
        sentences.append(f"{trainable:,} trainable of {total:,} parameters ({trainable / total:.4%}).")
    sentences += [f"The {name} bias is dead: {term.dead}." for name, term in scores.terms.items() if term.dead]
    sentences += scores.notes
    return " ".join(sentences)


def logged_values(scores: BiasScores, trainable: int, total: int) -> dict[str, float]:
    """What trackers are sent: every score of every term that was scored, the margin, and the size; by name."""
    values: dict[str, float] = {"beft/trainable_parameters": trainable, "beft/trainable_share": trainable / total}
    if scores.margin is not None:
        values["beft/margin"] = scores.margin
    for name in scores.ranking:
        for score in SCORE_OF_METHOD.values():
            values[f"beft/{score}/{name}"] = scores.terms[name].score(score) or 0.0
    return values


def heat_map(scores: BiasScores, learning_rates: Mapping[int, float] | None = None) -> bytes:
    """A PNG of the scores that the terms were ranked by: one row for each term, one column for each layer.

    What is trained has a frame. What was not scored, such as the frozen layers below, is grey.

    Args:
        scores (`BiasScores`): of a scoring pass.
        learning_rates (`dict[int, float]`, *optional*): of the trained biases, by layer. They are drawn below.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch, Rectangle

    score = scores.ranked_by
    rows = [{layer.layer: getattr(layer, score) for layer in scores.terms[name].layers} for name in scores.ranking]
    layers = range(max(layer for row in rows for layer in row) + 1)
    positive = [value for row in rows for value in row.values() if value > 0]
    # Scores of terms differ by orders of magnitude, so the colours are logarithmic, and zero has that of the lowest.
    lowest = min(positive, default=0.0)
    norm = LogNorm(lowest, max(positive)) if positive and lowest < max(positive) else None
    values = [[max(row[layer], lowest) if layer in row else math.nan for layer in layers] for row in rows]
    heights = [0.5 * len(rows), 1.0] if learning_rates else [0.5 * len(rows)]
    figure = _figure(sum(heights) + 1.6)
    axes, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes.set_facecolor(GREY)
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    place = scores.ranking.index(scores.selected)
    for first, last in runs(rows[place]):
        corner, width = (first - 0.5, place - 0.5), last - first + 1
        axes.add_patch(Rectangle(corner, width, 1, fill=False, edgecolor="red", linewidth=2, clip_on=False, zorder=3))
    axes.set_yticks(range(len(rows)), [f"{name} bias" for name in scores.ranking])
    axes.set_title(f"Selected by {score}: the {scores.selected} bias", fontsize=11)
    scale = " (log scale)" if norm else ""
    figure.colorbar(image, ax=axes).set_label(f"{score}{scale}\n{MEANING[score]}", fontsize=8)
    for rates_axes in below:
        points = sorted((learning_rates or {}).items())
        rates_axes.plot(*zip(*points, strict=True), "o-", color="red", markersize=3, linewidth=1)
        rates_axes.set_ylim(bottom=0)
        rates_axes.set_ylabel("learning\nrate")
    (below or [axes])[-1].set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    keys = [Patch(fill=False, edgecolor="red", linewidth=2, label="selected for training")]
    if any(len(row) < len(layers) for row in rows):
        keys.append(Patch(facecolor=GREY, label="neither scored nor trained"))
    figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return _png(figure)


def learning_curve(log_history: Sequence[Mapping[str, Any]], unit: str | None = None) -> bytes | None:
    """A PNG of the training loss, the held-out losses and the held-out accuracies over the optimizer steps.

    Args:
        log_history (`list[dict]`): the `state.log_history` of a trainer.
        unit (`str`, *optional*): of the loss, such as `"nats per token"`.

    Returns:
        The picture, or `None` if fewer than two training losses were logged. The axis of the loss is logarithmic if
        the losses span more than two decades.
    """
    training = _points(log_history, "loss")
    if len(training) < 2:
        return None
    held_out = {
        name.removeprefix("eval_").replace("_", " "): _points(log_history, name)
        for name in dict.fromkeys(name for entry in log_history for name in entry)
        if name.startswith("eval_") and name.endswith(("loss", "accuracy"))
    }
    losses = {name: points for name, points in held_out.items() if name.endswith("loss") and points}
    accuracies = {name: points for name, points in held_out.items() if name.endswith("accuracy") and points}
    figure = _figure(5.0 if accuracies else 3.4)
    loss_axes, *below = figure.subplots(1 + bool(accuracies), sharex=True, squeeze=False)[:, 0]
    loss_axes.plot(*zip(*training, strict=True), "o-", markersize=3, label="training loss, mean since the last point")
    for axes, lines in zip((loss_axes, *below), (losses, accuracies), strict=False):
        for number, (name, points) in enumerate(lines.items(), 1):
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=f"C{number}", label=f"held-out {name}")
        axes.legend(fontsize=9)
        axes.grid(alpha=0.3)
    values = [value for points in (training, *losses.values()) for _, value in points]
    if min(values) > 0 and max(values) > 100 * min(values):
        loss_axes.set_yscale("log")
    loss_axes.set_ylabel(f"loss ({unit})" if unit else "loss")
    for accuracy_axes in below:
        accuracy_axes.set_ylim(-0.02, 1.02)
        accuracy_axes.set_ylabel("accuracy (share)")
    (below or [loss_axes])[-1].set_xlabel("optimizer step")
    loss_axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in log_history if math.isfinite(entry.get(name, math.nan))]


def _figure(height: float) -> Any:
    """A figure that is legible at the width of a model card, which is about 640 pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(6.4, height), dpi=150, layout="constrained")


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def model_card(
    scores: BiasScores,
    trainable: int,
    total: int,
    learning_rates: Mapping[str, float] | None = None,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | None = None,
    auto_class: str = "AutoModelForCausalLM",
    plain_peft: bool = True,
    saved_whole: Sequence[str] = (),
    sections: Sequence[str] = (),
    curve: bool = False,
) -> ModelCard:
    """The README of an adapter: what was trained and why, and how to load it.

    Args:
        scores (`BiasScores`): of the run.
        trainable (`int`): number of parameters that were trained.
        total (`int`): number of parameters of the whole model.
        learning_rates (`dict[str, float]`, *optional*): of the deltas, by the path of their module.
        model_name (`str`, *optional*): the title. Default: "BEFT adapter".
        dataset_name (`str`, *optional*): of the hub.
        tags (`list[str]`, *optional*): next to "beft".
        auto_class (`str`, *optional*, defaults to `"AutoModelForCausalLM"`): loads the base model.
        plain_peft (`bool`, *optional*, defaults to `True`): whether PEFT loads the adapter without this package.
        saved_whole (`Sequence[str]`, *optional*): names of the modules that were trained whole, such as a task's head.
        sections (`Sequence[str]`, *optional*): more Markdown, which comes before how to load it.
        curve (`bool`, *optional*, defaults to `False`): whether there is a learning curve to show.
    """
    base = scores.base_model or "BASE_MODEL"
    # The hub takes names of its own models only: a local path would fail its validation.
    on_hub = bool(scores.base_model) and not Path(scores.base_model).exists() and scores.base_model.count("/") <= 1
    data = ModelCardData(
        base_model=scores.base_model if on_hub else None,
        library_name="peft",
        pipeline_tag=PIPELINES.get(auto_class),
        datasets=dataset_name,
        tags=sorted({"beft", *(tags or [])}),
    )
    holds = " and ".join(["the change of the bias", *(f"the trained `{name}`" for name in saved_whole)])
    # The labels of a task are in the configuration next to the adapter, not in that of the base model.
    config = ', config=AutoConfig.from_pretrained("PATH_OF_THIS_FOLDER")' if saved_whole else ""
    where = f"the attention layers {ranges(scores.layers)}" if scores.layers else "every attention layer"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {model_name or 'BEFT adapter'}",
        f"The {scores.selected} bias of {where} of `{base}`, fine-tuned with BEFT. The base model is frozen: this "
        f"folder holds nothing but {holds}, in fp32.",
        choice(scores, trainable, total, learning_rates),
    ]
    if scores.method is not None:
        parts += [_markdown_table(scores), f"![scores of each term and layer]({HEAT_MAP_FILE})"]
    if curve:
        parts.append(f"![loss over the optimizer steps]({CURVE_FILE})")
    parts += [
        *sections,
        "## How to load it\n\n"
        + (
            "It is an adapter of PEFT's own BEFT tuner (PEFT 0.20 or later) and needs no other package:\n\n"
            if plain_peft
            else "It is an adapter of PEFT's BEFT tuner, which refuses the `Conv1D` layers of this base model by "
            "itself: `load_adapter` of beft_trl (`pip install beft-trl`) puts it there.\n\n"
        )
        + f"```python\nfrom {'peft import PeftModel' if plain_peft else 'beft_trl import load_adapter'}\n"
        f"from transformers import {'AutoConfig, ' if saved_whole else ''}{auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("{base}"{config})\n'
        f'model = {"PeftModel.from_pretrained" if plain_peft else "load_adapter"}(model, "PATH_OF_THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n'
        "```",
        f"## Citation\n\n```bibtex\n{PAPER['citation']}\n```",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _markdown_table(scores: BiasScores) -> str:
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 2), "---"), *_rows(scores)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
