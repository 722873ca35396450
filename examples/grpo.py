"""Learns to name teams from rewards only: GRPO that trains one attention bias term.

    accelerate launch examples/grpo.py

No answer is shown to the model. It writes four for each message of the demo, and is told how good they are: a little
for naming a team, and a lot for the right one, times the share of the answer that is the name. In 130 steps it learns
to begin with a team, and not yet with the right one. Every field of `BeftScriptArguments`, `BeftGRPOConfig` and
`trl.ModelConfig` can stand in the recipe or on the command line.
"""

from trl import get_quantization_config

from beft_trl import BeftGRPOConfig, BeftGRPOTrainer
from beft_trl.cli import explained_errors
from beft_trl.cli.run import check_base, leave, load_data, recipe_of_script
from beft_trl.evaluation import evaluate


RECIPE = "recipes/rl/grpo.yaml"
TEAMS = ("Billing", "Shipping", "Returns", "Technical", "Account", "Sales")
FOR_A_TEAM = 0.3  # so that the model finds names before it finds the right ones


def named(answer: str) -> tuple[str | None, float]:
    """The only team that an answer names, and the share of the answer that the name is."""
    teams = [team for team in TEAMS if team in answer]
    return (teams[0], len(teams[0]) / len(answer.strip())) if len(teams) == 1 else (None, 0.0)


def names_a_team(completions, **columns) -> list[float]:
    return [FOR_A_TEAM * named(turns[0]["content"])[1] for turns in completions]


def names_the_right_team(completions, team, **columns) -> list[float]:
    found = [named(turns[0]["content"]) for turns in completions]
    return [share * (name == right) for (name, share), right in zip(found, team, strict=True)]


def main() -> None:
    recipe = recipe_of_script(RECIPE, BeftGRPOConfig)
    check_base(recipe)
    data = load_data(recipe)
    trainer = BeftGRPOTrainer(
        model=recipe.base_model,
        reward_funcs=[names_a_team, names_the_right_team],
        args=recipe.training,
        train_dataset=data.train.map(
            lambda row: {"team": row["completion"][0]["content"]}, remove_columns=["completion"]
        ),
        processing_class=data.tokenizer,
        quantization_config=get_quantization_config(recipe.model),
    )
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model()
    measured = evaluate(trainer.model, data.tokenizer, data.held_out, choices=TEAMS)
    trainer.accelerator.print(f"Held-out messages answered with the right team: {measured.exact:.3f}")
    leave(trainer)


if __name__ == "__main__":
    with explained_errors():
        main()
