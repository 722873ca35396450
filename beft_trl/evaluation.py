"""What a model knows of held-out rows: its loss, the answers that it writes, and the answers that it prefers."""

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data.labels import IGNORED
from .data.rows import template_options


BATCH_SIZE = 16
NEW_TOKENS = 8  # of a written answer, or more if completions are longer
# Completions that come back like this are classes: few of them, and each stands for several rows.
MOST_CHOICES, ROWS_OF_A_CHOICE = 32, 2
OTHER = "(other)"


class RowLoss(NamedTuple):
    """The labelled tokens of a row.

    Attributes:
        nll: sum of their negative log-likelihoods.
        tokens: their number.
        right: whether there are any and each is the likeliest, which is what greedy decoding writes.
    """

    nll: float
    tokens: int
    right: bool


def mean_loss(rows: Sequence[RowLoss]) -> float:
    """Mean negative log-likelihood of a token of all rows."""
    return sum(row.nll for row in rows) / sum(row.tokens for row in rows)


def share_right(rows: Sequence[RowLoss]) -> float:
    """Share of rows with a labelled token of which each is the likeliest."""
    return sum(row.right for row in rows) / sum(row.tokens > 0 for row in rows)


@dataclass
class Evaluation:
    """The figures of one model on some rows.

    Attributes:
        rows: number of rows.
        tokens: number of tokens that the loss is a mean of: those of the completions, with their ends.
        loss: mean negative log-likelihood of a token.
        exact: share of rows whose written answer is the completion, but for white space around it.
        ranked: share of rows whose completion is the likeliest of `choices`, or `None` without choices.
        choices: the completions among which the answer lies.
        written: rows of each completion (first key) by what was written (second key), `"(other)"` for what is no
            choice. Empty without choices.
        preferred: the same by the likeliest of the choices.
        answers: what was written, by row.
    """

    rows: int
    tokens: int
    loss: float
    exact: float
    ranked: float | None = None
    choices: list[str] = field(default_factory=list)
    written: dict[str, dict[str, int]] = field(default_factory=dict)
    preferred: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    choices: Sequence[str] | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    bars: bool = False,
) -> Evaluation:
    """Measures a causal language model on prompt-completion rows.

    Args:
        model (`PreTrainedModel` or `PeftModel`): on its device.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        rows (`Sequence`): with `prompt` and `completion`, both text or both turns of a conversation.
        choices (`Sequence[str]`, *optional*): the completions to rank. Default: those of the rows if they are classes,
            see [`classes_of`]; an empty list ranks nothing.
        batch_size (`int`, *optional*, defaults to 16): rows of a forward pass.
        max_new_tokens (`int`, *optional*): of a written answer. Default: see [`write`].
        bars (`bool`, *optional*, defaults to `False`): show on a terminal how far it has come.

    Raises:
        ValueError: for a completion that is none of the choices.
    """
    rights = completions_of(rows)
    names = choices_of(rights, choices)
    losses = row_losses(model, [encode(tokenizer, row) for row in rows], batch_size, bar="Loss" if bars else None)
    answers = write(model, tokenizer, rows, batch_size, max_new_tokens, "Answers" if bars else None)
    measured = Evaluation(
        rows=len(rows),
        tokens=sum(row.tokens for row in losses),
        loss=mean_loss(losses),
        exact=share_equal(answers, rights),
        choices=names,
        answers=answers,
    )
    if names:
        likeliest = prefer(model, tokenizer, rows, names, batch_size, "Choices" if bars else None)
        measured.ranked = share_equal(likeliest, rights)
        measured.written = confusion(rights, answers, names)
        measured.preferred = confusion(rights, likeliest, names)
    return measured


def text_of(message: Any) -> str:
    """The text of a prompt or a completion: itself, or the content of its last turn."""
    return message if isinstance(message, str) else message[-1]["content"]


