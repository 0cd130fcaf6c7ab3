"""Steps of several students at once on one GPU: a CUDA stream for each.

The kernels of small networks leave most of a GPU idle; those of another student can run beside them. The numbers stay
what they are one after the other: each student's work keeps its own order, all of it comes after the batch, and what
comes next waits for all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from kdbench.engine import device as placement
from kdbench.engine.learner import Learner
from kdbench.engine.options import TrainerOptions, require


class Work(NamedTuple):
    """One student's part of a step."""

    learner: Learner
    do: Callable[[], None]


class Side(Protocol):
    """What lanes need of a device: torch.cuda's streams, or a test's."""

    def new(self) -> Any: ...

    def current(self) -> Any: ...

    def inside(self, stream: Any) -> contextlib.AbstractContextManager[Any]: ...


class Cuda:
    """The streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def inside(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(stream)


class Lanes:
    """Each student's work in a stream of its own, always the same one: a recorded step's memory belongs to it.

    Afterwards the stream that was current waits for all, so memory that it lent (the batch, the teacher's logits) is
    not used again before it is done with. Work that may not run beside others (`Learner.independent`) comes after them.
    """

    def __init__(self, side: Side) -> None:
        self._side = side
        self._streams: dict[int, Any] = {}

    def run(self, works: Sequence[Work]) -> None:
        here = self._side.current()
        beside: list[Work] = []
        alone: list[Work] = []
        for work in works:
            (beside if work.learner.independent else alone).append(work)
        for work in beside:
            stream = self._stream(work.learner)
            stream.wait_stream(here)
            with self._side.inside(stream):
                work.do()
        for work in beside:
            here.wait_stream(self._stream(work.learner))
        for work in alone:
            work.do()

    def _stream(self, learner: Learner) -> Any:
        if id(learner) not in self._streams:
            self._streams[id(learner)] = self._side.new()
        return self._streams[id(learner)]


class InTurn:
    """Students one after the other: on a CPU, or where there is only one."""

    def run(self, works: Sequence[Work]) -> None:
        for work in works:
            work.do()


def make_lanes(options: TrainerOptions, device: torch.device, students: int) -> Lanes | InTurn:
    """What `trainer.streams` asks for. Raises UserError for `on` without CUDA."""
    if options.streams == "on":
        require(device.type == "cuda", "trainer.streams", "on", f"auto or off: this run is on {device.type}")
    wanted = options.streams == "on" or (options.streams == "auto" and placement.PROVEN_ON_CUDA)
    return Lanes(Cuda(device)) if wanted and device.type == "cuda" and students > 1 else InTurn()
