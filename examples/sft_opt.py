"""Fine-tunes one attention bias term of a causal language model.

The demo, a real model without a hub or a GPU:

    accelerate launch examples/sft_opt.py

OPT from the hub, with one field of the recipe overridden:

    accelerate launch examples/sft_opt.py --config recipes/opt-125m/beft.yaml --learning_rate 1e-3

Every field of `BeftScriptArguments`, `BeftSFTConfig`, `trl.ModelConfig` and `trl.DatasetMixtureConfig` can stand in
the recipe or on the command line. `beft train RECIPE.yaml` is the same run by the installed command.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from make_demo_model import DEMO_MODEL, make_demo_model

from beft_trl.recipe import parse_recipe
from beft_trl.run import leave, train


DEMO_RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"


if __name__ == "__main__":
    recipe = parse_recipe(sys.argv[1:] or ["--config", str(DEMO_RECIPE)])
    with PartialState().main_process_first():
        if recipe.model.model_name_or_path == str(DEMO_MODEL) and not DEMO_MODEL.exists():
            make_demo_model()
    leave(train(recipe))