def completions_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The right answers of rows, without the white space around them."""
    return [text_of(row["completion"]).strip() for row in rows]


def share_equal(answers: Sequence[str], rights: Sequence[str]) -> float:
    """Share of answers that are right."""
    return sum(map(str.__eq__, answers, rights)) / len(rights)


def classes_of(completions: Sequence[str]) -> list[str]:
    """The completions, sorted, if they are classes: at most 32, each with two rows in the mean; else none."""
    names = sorted(set(completions))
    return names if 1 < len(names) <= min(MOST_CHOICES, len(completions) // ROWS_OF_A_CHOICE) else []


def choices_of(completions: Sequence[str], choices: Sequence[str] | None) -> list[str]:
    """What is ranked: `choices`, or for `None` the classes of the completions.

    Raises:
        ValueError: for a completion that is none of the choices.
    """
    if choices is None:
        return classes_of(completions)
    names = [choice.strip() for choice in choices]
    unknown = next((each for each in completions if names and each not in names), None)
    if unknown is not None:
        raise ValueError(
            f"The completion {unknown!r:.80} is none of the choices {', '.join(names)}: complete the choices, or "
            "leave them out to take the completions of the rows."
        )
    return names


def confusion(rights: Sequence[str], answers: Sequence[str], choices: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows of each choice by their answer; answers that are no choice come under `"(other)"`."""
    counts = Counter(
        (right, answer if answer in choices else OTHER) for right, answer in zip(rights, answers, strict=True)
    )
    return {right: {answer: counts[right, answer] for answer in (*choices, OTHER)} for right in choices}


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tokens of a prompt-completion row and their labels, as `trl.SFTTrainer` makes them: the prompt's are masked.

    A completion that is text ends with the tokenizer's end of sequence, one of turns as the chat template says.
    """
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        text = prompt + completion + ("" if completion.endswith(end) else end)
        tokens, apart = encode_text(tokenizer, prompt, text)
    else:
        render: Any = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=True, **template_options(row))
        seen = render(prompt, add_generation_prompt=True)["input_ids"]
        tokens = render(prompt + completion)["input_ids"]
        apart = _shared(seen, tokens)
    return {"input_ids": tokens, "labels": [IGNORED] * apart + tokens[apart:]}


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], int]:
    """The tokens of a text that begins with a prompt, and how many of them are the prompt's."""
    tokens = tokenizer(text)["input_ids"]
    return tokens, _shared(tokenizer(prompt)["input_ids"], tokens)


def _shared(prompt: Sequence[int], tokens: Sequence[int]) -> int:
    """Where the two part, which is before the end of the prompt if letters of prompt and completion make one token."""
    return next((at for at, pair in enumerate(zip(prompt, tokens, strict=False)) if pair[0] != pair[1]), len(prompt))


@torch.no_grad()
def row_losses(
    model: Any,
    rows: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int = BATCH_SIZE,
    around: AbstractContextManager | None = None,
    bar: str | None = None,
) -> list[RowLoss]:
    """The likelihood of each row's labelled tokens.

    No random number is drawn, so that a training run that this interrupts goes on as it would have.

    Args:
        model (`PreTrainedModel` or `PeftModel`): comes back in the mode that it was in.
        rows (`Sequence`): with `input_ids` and `labels`, of which those of -100 are not counted.
        batch_size (`int`, *optional*, defaults to 16): rows of a forward pass.
        around (`AbstractContextManager`, *optional*): entered around the forward passes.
        bar (`str`, *optional*): the name of a bar, which a terminal shows.
    """
    found: dict[int, RowLoss] = {}
    training, device = model.training, next(model.parameters()).device
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    selects = "logits_to_keep" in inspect.signature(base.forward).parameters
    by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    model.eval()
    try:
        with around if around is not None else nullcontext():
            for start in _steps(len(rows), batch_size, bar):
                numbers = by_length[start : start + batch_size]
                inputs, labels = _padded([rows[number] for number in numbers], device)
                labels = labels[:, 1:]
                columns = (labels != IGNORED).any(0).nonzero().flatten()
                # The vocabulary is large and completions are short: logits where a row has a label, and nowhere else.
                options = {"logits_to_keep": columns} if selects else {}
                logits = model(**inputs, use_cache=False, **options).logits
                logits, labels = (logits if selects else logits[:, columns]).float(), labels[:, columns]
                losses = functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
                ).view_as(labels)
                counted = labels != IGNORED
                right = ((logits.argmax(-1) == labels) | ~counted).all(1) & counted.any(1)
                of_rows = (losses.double().sum(1).tolist(), counted.sum(1).tolist(), right.tolist())
                found.update(zip(numbers, map(RowLoss, *of_rows), strict=True))
    finally:
        model.train(training)
    return [found[number] for number in range(len(rows))]


