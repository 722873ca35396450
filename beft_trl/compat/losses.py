"""What TRL keeps to itself of its loss. Apart from the adapters, which need no TRL and its seconds of import."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils


@contextmanager
def labelled_tokens_only(device: torch.device) -> Iterator[None]:
    """Has TRL's loss compute logits only for tokens with a label on a CPU, as it does on a GPU: the same loss, sooner.

    TRL (1.16) asks `_use_triton` whether to, since the sizes would change from batch to batch, which some devices
    compile for; a CPU does not. This goes when TRL asks for that.
    """
    if device.type != "cpu" or not hasattr(utils, "_use_triton"):
        yield
        return
    asked, utils._use_triton = utils._use_triton, lambda device: True
    try:
        yield
    finally:
        utils._use_triton = asked
