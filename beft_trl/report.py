"""What a person reads of a run: the terminal table, the heat map and the model card."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from rich.table import Table
from rich.text import Text

from .importance import SCORE_OF_METHOD, BiasScores
from .spans import ranges


ANCHORS = {
    "bias": "the model's own bias",
    "activation": "the mean output of its projection over the tokens of the scoring batches",
}
COLUMNS = ("term", "importance", "magnitude", "Fisher", "layers", "parameters", "")
HEAT_MAP_FILE = "beft_scores.png"
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


def heat_map(scores: BiasScores) -> bytes:
    """A PNG of the scores that the terms were ranked by: one row for each term, one column for each layer."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    score = scores.ranked_by
    layers = sorted({layer.layer for term in scores.terms.values() for layer in term.layers})
    rows = [
        [{layer.layer: getattr(layer, score) for layer in scores.terms[name].layers}.get(index) for index in layers]
        for name in scores.ranking
    ]
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    positive = [value for row in rows for value in row if value]
    # Scores of terms differ by orders of magnitude, so the colours are logarithmic.
    norm = LogNorm(min(positive), max(positive)) if positive and min(positive) < max(positive) else None
    figure = Figure(figsize=(max(5.0, 1.8 + 0.32 * len(layers)), 1.4 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(range(len(rows)), scores.ranking)
    stride = -(-len(layers) // 40)
    axes.set_xticks(range(0, len(layers), stride), [str(layer) for layer in layers[::stride]])
    axes.set_xlabel("layer")
    axes.set_title(f"{score} of each bias term, {scores.selected} is trained", fontsize=10)
    figure.colorbar(image, ax=axes)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
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
