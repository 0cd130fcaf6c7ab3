"""A recording is believed for what it does: its first steps are compared with plain ones from the same state."""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdbench.engine import graph
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.engine.twin import Twin, apart, state_of
from kdbench.errors import UserError
from tests.support.engine import LogitDistance, Stream, make_learner
from tests.support.recorded import OFF, ON, assert_same, make_teacher, train
from tests.support.tape import Tape

AUTO = replace(ON, cuda_graph="auto")


SHIFT = 0.01


class Undone(Tape):
    """What recording did is taken back, as on a GPU, which runs nothing meanwhile; and replays do nothing here."""

    def __init__(self, function, learners) -> None:
        kept = [[t.clone() for t in learner.distiller.state_dict().values()] for learner in learners]
        super().__init__(function)
        for learner, tensors in zip(learners, kept, strict=True):
            for now, before in zip(learner.distiller.state_dict().values(), tensors, strict=True):
                now.copy_(before)

    def replay(self) -> None:
        return


class Stuck(Tape):
    """A recording that reads the data of its first step again and again."""

    def replay(self) -> None:
        super().replay()
        for _, args, *_ in self.calls:
            for tensor in args:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.shape == (1,):
                    tensor.zero_()


@pytest.fixture
def proven(tapes, monkeypatch):
    """A machine on which recorded steps have proven to be plain steps."""
    monkeypatch.setattr("kdbench.engine.device.proven", lambda device: True)


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "clip": 0.5}], ids=["plain", "ema+clip"])
def test_a_recording_that_does_nothing_is_left_and_the_training_is_the_plain_one(proven, monkeypatch, caplog, extra):
    one, alone = (make_learner(stream=Stream(64), trainer=replace(mode, **extra)) for mode in (AUTO, OFF))
    monkeypatch.setattr(graph, "recording", lambda function, device: Undone(function, [one]))
    train([one])
    train([alone])
    assert caplog.text.count("ends elsewhere where it is recorded") == 1 and "runs step by step" in caplog.text
    assert_same(one, alone)


def test_a_recording_that_reads_the_same_data_again_is_found(proven, monkeypatch, caplog):
    modes = ((AUTO, 0), (AUTO, 1), (OFF, 0))
    one, other, alone = (make_learner(stream=Stream(64), trainer=mode, seed=seed) for mode, seed in modes)
    for learner in (one, other, alone):
        learner.distiller.student.body[3].p = 0.0
    monkeypatch.setattr(graph, "recording", lambda function, device: Stuck(function))
    train([one, other])
    train([alone])
    assert caplog.text.count("ends elsewhere where it is recorded") == 2  # one line a student
    assert_same(one, alone)


def test_what_was_to_be_recorded_and_strays_fails(proven, monkeypatch):
    one = make_learner(stream=Stream(64), trainer=ON)
    monkeypatch.setattr(graph, "recording", lambda function, device: Undone(function, [one]))
    steps = cohort_graph([one], torch.device("cpu"))
    one.begin_epoch(0)
    train_epoch([one], Stream(64).epoch(0, 1), make_teacher(), lambda: None, steps)
    assert isinstance(one.failure, UserError) and "trainer.cuda_graph = on: must be auto or off" in str(one.failure)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_learner_that_cannot_be_copied(tapes, proven, caplog, mode):
    """A loss of the user's that holds a lock, say."""
    one, alone = (make_learner(stream=Stream(64), trainer=replace(ON, cuda_graph=way)) for way in (mode, "off"))
    one.distiller.loss.lock = threading.Lock()
    train([one])
    train([alone])
    assert len(tapes) == (mode == "on") and ("cannot be compared" in caplog.text) == (mode == "auto")
    assert_same(one, alone)


class Counts(LogitDistance):
    """A loss whose weight creeps up, a thousandth a step, by a count in Python."""

    count = 0

    def forward(self, student, teacher, target):
        self.count += 1
        task = self.task(student.logits, target.label)
        return self.combine(task=task * (1 + 0.001 * self.count))


class Averages(LogitDistance):
    """A loss that puts a mean in the place of the one before."""

    mean = torch.zeros(())

    def forward(self, student, teacher, target):
        task = self.task(student.logits, target.label)
        self.mean = 0.9 * self.mean + 0.1 * task.detach()
        return self.combine(task=task - 0.01 * self.mean * student.logits.mean())


class Draws(LogitDistance):
    """A loss that draws from Python's or numpy's random numbers, one of them."""

    draw = random.random

    def forward(self, student, teacher, target):
        return self.combine(task=self.task(student.logits, target.label) * (1 + 0.01 * type(self).draw()))


