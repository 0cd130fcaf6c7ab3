"""Students side by side: each in a lane of its own, ordered after the batch and before what comes next."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kdbench.engine import graph
from kdbench.engine.lanes import InTurn, Lanes, Work, make_lanes
from kdbench.engine.options import TrainerOptions
from kdbench.engine.trainer import run_steps
from kdbench.errors import UserError
from kdbench.teachers.none import NoTeacher
from tests.support.engine import Stream, make_learner
from tests.support.tape import Tape

OPTIONS = TrainerOptions(device="cpu", progress="none")


class Told:
    """Streams that write down what happens to them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.count = 0
        self.now = self._stream("main")

    def _stream(self, name: str) -> SimpleNamespace:
        waits = lambda other: self.log.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=waits)

    def new(self) -> SimpleNamespace:
        self.count += 1
        return self._stream(f"lane{self.count}")

    def current(self) -> SimpleNamespace:
        return self.now

    @contextlib.contextmanager
    def inside(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


def work(told: Told, name: str, learner: SimpleNamespace) -> Work:
    return Work(learner, lambda: told.log.append(f"{name} in {told.now.name}"))


def test_order_of_lanes():
    told = Told()
    lanes = Lanes(told)
    a, b, random = (SimpleNamespace(independent=free) for free in (True, True, False))
    lanes.run([work(told, "a", a), work(told, "random", random), work(told, "b", b)])
    assert told.log == [
        "lane1 waits for main", "a in lane1", "lane2 waits for main", "b in lane2",
        "main waits for lane1", "main waits for lane2", "random in main",
    ]  # fmt: skip
    told.log.clear()
    lanes.run([work(told, "b", b)])  # a has failed; b stays in its lane
    assert told.log == ["lane2 waits for main", "b in lane2", "main waits for lane2"]


def train(lanes, **options) -> list[dict[str, torch.Tensor]]:
    stream = Stream(64)
    learners = [make_learner(seed=s, stream=stream, trainer=replace(OPTIONS, **options)) for s in range(3)]
    members = [SimpleNamespace(learner=learner, failure=None) for learner in learners]
    for epoch in range(2):
        for learner in learners:
            learner.begin_epoch(epoch)
        run_steps(members, stream.epoch(epoch, 2), NoTeacher(), lambda: None, lanes)
    assert [member.failure for member in members] == [None] * 3
    return [learner.distiller.state_dict() for learner in learners]


def test_lanes_change_no_number(monkeypatch):
    """With dropout; recorded or not."""
    monkeypatch.setattr(graph, "recording", lambda device: Tape)
    expected = train(InTurn())
    for options in ({}, {"cuda_graph": "on"}):
        for got, state in zip(train(Lanes(Told()), **options), expected, strict=True):
            assert all(torch.equal(got[key], value) for key, value in state.items())


def test_recorded_steps_that_draw_random_numbers_stay_out_of_lanes(monkeypatch):
    monkeypatch.setattr(graph, "recording", lambda device: Tape)
    eager, recorded = (make_learner(trainer=replace(OPTIONS, cuda_graph=mode)) for mode in ("off", "on"))
    assert eager.independent and not recorded.independent  # not known before its first steps
    told = Told()
    members = [SimpleNamespace(learner=learner, failure=None) for learner in (eager, recorded)]
    for member in members:
        member.learner.begin_epoch(0)
    run_steps(members, Stream(64).epoch(0, 1), NoTeacher(), lambda: None, Lanes(told))
    assert told.count == 1 and not recorded.independent  # SmallNet has dropout


def test_no_lanes_without_a_gpu():
    assert isinstance(make_lanes(OPTIONS, torch.device("cpu"), 8), InTurn)
    with pytest.raises(UserError, match=r"trainer.streams = on: must be auto or off: this run is on cpu"):
        make_lanes(replace(OPTIONS, streams="on"), torch.device("cpu"), 8)
