"""Gradient accumulation: a batch in parts that fit into memory, and their outputs as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kdbench.types import Batch, LossTerms, Outputs, StepOutput, Target

T = TypeVar("T")


def parts(batch: Batch, teacher: Outputs | None, count: int) -> Iterator[tuple[Batch, Outputs | None, float]]:
    """Up to `count` parts of a batch, nearly equal, with the teacher's answers to them and their shares of it.

    Fewer where images or vectors would stand alone in one (an epoch's last batch), which batch norm cannot take.
    teacher: of what the target says counts. Of texts with positions that do not count the host waits for the device.
    """
    rows = len(batch.input)
    if batch.input.is_floating_point():
        count = min(count, max(1, rows // 2))
    bounds = [number * rows // count for number in range(count + 1)]
    for first, last in pairwise(bounds):
        if first < last:
            kept, own = _kept(batch, first, last)
            share = (last - first) / rows if kept is None else len(kept) / len(batch.target.label)
            yield own, _cut(teacher, rows, first, last, kept), share


def _kept(batch: Batch, first: int, last: int) -> tuple[Tensor | None, Batch]:
    """Which predictions a part has, where some positions do not count; and the part."""
    rows, target = len(batch.input), batch.target
    if target.counted is None:
        return None, _cut(batch, rows, first, last, None)
    length = batch.input.shape[1]
    kept = ((target.counted >= first * length) & (target.counted < last * length)).nonzero()[:, 0]
    label, row, counted = (part.index_select(0, kept) for part in (target.label, target.row, target.counted))
    own = Target(label, row, target.progress, counted - first * length)
    return kept, Batch(batch.input[first:last], batch.view[first:last], own)


def _cut(value: T, rows: int, first: int, last: int, kept: Tensor | None) -> T:
    """The part of all tensors in a container: `kept` of those that have no row a sample, or a sample's rows."""

    def cut(tensor: Tensor) -> Tensor:
        each, rest = divmod(len(tensor), rows) if tensor.ndim else (0, 0)
        if kept is not None and (rest or each != 1):
            return tensor.index_select(0, kept)
        return tensor[each * first : each * last] if each else tensor  # a text has a row for each position

    return tree_map_only(Tensor, cut, value)


def joined(found: Sequence[tuple[StepOutput, float]]) -> StepOutput:
    """The outputs of all parts as the whole batch's: terms are means, weighted by the parts' shares."""

    def mean(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
        return torch.stack([value.detach() * share for value, share in terms]).sum(0)

    first = found[0][0].terms
    total = mean([(output.terms.total, share) for output, share in found])
    each = {name: mean([(output.terms.parts[name], share) for output, share in found]) for name in first.parts}
    return StepOutput(LossTerms(total, each), torch.cat([output.logits for output, _ in found]))