def _steps(rows: int, batch_size: int, bar: str | None) -> Iterable[int]:
    """The first row of each batch, with a bar on a terminal if it has a name."""
    return tqdm(range(0, rows, batch_size), bar, unit="batch", leave=False, disable=None if bar else True)


def _padded(rows: Sequence[Mapping[str, Sequence[int]]], device: torch.device) -> tuple[dict, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    filled = {
        name: torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows], device=device)
        for name, value in (("input_ids", 0), ("labels", IGNORED))
    }
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled["input_ids"], "attention_mask": mask.to(device)}, filled["labels"]


def prefer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    choices: Sequence[str],
    batch_size: int = BATCH_SIZE,
    bar: str | None = None,
) -> list[str]:
    """The likeliest of the choices as completion of each row, by the sum over its tokens, its end among them."""
    candidates = []
    for row in rows:
        of_row = [encode(tokenizer, {**row, "completion": _as(row["completion"], each)}) for each in choices]
        # The last letters of a prompt can be one token with some of the choices: all are counted from there.
        start = min(each["labels"].count(IGNORED) for each in of_row)
        candidates += [{**each, "labels": [IGNORED] * start + each["input_ids"][start:]} for each in of_row]
    nll = [row.nll for row in row_losses(model, candidates, batch_size, bar=bar)]
    parts = [nll[start : start + len(choices)] for start in range(0, len(nll), len(choices))]
    return [choices[part.index(min(part))] for part in parts]


def _as(completion: Any, choice: str) -> Any:
    """A choice in the form of a completion: with its white space, or as its last turn."""
    if isinstance(completion, str):
        start = len(completion) - len(completion.lstrip())
        return completion[:start] + choice + completion[len(completion.rstrip()) :]
    return [*completion[:-1], {**completion[-1], "content": choice}]


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int | None = None,
    bar: str | None = None,
) -> list[str]:
    """Greedy answers to the prompts of rows, conversational or plain, without the white space around them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): comes back in the mode that it was in.
        tokenizer (`PreTrainedTokenizerBase`): whose end of sequence ends an answer, as do those of the model.
        rows (`Sequence`): with `prompt`.
        batch_size (`int`, *optional*, defaults to 16): rows at a time.
        max_new_tokens (`int`, *optional*): of an answer. Default: 8, or one more than the longest `completion` has, so
            that an answer that goes on after it is not taken for it.
        bar (`str`, *optional*): the name of a bar, which a terminal shows.
    """
    if max_new_tokens is None:
        rights = [text_of(row["completion"]) for row in rows if "completion" in row]
        longest = max((len(tokenizer(right, add_special_tokens=False)["input_ids"]) for right in rights), default=0)
        max_new_tokens = max(NEW_TOKENS, longest + 1)
    # A run can be told to end its answers otherwise than the base does (`eos_token` of `SFTConfig`).
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    training = model.training
    model.eval()
    texts = [
        row["prompt"]
        if isinstance(row["prompt"], str)
        else tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True, **template_options(row)
        )
        for row in rows
    ]
    answers: list[str] = []
    for start in _steps(len(rows), batch_size, bar):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=isinstance(rows[start]["prompt"], str),  # a template has them
        ).to(model.device)
        # Greedy, whatever the model's own generation configuration says: that of Qwen2.5 has a penalty.
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": sorted(ends) or None}
        tokens = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens, use_cache=True)
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(training)
    return [text.strip() for text in answers]
