"""What a step costs whatever the machine: floating-point operations, and bytes between memory and processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """`flops`: two for each multiply-add of convolutions and matrix products, forward and backward; no others count.

    `moved`: bytes, if every operation reads its inputs from memory and writes its outputs there, once each. What stays
    in a cache, or is fused, costs less.
    """

    flops: int
    moved: int

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.moved + other.moved)


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.moved += sum(_size(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def cost_of(work: Callable[[], object]) -> Cost:
    """Counted while `work` runs once."""
    with FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        work()
    return Cost(counter.get_total_flops(), traffic.moved)
