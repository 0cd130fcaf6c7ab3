"""The moving average of a student's weights, against the formula step by step."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from kdbench.engine.ema import Average
from kdbench.teachers.past_self import PastSelf
from tests.support.tape import Tape


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def moved(net: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor += 1


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_weights_and_statistics_are_averaged_and_counters_copied(decay):
    net, generator = network(), torch.Generator().manual_seed(1)
    average = Average(net, decay)
    expected = {name: value.clone().double() for name, value in net.state_dict().items()}
    for t in range(30):
        moved(net, generator)
        average.update()
        d = min(decay, (1 + t) / (10 + t))
        for name, value in net.state_dict().items():
            expected[name] = d * expected[name] + (1 - d) * value if value.is_floating_point() else value.double()
    for name, value in average.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_start_is_forgotten_in_a_short_training():
    """Decay 0.999 over 100 updates of constant weights: without a warm-up the start would weigh 0.9."""
    net = network()
    average = Average(net, 0.999)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    for _ in range(100):
        average.update()
    assert all(((p - 1).abs() < 1e-4).all() for p in average.network.parameters())


def test_an_average_goes_on_where_it_was():
    net, generator = network(), torch.Generator().manual_seed(1)
    whole = Average(net, 0.9)
    for _ in range(7):
        moved(net, generator)
        whole.update()
    again = Average(net, 0.9)
    again.restore(whole.network.state_dict(), 7)
    moved(net, generator)
    whole.update()
    again.update()
    for a, b in zip(whole.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_all_tensors_are_moved_at_once_whatever_their_number():
    """On a GPU each by itself would be a kernel: 63 a step for resnet20."""
    counts = []
    for layers in (1, 20):
        net = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(layers)))
        past = PastSelf(10, contextlib.nullcontext, decay=0.9)
        past.attach(net)
        past._follow()
        average = Average(net, 0.9)
        counts.append([len(Tape(work).calls) for work in (average.update, past._follow)])
    assert counts[0] == counts[1]
