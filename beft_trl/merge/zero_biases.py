"""A base whose attention layers have biases of zero, for servers that are given the trained ones while they run."""

from pathlib import Path

import torch

from ..layout import features, find_bias_sites
from ..weight_files import MergeError
from .base import find_base, read_config, skeleton_in
from .checkpoint_files import CheckpointFiles
from .output import MergeReport, check_output, copy_files, files_to_copy, whole_or_nothing, write_config
from .placement import with_biases
from .servers import not_read


VLLM = "vllm"  # the server that TRL's trainers generate with


def add_zero_biases(base: str | Path, output: str | Path, link: bool = False) -> MergeReport:
    """Writes a base model with query, key and value biases of zero, which answers as the base does.

    vLLM makes room for a bias only where the configuration has one. A `BeftGRPOTrainer` with `use_vllm=True` sends it
    only the trained biases, so that it needs a base that has them.

    Args:
        base (`str` or `Path`): folder of the base model, or its name on the hub.
        output (`str` or `Path`): folder to write, new or empty.
        link (`bool`, *optional*, defaults to `False`): hard-link the weights, instead of copying them.

    Raises:
        MergeError: if the base has such biases already, or its configuration has no switch for them.
        OSError: if a file cannot be read or written.
    """
    output = Path(output)
    check_output(output)
    folder = find_base(str(base))
    config = read_config(folder)
    skeleton = skeleton_in(config, folder)
    sites = find_bias_sites(skeleton)
    bare = {site.module for site in sites if not site.has_bias}
    if not bare:
        raise MergeError(f"{base} has query, key and value biases of its own: use it as it is.")
    fitting = (found for found in with_biases(config, skeleton) if bare <= found[2])
    rule, variant, created = next(fitting, (None, None, None))
    if rule is None or variant is None or created is None:
        raise MergeError(
            f"{type(skeleton).__name__} has no configuration switch that creates query, key and value biases, so that "
            "no server would make room for them. Generate with Transformers (use_vllm=False)."
        )
    report = MergeReport(str(output), rule)
    zeros = {path: torch.zeros(features(skeleton.get_submodule(path))[1]) for path in created}
    for path in not_read(VLLM, variant.model_type, skeleton, sites, zeros, {}, switched=True):
        del zeros[path]
    loaded_in = config.dtype if isinstance(config.dtype, torch.dtype) else None
    with whole_or_nothing(output) as partial:
        copy_files(files_to_copy(folder), partial)
        written = CheckpointFiles(folder, skeleton).copy_with({}, zeros, partial, link, loaded_in)
        report.changed, report.added, report.base_hashes, _ = written
        write_config(variant, folder, partial)
    return report
