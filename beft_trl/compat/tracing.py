"""What PyTorch keeps to itself of tensors without data (torch 2.13)."""

from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


__all__ = ["DataDependentOutputException", "FakeTensorMode", "TorchDispatchMode", "WeakIdKeyDictionary", "tree_leaves"]
