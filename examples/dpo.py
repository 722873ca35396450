"""Learns to prefer the right team to a wrong one: DPO that trains one attention bias term.

    accelerate launch examples/dpo.py

The pairs are made of the demo's messages: the right team is chosen, and each other team is rejected once. Every field
of `BeftScriptArguments`, `BeftDPOConfig` and `trl.ModelConfig` can stand in the recipe or on the command line.
"""

from datasets import Dataset
from trl import get_quantization_config

from beft_trl import BeftDPOConfig, BeftDPOTrainer
from beft_trl.cli import explained_errors
from beft_trl.cli.run import check_base, leave, load_data, recipe_of_script
from beft_trl.evaluation import evaluate


RECIPE = "recipes/rl/dpo.yaml"
TEAMS = ("Billing", "Shipping", "Returns", "Technical", "Account", "Sales")


def pairs(rows: Dataset) -> Dataset:
    """A right and a wrong answer for each message and wrong team."""
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": [{"role": "assistant", "content": team}],
            }
            for row in rows
            for team in TEAMS
            if team != row["completion"][0]["content"]
        ]
    )


def main() -> None:
    recipe = recipe_of_script(RECIPE, BeftDPOConfig)
    check_base(recipe)
    data = load_data(recipe)
    trainer = BeftDPOTrainer(
        model=recipe.base_model,
        args=recipe.training,
        train_dataset=pairs(data.train),
        processing_class=data.tokenizer,
        quantization_config=get_quantization_config(recipe.model),
    )
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model()
    measured = evaluate(trainer.model, data.tokenizer, data.held_out, choices=TEAMS)
    trainer.accelerator.print(
        f"Held-out messages: the right team is the likeliest of six for {measured.ranked:.3f}, and is written for "
        f"{measured.exact:.3f}"
    )
    leave(trainer)


if __name__ == "__main__":
    with explained_errors():
        main()
