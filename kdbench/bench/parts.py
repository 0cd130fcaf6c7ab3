"""Where the time of one step goes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kdbench.bench.cost import Cost, cost_of
from kdbench.bench.timing import Figure, figure
from kdbench.bench.workbench import Workbench
from kdbench.engine.evaluate import all_logits
from kdbench.engine.learner import Learner
from kdbench.types import Batch, Epochs, Outputs, Teacher


class Parts(NamedTuple):
    """Seconds a step, by part; `evaluation`: seconds an image; what a step costs the student, and the teacher."""

    seconds: dict[str, Figure]
    evaluation: Figure
    student: Cost
    teacher: Cost


class Clock:
    """Seconds between marks, once the device has done what was asked of it."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self.seconds: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        self._wait()
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What ran since the last mark was `name`."""
        before = self._last
        self.start()
        self.seconds.setdefault(name, []).append(self._last - before)


def time_parts(bench: Workbench, served: tuple[Epochs, Teacher], repeats: int) -> Parts:
    """Medians of some steps, part by part, each waited for (on a GPU parts overlap: their sum is more than a step)."""
    learner = bench.learner()
    learner.begin_epoch(0)
    clock = Clock(bench.placement.wait)
    batches, teacher = served
    stream = iter(itertools.islice(batches.epoch(0, 1), 2 + repeats))
    batch, answer = next(stream), None
    for number, batch in enumerate(stream):
        if number:  # the step before was warm-up
            clock.mark("data")
        answer = teacher(batch)
        clock.mark("teacher")
        _step(learner, batch, answer, clock)
    seconds = {name: figure(values[1:] or values) for name, values in clock.seconds.items()}
    student = cost_of(lambda: learner.update(batch, answer))
    asked = cost_of(lambda: _ask(bench, batch))
    return Parts(seconds, _evaluation(bench, learner), student, asked)


def _step(learner: Learner, batch: Batch, answer: Outputs | None, clock: Clock) -> None:
    """Learner.update with a clock in it."""
    output = learner.distiller(batch.input, answer, batch.target)
    clock.mark("student forward, loss")
    output.terms.total.backward()
    clock.mark("student backward")
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    clock.mark("optimizer")
    learner.meters.add(output, answer, batch.target)
    clock.mark("meters")


def _ask(bench: Workbench, batch: Batch) -> Any:
    return bench.teacher.teacher(batch) if bench.teacher else None


class _Some:
    """The first batches of an evaluation set."""

    def __init__(self, batches: Any, count: int) -> None:
        self._batches, self._count = batches, count
        self.size = batches.size

    def __iter__(self) -> Any:
        return itertools.islice(self._batches, self._count)


def _evaluation(bench: Workbench, learner: Learner) -> Figure:
    """Seconds an image of the test set; the second batch and the third, the first warms up."""
    some, values = _Some(bench.sets["test"], 1), []
    for _ in range(4):
        begin = time.perf_counter()
        logits, _labels = all_logits(learner.network, some)
        bench.placement.wait()
        values.append((time.perf_counter() - begin) / len(logits))
    return figure(values[1:])
