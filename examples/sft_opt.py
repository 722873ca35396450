"""Fine-tunes one attention bias term of a causal language model.

The demo, a real model without a hub or a GPU:

    accelerate launch examples/sft_opt.py

OPT from the hub, with one field of the recipe overridden:

    accelerate launch examples/sft_opt.py --config recipes/opt-125m/beft.yaml --learning_rate 1e-3

Every field of `BeftScriptArguments`, `BeftSFTConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig` can stand in
the recipe or on the command line. `beft train RECIPE.yaml` is the same run by the installed command.
"""

from beft_trl.cli import explained_errors
from beft_trl.cli.run import leave, recipe_of_script, train
from beft_trl.demo import DEMO_RECIPE


def main() -> None:
    leave(train(recipe_of_script(DEMO_RECIPE)))


if __name__ == "__main__":
    with explained_errors():
        main()
