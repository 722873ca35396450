"""A run of a recipe from end to end: data, scores, training, held-out figures, the adapter, what to do next."""

import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from trl import get_quantization_config

from .. import report
from ..config import BeftSFTConfig
from ..demo import DEMO_MODEL, make_demo
from ..evaluation import completions_of, share_equal, text_of, write
from ..importance import SCORE_OF_METHOD, SCORES_FILE, BiasScores, rank
from ..layout import TERMS
from ..trainer import BeftSFTTrainer
from ..weight_files import load_tokenizer
from .bases import base_skeleton, check_weights, refuse_missing_model
from .recipe import Recipe, held_out_rows, load_rows, parse_recipe, split_names


class Data(NamedTuple):
    """The rows of a recipe, and the tokenizer that they are for."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    held_out: Dataset | IterableDataset | None


def check_base(recipe: Recipe) -> None:
    """Refuses a base model that is missing or damaged, before anything of it is loaded.

    Raises:
        OSError, ValueError: with what is wrong.
    """
    refuse_missing_model(recipe.base_model, recipe.model.model_revision)
    check_weights(recipe.base_model, recipe.training, base_skeleton(recipe.base_model, recipe.training))


def recipe_of_script(default: str | Path, config: type = BeftSFTConfig) -> Recipe:
    """The recipe that an example is called with, after the demo's files are put here if its base is the demo's.

    Args:
        default: the recipe of a call without `--config`.
        config: class of the training configuration, see [`parse_recipe`].
    """
    given = any(each.split("=")[0] == "--config" for each in sys.argv)
    recipe = parse_recipe([*([] if given else ["--config", str(default)]), *sys.argv[1:]], config)
    with PartialState().main_process_first():
        if recipe.base_model == str(DEMO_MODEL):
            make_demo()
    return recipe


def load_data(recipe: Recipe) -> Data:
    """Loads tokenizer and rows.

    Raises:
        OSError, ValueError: for what is missing or cannot be read.
    """
    tokenizer = load_tokenizer(
        recipe.base_model,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
    )
    template = tokenizer.chat_template or getattr(recipe.training, "chat_template_path", None)
    rows = load_rows(recipe.script, recipe.dataset, chat=template is not None)
    return Data(tokenizer, rows[split_names(recipe.script)[0]], held_out_rows(rows, recipe.script, recipe.training))


def build_trainer(recipe: Recipe, data: Data) -> BeftSFTTrainer:
    """The trainer of a recipe, with its model loaded and its data prepared."""
    return BeftSFTTrainer(
        model=recipe.base_model,
        args=recipe.training,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        quantization_config=get_quantization_config(recipe.model),
    )


def train(recipe: Recipe) -> BeftSFTTrainer:
    """Trains a recipe, saves the adapter, and prints what came of it and the next commands."""
    check_base(recipe)
    data = load_data(recipe)
    trainer = build_trainer(recipe, data)
    say = trainer.accelerator.print
    held_out = data.held_out
    questions = list(islice(held_out if held_out is not None else (), recipe.script.answers))

    # DeepSpeed has no engine to evaluate with before training.
    before = None if trainer.is_deepspeed_enabled else measure(trainer, questions)
    started = time.monotonic()
    output = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    scored = time.monotonic() - started - output.metrics["train_runtime"]
    trainer.save_model()  # first: nothing that the evaluation meets can lose the run
    after = measure(trainer, questions)

    assert trainer.bias_scores is not None
    say(f"Ranking: {' > '.join(trainer.bias_scores.ranking) or 'not scored'}; trained: {trainer.selected_bias_term}")
    for name in after:
        say(f"Held-out {name}: {f'{before[name]:.3f} before, ' if before else ''}{after[name]:.3f} after")
    for row in range(min(3, len(questions))):
        say(f"  {text_of(questions[row]['prompt'])[-72:]!r}")
        say(f"    before {before.answers[row]!r}, after {after.answers[row]!r}" if before else after.answers[row])
    folder = recipe.output_dir
    if trainer.accelerator.is_main_process:
        size = (folder / "adapter_model.safetensors").stat().st_size
        say(f"Adapter: {folder / 'adapter_model.safetensors'}, {size:,} bytes")
    say(f"Seconds: {scored:.1f} scoring, {output.metrics['train_runtime']:.1f} training")
    say(next_commands(folder, recipe.base_model))
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer


def leave(run: Any) -> None:
    """Ends a process that trained with others on a CPU, when everything is written, and returns in any other.

    Gloo's threads may still be letting go of the last collective's tensors. One that asks for the interpreter while
    that shuts down ends the process with SIGABRT, and the launcher calls the run failed: about one in a hundred.

    Args:
        run: the trainer, or what a search gave, with its `accelerator`.
    """
    if run.accelerator.num_processes > 1 and run.accelerator.device.type == "cpu":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def score(recipe: Recipe, steps: Sequence[int | None] = (None,), output: Path | None = None) -> BiasScores:
    """Runs the scoring pass of a recipe, once for each number of steps, and writes the last one's scores and heat map.

    Args:
        recipe: with `bias_term="auto"`.
        steps: optimizer steps of each pass, `None` for those of the recipe.
        output: folder for `beft_scores.json` and `beft_scores.png`. Default: the recipe's `output_dir`.
    """
    recipe.training.output_dir = str(output or recipe.output_dir)
    check_base(recipe)
    trainer = build_trainer(recipe, load_data(recipe))
    table = Table("steps", "ranking", "margin", *TERMS, title=SCORE_OF_METHOD[recipe.training.score_method])
    for count in steps:
        scores = trainer.score(count)
        values = [scores.terms[term].score(scores.ranked_by) for term in TERMS]
        table.add_row(
            str(scores.steps),
            " > ".join(scores.ranking),
            "" if scores.margin is None else f"{scores.margin:.3g}",
            *("" if value is None else f"{value:.2e}" for value in values),
        )
    if trainer.accelerator.is_main_process:
        picture = report.heat_map(scores)
        scores.to_json(recipe.output_dir / SCORES_FILE)
        (recipe.output_dir / report.HEAT_MAP_FILE).write_bytes(picture)
        console = Console()
        selected = scores.terms[scores.selected].parameters
        console.print(report.scores_table(scores, selected, None))
        if len(steps) > 1:
            console.print(table)
        for method, name in SCORE_OF_METHOD.items():
            console.print(f"By {name}: {' > '.join(rank(scores.terms, method))}")
        console.print(f"Wrote {SCORES_FILE} and {report.HEAT_MAP_FILE} in {recipe.output_dir}.", markup=False)
    return scores


def next_commands(folder: Path, base: str) -> str:
    """What to do with an adapter in `folder`: look, merge, chat, load."""
    merged = f"{folder}-merged"
    return (
        "Next:\n"
        f"  beft info {folder}\n"
        f"  beft merge --adapter {folder} --output {merged}\n"
        f"  transformers serve    and, in another terminal, transformers chat {merged}\n"
        f'  python: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
    )


class Measured(dict[str, float]):
    """Held-out figures by name, and the answers that they come from."""

    answers: list[str]


def measure(trainer: BeftSFTTrainer, questions: Any) -> Measured:
    """Loss on the held-out rows, and the share of questions answered exactly as their completion."""
    measured = Measured()
    tokenizer: Any = trainer.processing_class
    if trainer.eval_dataset is not None:
        measured["loss"] = trainer.evaluate()["eval_loss"]
    quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
    measured.answers = write(trainer.model, tokenizer, questions, bar=None if quiet else "Answers")
    if len(questions):
        measured["accuracy"] = share_equal(measured.answers, completions_of(questions))
    return measured
