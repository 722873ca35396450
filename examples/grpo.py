"""Learns to name teams from rewards only: GRPO that trains one attention bias term.

    accelerate launch examples/grpo.py

The prompt names the six teams and shows one solved message of three of them, so that the base finds the right team now
and then. Of the others no answer is shown: the model writes eight for each message, and is told how good they are.
Every field of `BeftScriptArguments`, `BeftGRPOConfig` and `trl.ModelConfig` can stand in the recipe or on the command
line.
"""

from datasets import Dataset
from trl import get_quantization_config

from beft_trl import BeftGRPOConfig, BeftGRPOTrainer
from beft_trl.cli import explained_errors
from beft_trl.cli.run import check_base, leave, load_data, recipe_of_script
from beft_trl.evaluation import share_equal, text_of, write


RECIPE = "recipes/rl/grpo.yaml"
TEAMS = ("Billing", "Shipping", "Returns", "Technical", "Account", "Sales")
SHOWN = (21, 0, 31)  # training rows that the prompt shows with their answers: short ones
GUESSED = -1 / (len(TEAMS) - 1)  # for a wrong team, as in a test with choices: guessing earns nothing


def split(rows: Dataset) -> tuple[Dataset, Dataset]:
    """The rows that a prompt shows, and those to learn from."""
    return rows.select(SHOWN), rows.select([row for row in range(len(rows)) if row not in SHOWN])


def prompts(rows: Dataset, shown: Dataset) -> Dataset:
    """A text to go on with for each message, and the name of the right team, which only the reward sees."""
    solved = [f"{text_of(row['prompt'])} -> {text_of(row['completion'])}\n" for row in shown]
    start = f"Sort each message to {', '.join(TEAMS[:-1])} or {TEAMS[-1]}.\n" + "".join(solved)
    return Dataset.from_list(
        [{"prompt": f"{start}{text_of(row['prompt'])} ->", "team": text_of(row["completion"])} for row in rows]
    )


def answer(completion: str) -> str:
    """The first line of what the model wrote."""
    return completion.strip().split("\n")[0].strip()


def right_team(completions, team, **columns) -> list[float]:
    """1 for the name of the right team and nothing else."""
    found = map(answer, completions)
    return [float(name == right) or GUESSED * (name in TEAMS) for name, right in zip(found, team, strict=True)]


def accuracy(model, tokenizer, rows: Dataset) -> float:
    """Share of rows for which the model's likeliest answer is the name of the right team and nothing else."""
    return share_equal([*map(answer, write(model, tokenizer, rows, max_new_tokens=3))], rows["team"])


def main() -> None:
    recipe = recipe_of_script(RECIPE, BeftGRPOConfig)
    check_base(recipe)
    data = load_data(recipe)
    shown, rest = split(data.train)
    held_out = prompts(data.held_out, shown)
    trainer = BeftGRPOTrainer(
        model=recipe.base_model,
        reward_funcs=right_team,
        args=recipe.training,
        train_dataset=prompts(rest, shown),
        processing_class=data.tokenizer,
        quantization_config=get_quantization_config(recipe.model),
    )
    before = accuracy(trainer.model, data.tokenizer, held_out)
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model()
    after = accuracy(trainer.model, data.tokenizer, held_out)
    trainer.accelerator.print(f"Held-out messages with the right team: {before:.3f} before, {after:.3f} after")
    leave(trainer)


if __name__ == "__main__":
    with explained_errors():
        main()
