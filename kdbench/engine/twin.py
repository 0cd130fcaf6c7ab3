"""A recorded step beside the plain one, from the same state: it is believed when both end in the same place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kdbench.engine.learner import Learner
from kdbench.types import Batch, Outputs

# How far apart two ends may lie, in parts of the step. A library may choose another kernel while it is recorded, and
# Adam makes whole steps of the last bits of a gradient that is nothing else. A step that was not taken, or was of other
# data, is wrong by half of itself and more.
CLOSE = 0.1
NOISE, MOST = 10, 0.5  # where plain steps do not repeat themselves: so many times as far as they end apart, but no more

State = tuple[list[Tensor], list[Tensor]]  # weights and buffers


class Twin:
    """Copies of a learner that have taken a step of the data plainly, made before it takes the recorded one.

    Costs two plain steps, and the memory of what a learner keeps twice over while it lives, three times while it is
    made. Raises what a plain step or the copying of a loss raises, RuntimeError where a copy is not apart from it.
    """

    def __init__(self, learner: Learner, data: tuple[Batch, Outputs | None]) -> None:
        weights, buffers = state_of(learner.distiller)
        self.learner, self._start = learner, ([t.clone() for t in weights], [t.clone() for t in buffers])
        self.plain, again = learner.copied(), learner.copied()
        without = [parameter for parameter in learner.distiller.parameters() if parameter.grad is None]
        for one in (self.plain, again):
            one.step(*data)
            self._take_back(without)
            if one.failure is not None:
                raise one.failure
        self._end = state_of(self.plain.distiller)
        self._limit = limit(CLOSE, apart(state_of(again.distiller), self._end, self._start))

    def _take_back(self, without: list[nn.Parameter]) -> None:
        """Raise RuntimeError if the copy's step has changed the learner, as it was before again: a function that the
        copy shares with it (a forward put in the place of the class's, a hook) uses the learner's own network.

        without: parameters that had no gradient before."""
        changed: list[Tensor] = []
        for parameter in without:
            if parameter.grad is not None:
                parameter.grad = None
                changed.append(parameter)
        pairs = list(zip(state_of(self.learner.distiller), self._start, strict=True))
        for now, before in [pair for tensors in pairs for pair in zip(*tensors, strict=True)]:
            if not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True):
                now.copy_(before)
                changed.append(now)
        if changed:
            raise RuntimeError("a function of it is bound to the network that it was made for")

    def strays(self) -> float | None:
        """How far the learner, its recorded step taken, is from the plain step's end, in parts of that step; None if it
        is where it should be. Waits for the device."""
        far = apart(state_of(self.learner.distiller), self._end, self._start)
        return far if far > self._limit else None


def limit(close: float, noise: float) -> float:
    """How far a recorded end may lie from a plain one, where plain ones lie `noise` apart."""
    return min(MOST, max(close, NOISE * noise))


def state_of(module: nn.Module) -> State:
    return [t.detach() for t in module.parameters()], [*module.buffers()]


def apart(one: State, other: State, start: State) -> float:
    """How far two ends of a way from `start` lie apart, in parts of the way to the `other`: of the weights or of the
    buffers, whichever is more. 0 where the other end is no number: its loss tells."""
    return max(_parts(*tensors) for tensors in zip(one, other, start, strict=True))


def _parts(one: list[Tensor], other: list[Tensor], start: list[Tensor]) -> float:
    between, way = _norm(_differences(one, other)), _norm(_differences(other, start))
    if between == 0 or not math.isfinite(way):
        return 0.0
    return between / way if way and math.isfinite(between) else math.inf


def _differences(one: list[Tensor], other: list[Tensor]) -> Iterator[Tensor]:
    return (a.double() - b.double() for a, b in zip(one, other, strict=True) if a.numel())


def _norm(tensors: Iterator[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
