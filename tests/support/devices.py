"""What a GPU would refuse, seen without one: on the meta device a tensor has no values, so that reading one fails."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OneDevice(TorchDispatchMode):
    """Fails where tensors of two devices meet, as on a GPU: products and indexing with one of the CPU pass on the meta
    device. A single number may lie anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{func} of {[str(t.device) for t in tensors]}"
        return func(*args, **(kwargs or {}))
