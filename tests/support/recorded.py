"""Training with recorded steps on the CPU, as it would be on a GPU: what the tests of recordings share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.engine.options import TrainerOptions
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Target
from tests.support.engine import SmallNet, Stream

OPTIONS = TrainerOptions(device="cpu", progress="none")
ON, OFF = replace(OPTIONS, cuda_graph="on"), replace(OPTIONS, cuda_graph="off")


def make_teacher() -> LiveTeacher:
    torch.manual_seed(9)
    return LiveTeacher(SmallNet(), 8, contextlib.nullcontext)


def uneven(size: int, epoch: int, epochs: int) -> Iterator[Batch]:
    """The batches of a stream, the last one smaller."""
    *whole, last = Stream(size).epoch(epoch, epochs)
    label, row = last.target.label[:3], last.target.row[:3]
    yield from whole
    yield Batch(last.input[:3], last.view[:3], Target(label, row, last.target.progress))


def train(
    learners: Sequence[Learner], epochs: int = 3, size: int = 64, first: int = 0, teacher=None, record: bool = True
) -> None:
    steps = cohort_graph(learners, torch.device("cpu")) if record else None
    for epoch in range(first, epochs):
        for learner in learners:
            learner.begin_epoch(epoch)
        train_epoch(learners, uneven(size, epoch, epochs), teacher or make_teacher(), lambda: None, steps)
    assert [learner.failure for learner in learners] == [None] * len(learners)


def assert_same(one: Learner, other: Learner) -> None:
    for (key, a), b in zip(one.distiller.state_dict().items(), other.distiller.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert one.meters.read() == other.meters.read() and one.steps_done == other.steps_done
