"""Losses of embeddings against their formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdbench.losses.embedding import Cosine, FeatureMSE, Relational
from kdbench.types import Outputs, Target

DRAW = torch.Generator().manual_seed(5)
S, T = (torch.randn(4, 6, generator=DRAW, dtype=torch.float64) for _ in range(2))
TARGET = Target(torch.full((4,), -1), torch.arange(4), torch.zeros(()))


def value(loss, s=S, t=T):
    return loss(Outputs(s, {}), Outputs(t, {}), TARGET).total


def test_mse_and_cosine():
    assert value(FeatureMSE({"distill": 2.0})) == pytest.approx(2 * float((S - T).square().mean()))
    cosine = value(Cosine({}))
    assert cosine == pytest.approx(float((1 - F.cosine_similarity(S, T)).mean()))
    assert value(FeatureMSE({}, normalise=True)) == pytest.approx(float(2 * cosine / 6))
    assert value(Cosine({}), 3 * T) == pytest.approx(0.0, abs=1e-12)


def test_relational_is_the_cross_entropy_of_similarities_to_a_queue():
    loss = Relational({}, tau=0.2, tau_teacher=0.05, queue=5)
    loss.setup(Outputs(S, {}), Outputs(T, {}))
    before = loss.directions.clone().double()
    first = value(loss)
    s, t = F.normalize(S, dim=1), F.normalize(T, dim=1)
    rows = []
    for i in range(4):
        anchors = torch.cat([t[i : i + 1], before])
        target, answer = (t[i] @ anchors.T / 0.05).softmax(0), (s[i] @ anchors.T / 0.2).log_softmax(0)
        rows.append(-(target * answer).sum())
    assert float(first) == pytest.approx(float(torch.stack(rows).mean()))
    assert torch.allclose(loss.directions[:4].double(), t, atol=1e-6) and torch.equal(
        loss.directions[4], before[4].float()
    )
    value(loss)  # the places go round
    assert torch.allclose(loss.directions[4].double(), t[0], atol=1e-6)
    assert torch.allclose(loss.directions[:3].double(), t[1:], atol=1e-6) and int(loss.place) == 8


def test_the_queue_goes_on_from_a_checkpoint():
    loss, again = (Relational({}, queue=6) for _ in range(2))
    for one in (loss, again):
        one.setup(Outputs(S, {}), Outputs(T, {}))
    value(loss)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(value(loss, T, S), value(again, T, S))


def test_without_a_queue_the_batch_is_what_is_compared_with():
    s, t = F.normalize(S, dim=1), F.normalize(T, dim=1)
    expected = -((t @ t.T / 0.01).softmax(1) * (s @ t.T / 0.2).log_softmax(1)).sum(1).mean()
    loss = Relational({}, queue=0)
    loss.setup(Outputs(S, {}), Outputs(T, {}))
    assert float(value(loss)) == pytest.approx(float(expected))
