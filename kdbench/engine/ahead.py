"""The data of the next steps in device memory that stays where it is, which a recorded step reads by a counter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from kdbench.types import Batch, Outputs

_WORD = 8  # bytes
_APART = 32  # words: where tensors begin in a row, as in memory of their own. cuDNN chooses its kernels by that, too


class Ahead:
    """The data of some steps, batch and teacher's outputs, in memory that stays where it is.

    All steps' data have the shapes and strides of `example`. A step is a row of words of eight bytes, each tensor a
    part of it in its own order, aligned as memory of its own is: one kernel reads it all, and what is read has the
    layout of what was put.
    """

    def __init__(self, example: tuple[Batch, Outputs | None], steps: int) -> None:
        every, self._spec = tree_flatten(_whole(example))
        self._absent = [place for place, leaf in enumerate(every) if leaf is None]
        self._layouts: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._parts: list[tuple[slice, torch.dtype]] = []  # of a row, in words
        words = 0
        for tensor in map(dense, tensors_of(example)):
            first, words = words, words - (-tensor.numel() * tensor.element_size() // (_WORD * _APART)) * _APART
            self._parts.append((slice(first, words), tensor.dtype))
            self._layouts.append((tensor.shape, tensor.stride()))
        self.steps = steps
        self._rows = torch.empty(steps, words, dtype=torch.int64, device=example[0].input.device)

    def put(self, data: Sequence[tuple[Batch, Outputs | None]]) -> None:
        """The data of the next steps, at most `steps`. Two kernels a tensor, whatever their number."""
        columns = zip(*map(tensors_of, data), strict=True)
        for (part, dtype), (shape, stride), tensors in zip(self._parts, self._layouts, columns, strict=True):
            found = torch.stack([_bytes_of(t, shape, stride) for t in tensors])
            self._rows[: len(data), part].view(dtype)[:, : found.shape[1]].copy_(found)

    def at(self, step: Tensor) -> tuple[Batch, Outputs | None]:
        """The data of step [1] int64, which is read on the device."""
        row = self._rows.index_select(0, step)[0]
        found: list[Tensor | None] = []
        for (part, dtype), (shape, stride) in zip(self._parts, self._layouts, strict=True):
            found.append(row[part].view(dtype).as_strided(shape, stride))
        for place in self._absent:
            found.insert(place, None)
        batch, *answer = tree_unflatten(found, self._spec)
        return batch, answer[0] if answer else None


def _whole(data: tuple[Batch, Outputs | None]) -> tuple[Batch, Outputs] | tuple[Batch]:
    """Without the answer of a teacher that there is not."""
    batch, answer = data
    return (batch,) if answer is None else (batch, answer)


def tensors_of(data: tuple[Batch, Outputs | None]) -> list[Tensor]:
    """What there is of a step's data, in one order."""
    return [leaf for leaf in tree_leaves(_whole(data)) if leaf is not None]


def dense(tensor: Tensor) -> Tensor:
    """The same numbers without gaps in memory: the tensor itself, or a copy."""
    is_dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor if is_dense else tensor.contiguous()


def _bytes_of(tensor: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A tensor's numbers [n] in the order of memory that `stride` asks for."""
    if tensor.stride() != stride:
        tensor = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))