class DrawsOfNumpy(Draws):
    draw = np.random.rand


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (Counts, "loss.count"),
        (Averages, "loss.mean"),
        (Draws, "Python's random numbers"),
        (DrawsOfNumpy, "numpy's random numbers"),
    ],
)
def test_a_step_that_changes_what_a_recording_would_not_is_left_out(proven, monkeypatch, caplog, loss, what):
    """Too little in three steps to be seen by where they end, and wrong for the whole training."""
    one, alone, strict = (make_learner(stream=Stream(64), trainer=mode) for mode in (AUTO, OFF, ON))
    for learner in (one, alone, strict):
        learner.distiller.loss.__class__ = loss
    for learner in (one, alone):
        random.seed(0)
        np.random.seed(0)
        train([learner])
    assert f"{loss.__name__}'s step changes {what}, and a recording would not" in caplog.text
    assert_same(one, alone)
    strict.begin_epoch(0)
    steps = cohort_graph([strict], torch.device("cpu"))
    train_epoch([strict], Stream(64).epoch(0, 1), make_teacher(), lambda: None, steps)
    assert what in str(strict.failure)


def test_a_copy_has_the_hooks_of_its_parameters(tapes, proven, caplog):
    """A mask of a gradient, say, without which its plain steps would be others."""

    def weaken(parameter) -> None:
        parameter.grad.mul_(0.1)

    one, alone = (make_learner(stream=Stream(64), trainer=mode) for mode in (AUTO, OFF))
    for learner in (one, alone):
        first, *_, last = learner.distiller.student.parameters()
        first.register_hook(lambda gradient: 0.1 * gradient)
        last.register_post_accumulate_grad_hook(weaken)
    train([one])
    train([alone])
    assert tapes and not caplog.records
    assert_same(one, alone)


def test_a_learner_that_shares_its_network_with_its_copy_is_not_compared(tapes, proven, caplog):
    """A forward that was put in the place of the class's knows one network, whichever copy calls it."""
    one, alone = (make_learner(stream=Stream(64), trainer=mode) for mode in (AUTO, OFF))
    for learner in (one, alone):
        student = learner.distiller.student
        student.forward = lambda image, student=student: type(student).forward(student, image)
    train([one])
    train([alone])
    assert "is bound to the network that it was made for" in caplog.text and not tapes
    assert_same(one, alone)


def test_recordings_that_do_as_they_should_stay(tapes, proven, caplog):
    students = [make_learner(stream=Stream(64), trainer=AUTO, seed=seed) for seed in range(3)]
    train(students)
    assert len(tapes) == 3 and not caplog.records  # of each its dropout


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_copy_shares_nothing_with_its_learner_and_steps_as_it_does(name):
    one = make_learner(stream=Stream(64), trainer=replace(OFF, ema=0.9), name=name)
    data = [(batch, None) for batch in Stream(64).epoch(0, 1)]
    one.begin_epoch(0)
    one.step(*data[0])
    one.distiller._compiled = one.distiller.student.forward
    before, copies = state_of(copy.deepcopy(one.distiller)), [one.copied() for _ in range(2)]
    assert not any(twin.distiller.compiled for twin in copies)
    for twin in copies:
        twin.step(*data[1])
        assert twin.failure is None and twin.steps_done == 2 and int(twin.meters.step) == 2
    assert apart(state_of(copies[0].distiller), state_of(copies[1].distiller), before) == 0
    assert all(map(torch.equal, state_of(one.distiller)[0], before[0])) and int(one.meters.step) == 1
    one.distiller.plain()
    one.take(copies[0])
    one.step(*data[2])
    copies[1].step(*data[2])
    assert_same(one, copies[1])


def test_plain_steps_that_differ_among_themselves_widen_what_is_allowed(monkeypatch):
    """Kernels that add up in no fixed order: each plain step ends a little elsewhere."""
    one, data = make_learner(stream=Stream(64), trainer=OFF), next(iter(Stream(64).epoch(0, 1)))
    one.begin_epoch(0)
    one.step(data, None)
    exact = Twin(one, (data, None))
    step, calls = type(one).step, []

    def noisy(learner, *data) -> None:
        step(learner, *data)
        calls.append(None)
        with torch.no_grad():
            learner.distiller.student.fc.weight.add_(SHIFT * len(calls))

    monkeypatch.setattr(type(one), "step", noisy)
    loose = Twin(one, (data, None))
    step(one, data, None)
    with torch.no_grad():
        one.distiller.student.fc.weight.add_(2 * SHIFT)
    assert exact.strays() > 0.1 and loose.strays() is None


def test_a_step_to_what_is_no_number_strays_only_where_the_plain_one_does_not():
    numbers, lost = ([torch.ones(2)], []), ([torch.full((2,), torch.nan)], [])
    start = ([torch.zeros(2)], [])
    assert apart(lost, lost, start) == 0 and apart(numbers, lost, start) == 0
    assert apart(lost, numbers, start) == float("inf") == apart(numbers, start, start)
    assert apart(start, start, start) == 0 and apart(start, numbers, start) == 1
