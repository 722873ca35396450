"""Runs `examples/sft_opt.py` as it is and notes, on every process, what only the process can see.

accelerate launch --config_file ... tests/witness.py NOTES_FOLDER --config RECIPE.yaml ...
"""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import torch

import beft_trl.cli.run


NOTES = Path(sys.argv.pop(1))
SCRIPT = Path(__file__).parents[1] / "examples" / "sft_opt.py"


def storage(parameter):
    """What this process holds of a parameter: its share under ZeRO-3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def whole(parameter):
    """All of a parameter, gathered where ZeRO-3 has split it."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def digest_of_base(model):
    """A hash of every frozen tensor and of the scales of the quantised ones."""
    digest = hashlib.sha256()
    tensors = {name: whole(p) for name, p in model.named_parameters() if "beft_bias" not in name}
    for name, module in model.named_modules():
        # bitsandbytes moves the scales from the weight to the layer's state at the first forward pass.
        weight = getattr(module, "weight", None)
        scales = (getattr(weight, "SCB", None), getattr(getattr(module, "state", None), "SCB", None))
        tensors |= {f"{name}.SCB": scale for scale in scales if torch.is_tensor(scale)}
        absmax = getattr(getattr(weight, "quant_state", None), "absmax", None)
        tensors |= {f"{name}.absmax": absmax} if torch.is_tensor(absmax) else {}
    tensors = {name.replace(".base_layer.", ".").replace(".base_layer", ""): each for name, each in tensors.items()}
    for name in sorted(tensors):
        digest.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Witness(beft_trl.cli.run.BeftSFTTrainer):
    def train(self, *args, **kwargs):
        notes = {"base_before": digest_of_base(self.model), "dtype": str(self.model.dtype)}
        notes["layers"] = sorted({type(module).__name__ for module in self.model.modules()})
        try:
            return super().train(*args, **kwargs)
        finally:
            self.note(notes)

    def note(self, notes):
        weights = [
            module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and re.search(r"\b(layers|h)\b", name)
        ]
        notes |= {
            "base_after": digest_of_base(self.model),
            "weight_dtypes": sorted({str(storage(weight).dtype) for weight in weights}),
            "elements_held": sum(storage(weight).numel() for weight in weights),
            "elements": sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights),
            "delta_dtypes": sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad}),
            "optimizer_dtypes": sorted(self.optimizer_dtypes()),
            "selected": self.selected_bias_term,
            "scores": self.bias_scores.to_dict(),
            "skipped_frozen_layers": self.frozen_cache and self.frozen_cache.batches["skipped"],
        }
        (NOTES / f"rank{self.args.process_index}.json").write_text(json.dumps(notes))

    def optimizer_dtypes(self):
        """The dtypes of what the optimizer updates: the deltas, or DeepSpeed's master copies of them."""
        inner = self.optimizer
        while hasattr(inner, "optimizer"):
            if hasattr(inner, "fp32_partitioned_groups_flat"):  # ZeRO-3 lends them to the optimizer for each step
                return {str(parameter.dtype) for parameter in inner.fp32_partitioned_groups_flat}
            inner = inner.optimizer
        return {str(parameter.dtype) for group in inner.param_groups for parameter in group["params"]}


beft_trl.cli.run.BeftSFTTrainer = Witness
sys.argv[0] = str(SCRIPT)
sys.path.insert(0, str(SCRIPT.parent))
runpy.run_path(str(SCRIPT), run_name="__main__")
