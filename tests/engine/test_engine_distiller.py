"""When a student is compiled, and what of it: its network, once for all losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdbench.engine import device as placement
from kdbench.engine import distiller as distillers
from kdbench.engine.distiller import Distiller, wants_compilation
from kdbench.engine.options import TrainerOptions
from kdbench.losses.kl import KL
from kdbench.types import Outputs
from tests.support.engine import SmallNet, Stream, make_learner

OPTIONS = TrainerOptions(device="cpu", progress="none")


def test_when_a_student_is_compiled(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    wants = lambda mode, device, steps: wants_compilation(replace(OPTIONS, compile=mode), device, steps)  # noqa: E731
    monkeypatch.setattr(distillers.importlib.util, "find_spec", lambda name: object())
    assert not wants("auto", cuda, 10**6)  # not proven on a GPU yet
    monkeypatch.setattr(placement, "PROVEN_COMPILE", True)
    assert not wants("off", cuda, 10**6) and not wants("auto", cpu, 10**6) and not wants("auto", cuda, 100)
    assert wants("auto", cuda, 10**6) and wants("on", cpu, 1)
    monkeypatch.setattr(distillers.importlib.util, "find_spec", lambda name: None)
    assert not wants("auto", cuda, 10**6)  # torch.compile needs triton there


@pytest.fixture
def counted(monkeypatch):
    """torch.compile without a compiler: the graphs that it would compile."""
    torch._dynamo.reset()
    graphs = []
    real = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: real(model, dynamic=dynamic, backend=backend))
    yield graphs
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_students_of_one_network_under_many_losses_share_a_compilation(counted):
    """torch gives up after eight compilations of one function: with the loss inside, at the ninth temperature."""
    batch = next(iter(Stream().epoch(0, 1)))
    teacher = Outputs(torch.randn(8, 3), {})
    for tau in range(1, 11):
        one = make_learner().distiller
        distiller = Distiller(SmallNet(dropout=0.0), KL({"task": 0.5, "distill": 0.5}, tau=float(tau)), one.placement)
        distiller.compile_student(strict=True)
        plain = distiller.loss(distiller.student(batch.input), teacher, batch.target)
        output = distiller(batch.input, teacher, batch.target)
        torch.testing.assert_close(output.terms.total, plain.total)
    assert len(counted) == 1


def test_a_smaller_last_batch_is_not_compiled(counted):
    learner = make_learner(trainer=replace(OPTIONS, compile="on"))
    batch = next(iter(Stream().epoch(0, 1)))
    whole = learner.distiller(batch.input, None, batch.target)
    small = learner.distiller(batch.input[:3], None, batch.target._replace(label=batch.target.label[:3]))
    assert len(counted) == 1 and len(whole.logits) == 8 and len(small.logits) == 3
    assert not any("_orig_mod" in key for key in learner.distiller.state_dict())
