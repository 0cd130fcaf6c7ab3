"""A CUDA graph's stand-in for CPUs: the tensor operations of a function, replayed on the same memory.

Like a CUDA graph it sees nothing of Python, and refuses to read numbers from the device or to copy them there, which
on a GPU makes the host wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
# Operations whose result's shape is a number on the device, or that ask the device whether they have succeeded.
_WAITING = {
    getattr(packet, name)
    for packet in (
        _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive, _ATEN.bincount,
        _ATEN.repeat_interleave, _ATEN.equal, _ATEN.histc, _ATEN._linalg_svd, _ATEN._linalg_eigh, _ATEN.linalg_eig,
    )
    for name in packet.overloads()
}  # fmt: skip


class Waits(RuntimeError):
    """On a GPU the host would wait for what is recorded."""


class Tape:
    """A Recording (kdbench.engine.recording) that runs anywhere."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.calls: list[tuple[Any, tuple, dict, list[torch.Tensor]]] = []
        with _Watch(self.calls):
            self.output = function()
        self.ahead = True

    @torch.no_grad()
    def replay(self) -> None:
        if self.ahead:  # recording a CUDA graph runs nothing, watching did: this replay is done already
            self.ahead = False
            return
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                if new is not old:
                    old.copy_(new)


class _Watch(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _ATEN._local_scalar_dense.default:
            raise Waits("a number was read from the device while recording")
        if func in _WAITING or _chooses(func, args):
            raise Waits(f"{func} waits for the device")
        if func is _ATEN.lift_fresh.default:
            raise RuntimeError("a tensor was made of Python numbers while recording: on a GPU, a copy from the host")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view of the same memory needs no second run
            self.calls.append((func, args, kwargs or {}, _tensors(out)))
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _chooses(func: Any, args: tuple) -> bool:
    """Whether elements are taken or set by a mask, whose ones have to be counted. One number is filled in without."""
    if func not in (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default):
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and (func is _ATEN.index.Tensor or args[2].numel() != 1)
