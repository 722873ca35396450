"""Fine-tunes one attention bias term of a causal language model.

The demo, a real model without a hub or a GPU:

    accelerate launch examples/sft_opt.py

OPT from the hub, with one field of the recipe overridden:

    accelerate launch examples/sft_opt.py --config recipes/opt-125m/beft.yaml --learning_rate 1e-3

Every field of `BeftScriptArguments`, `BeftSFTConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig` can stand in
the recipe or on the command line. `beft train RECIPE.yaml` is the same run by the installed command.
"""

import sys

from accelerate import PartialState

from beft_trl.cli import explained_errors
from beft_trl.cli.recipe import parse_recipe
from beft_trl.cli.run import leave, train
from beft_trl.demo import DEMO_MODEL, DEMO_RECIPE, make_demo


def main() -> None:
    named = [] if any(each.split("=")[0] == "--config" for each in sys.argv) else ["--config", str(DEMO_RECIPE)]
    recipe = parse_recipe([*named, *sys.argv[1:]])
    with PartialState().main_process_first():
        if recipe.base_model == str(DEMO_MODEL):
            make_demo()
    leave(train(recipe))


if __name__ == "__main__":
    with explained_errors():
        main()
