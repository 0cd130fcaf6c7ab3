"""When a student is compiled, and what of it: its network, once for all losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdbench.engine import device as placement
from kdbench.engine import distiller as distillers
from kdbench.engine.distiller import Distiller, may_trim, trimmed, wants_compilation
from kdbench.engine.options import TrainerOptions
from kdbench.errors import UserError
from kdbench.losses.ce import CE
from kdbench.losses.hidden import Hidden
from kdbench.losses.kl import KL
from kdbench.models.bilstm import BiLSTM
from kdbench.models.text_cnn import TextCNN
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


def test_padding_behind_a_batch_s_longest_text_is_left_out_up_to_a_multiple_of_8():
    ids = torch.zeros(3, 44, dtype=torch.int64)
    ids[0, :3], ids[1, :17] = 5, 6
    assert trimmed(ids).shape == (3, 24) and torch.equal(trimmed(ids), ids[:, :24])
    ids[2, 43] = 1
    assert torch.equal(trimmed(ids), ids) and trimmed(torch.zeros_like(ids)).shape == (3, 8)


@pytest.mark.parametrize("make", [TextCNN, BiLSTM])
def test_a_network_of_texts_answers_and_learns_the_same_without_padding(make):
    torch.manual_seed(0)
    network = make(16, num_classes=3, vocab_size=50, length=40, dropout=0.0)
    ids = torch.zeros(4, 40, dtype=torch.int64)
    ids[:, :9] = torch.randint(1, 50, (4, 9))
    found = []
    for given in (ids, trimmed(ids)):
        network.zero_grad()
        logits = network(given).logits
        logits.square().sum().backward()
        found.append([logits, *(one.grad.clone() for one in network.parameters())])
    assert network.any_length and trimmed(ids).shape == (4, 16)
    torch.testing.assert_close(*found)


def test_a_student_is_trimmed_on_a_cpu_where_its_loss_needs_no_features():
    network, weights = TextCNN(16, num_classes=3, vocab_size=50, length=40), {"task": 0.5, "distill": 0.5}
    cpu, options = torch.device("cpu"), TrainerOptions()
    assert may_trim(network, KL(weights), options, cpu)
    assert not may_trim(network, KL(weights), options, torch.device("cuda"))
    assert not may_trim(network, KL(weights), replace(options, compile="on"), cpu)
    assert not may_trim(SmallNet(dropout=0.0), KL(weights), options, cpu)
    assert not may_trim(network, Hidden(weights, ["pooled"]), options, cpu), "its teacher reads the whole width"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda terms: terms.total, "It returned a Tensor"),
        (lambda terms: None, "It returned a NoneType"),
        (lambda terms: terms._replace(total=terms.total.repeat(4)), r"It returned terms of shape \[4\]: a mean over"),
    ],
)
def test_what_a_loss_of_the_users_own_returns_otherwise_is_refused(returned, said):
    class Own(CE):
        def forward(self, student, teacher, target):
            return returned(super().forward(student, teacher, target))

    batch, placement = next(iter(Stream().epoch(0, 1))), make_learner().distiller.placement
    with pytest.raises(UserError, match=rf"^loss._target_ = .*Own: must be a loss whose forward returns .*{said}"):
        Distiller(SmallNet(), Own({"task": 1.0}), placement)(batch.input, None, batch.target)
