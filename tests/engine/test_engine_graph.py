"""A recorded step is the eager step, whatever changes between steps; what cannot be recorded runs eagerly or fails."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kdbench.engine import device as placement
from kdbench.engine import graph
from kdbench.engine.device import place
from kdbench.engine.graph import Graphed, wants_graph
from kdbench.engine.learner import Learner
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.trainer import run_steps
from kdbench.errors import UserError
from kdbench.teachers.live import LiveTeacher
from kdbench.teachers.none import NoTeacher
from tests.support import losses as losses_parts
from tests.support.engine import SmallNet, Stream, make_learner
from tests.support.tape import Tape

SILENT = NoTeacher()

OPTIONS = TrainerOptions(device="cpu", progress="none")


@pytest.fixture
def on_tape(monkeypatch):
    """Steps are recorded on the CPU, as they would be on a GPU."""
    monkeypatch.setattr(graph, "recording", lambda device: Tape)


def run(learner: Learner, stream, teacher=SILENT) -> None:
    run_steps([SimpleNamespace(learner=learner, failure=None)], stream, teacher, lambda: None)


def train(learner: Learner, epochs: int = 3, size: int = 64) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    teacher = LiveTeacher(SmallNet(), 8, learner.distiller.placement.autocast)
    for epoch in range(epochs):
        learner.begin_epoch(epoch)
        run(learner, Stream(size).epoch(epoch, epochs), teacher)
    return learner.distiller.state_dict()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "clip": 0.5}], ids=["plain", "ema+clip"])
def test_replayed_steps_are_the_eager_steps_to_the_last_bit(on_tape, name, extra):
    """With dropout, a learning rate that falls at every step, and meters read at the end."""
    kwargs = {"name": name, "stream": Stream(64), "lr": 0.01, "trainer": replace(OPTIONS, cuda_graph="on", **extra)}
    eager, taped = make_learner(**kwargs), make_learner(**kwargs)
    eager._update = eager.update
    expected, got = train(eager), train(taped)
    assert len(taped._update._recorded) == 1
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    assert taped.meters.read() == eager.meters.read()
    for a, b in zip(eager.network.parameters(), taped.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_smaller_last_batch_gets_a_recording_of_its_own(on_tape):
    def uneven():
        for batch in Stream(64).epoch(0, 1):
            yield batch
            part = batch._replace(input=batch.input[:3], view=batch.view[:3])
            yield part._replace(target=batch.target._replace(label=batch.target.label[:3], row=batch.target.row[:3]))

    learners = [make_learner(trainer=replace(OPTIONS, cuda_graph=kind), stream=Stream(512)) for kind in ("off", "on")]
    for learner in learners:
        learner.begin_epoch(0)
        run(learner, uneven())
    assert len(learners[1]._update._recorded) == 2
    assert learners[0].meters.read() == learners[1].meters.read()


def test_a_resumed_learner_is_recorded_anew_and_goes_on_the_same(on_tape):
    kwargs = {"trainer": replace(OPTIONS, cuda_graph="on"), "stream": Stream(64)}
    whole, cut = make_learner(**kwargs), make_learner(**kwargs)
    train(whole, 3)
    train(cut, 1)
    resumed = make_learner(**kwargs)
    resumed.restore(cut.state())
    torch.manual_seed(9)
    teacher = LiveTeacher(SmallNet(), 8, resumed.distiller.placement.autocast)
    for epoch in (1, 2):
        resumed.begin_epoch(epoch)
        run(resumed, Stream(64).epoch(epoch, 3), teacher)
    for (key, a), b in zip(whole.distiller.state_dict().items(), resumed.distiller.state_dict().values(), strict=True):
        if "progress" not in key:
            assert torch.equal(a, b), key


def test_a_recorded_teacher_says_what_the_network_says():
    torch.manual_seed(3)
    network = SmallNet().eval()
    recorded = Graphed(network, Tape, strict=True, what="the teacher")
    live = LiveTeacher(network, 8, place(OPTIONS).autocast, lambda network: recorded)
    plain = LiveTeacher(network, 8, place(OPTIONS).autocast)
    images = torch.randn(6, 19, 1, 6, 6)
    answers = [live.outputs(image) for image in images]
    assert len(recorded._recorded) == 1
    for image, answer in zip(images, answers, strict=True):  # earlier answers are not overwritten by later replays
        assert torch.equal(answer.logits, plain.outputs(image).logits)
        assert torch.equal(answer.features["pooled"], plain.outputs(image).features["pooled"])


def test_what_cannot_be_recorded_runs_eagerly_or_is_refused(caplog):
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    seen = []
    soft = Graphed(lambda x: seen.append(x), refuse, strict=False, what="the step")
    for _ in range(graph.WARM_UP + 2):
        soft(torch.ones(2))
    assert len(seen) == graph.WARM_UP + 2
    assert caplog.text.count("not permitted") == 1
    strict = Graphed(lambda x: None, refuse, strict=True, what="the step")
    with pytest.raises(UserError, match=r"trainer\.cuda_graph = on.*not permitted"):
        for _ in range(graph.WARM_UP + 2):
            strict(torch.ones(2))


def test_where_a_step_is_recorded(monkeypatch):
    assert not wants_graph(OPTIONS, torch.device("cuda"), OptimizerOptions("sgd", 0.1))  # not proven on a GPU yet
    monkeypatch.setattr(placement, "PROVEN_ON_CUDA", True)
    sgd, cuda, cpu = OptimizerOptions("sgd", 0.1), torch.device("cuda"), torch.device("cpu")
    assert wants_graph(OPTIONS, cuda, sgd) and not wants_graph(OPTIONS, cpu, sgd)
    assert not wants_graph(OPTIONS, cuda, OptimizerOptions("lamb", 0.1))
    assert not wants_graph(replace(OPTIONS, cuda_graph="off"), cuda, sgd)
    on = replace(OPTIONS, cuda_graph="on")
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*cpu"):
        wants_graph(on, cpu, sgd)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*adamw"):
        wants_graph(on, cuda, OptimizerOptions("lamb", 0.1))
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*auto, on or off"):
        TrainerOptions(cuda_graph="yes")


@pytest.mark.parametrize("name", losses_parts.NAMES)
def test_every_loss_can_be_recorded(name):
    """No loss reads a number from the device or counts its calls in Python: both would be wrong in a replay."""
    eager = losses_parts.ready(name)
    loss = copy.deepcopy(eager)

    def gradient(student, teacher, target, of):
        student = losses_parts.cast(student, torch.float32, grad=True)
        total = of(student, teacher, target).total
        total.backward()
        return total.detach(), student.logits.grad

    recorded = Graphed(lambda *args: gradient(*args, of=loss), Tape, strict=True, what="the loss")
    for step in range(graph.WARM_UP + 3):
        student, teacher, target = losses_parts.batch(step, name)
        given = (student, teacher, target._replace(progress=torch.tensor(step / 5)))
        torch.manual_seed(step)
        expected = gradient(*given, of=eager)
        torch.manual_seed(step)
        for got, wanted in zip(recorded(*given), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert len(recorded._recorded) == 1
