"""Turns, medians and ratios, on contenders whose times are known; operations and bytes of what is known by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from kdbench.bench.cost import Cost, cost_of
from kdbench.bench.machine import Roofline, measure_roofline
from kdbench.bench.remote import Remote
from kdbench.bench.timing import figure, race
from kdbench.engine.device import place
from kdbench.engine.options import TrainerOptions
from kdbench.errors import UserError


def test_a_figure_is_the_median_with_its_quartiles():
    assert figure([5.0, 1.0, 4.0, 2.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert figure([1.0, 2.0]) == (1.5, 1.25, 1.75, 2)
    assert figure([7.0]) == (7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="no median"):
        figure([])


class Clockwork:
    """A contender that takes `seconds` a step, `slower` as long in its n-th turn after the three warm-up turns."""

    def __init__(self, seconds: float, slower: dict[int, float], calls: list, name: str) -> None:
        self.seconds, self.slower, self.calls, self.name = seconds, slower, calls, name
        self.turn = -3

    def __call__(self, steps: int) -> float:
        seconds = steps * self.seconds * self.slower.get(self.turn, 1.0)
        self.turn += 1
        self.calls.append((self.name, steps))
        return seconds


def test_contenders_take_turns_and_a_busy_spell_of_the_machine_does_not_change_the_ratio():
    calls: list = []
    busy = {1: 5.0}  # the second round: everything takes five times as long
    contenders = {name: Clockwork(t, busy, calls, name) for name, t in (("fast", 0.01), ("slow", 0.06))}
    timed = race(contenders, budget=0.0, turn=0.3, least=3)
    assert timed.step("fast") == pytest.approx((0.01, 0.01, 0.03, 3))
    assert timed.ratio("slow", "fast") == pytest.approx((6, 6, 6, 3))
    assert timed.ratio("slow", "fast", times=8) == pytest.approx((48, 48, 48, 3))
    warm_up, turns = calls[:6], calls[6:]
    assert warm_up == [("fast", 2), ("fast", 2), ("slow", 2), ("slow", 2), ("fast", 30), ("slow", 5)]
    # Turns of about 0.3 s each; who begins changes with every round.
    assert turns == [("fast", 30), ("slow", 5), ("slow", 5), ("fast", 30), ("fast", 30), ("slow", 5)]


def test_operations_and_bytes_of_a_linear_layer():
    x = torch.randn(8, 16)
    weight = torch.randn(16, 4, requires_grad=True)
    forward = cost_of(lambda: x @ weight)
    assert forward == Cost(2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4))
    both = cost_of(lambda: (x @ weight).backward(torch.ones(8, 4)))
    assert both.flops == 2 * forward.flops  # x needs no gradient: one product more, for the weight
    assert cost_of(lambda: x.view(16, 8)) == Cost(0, 0)
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_a_roofline_is_the_slower_of_memory_and_arithmetic():
    line = Roofline(bandwidth=100.0, rate=1000.0, dtype="fp32")
    assert line.floor(flops=2000, moved=100) == 2.0
    assert line.floor(flops=2000, moved=500) == 5.0
    measured = measure_roofline(place(TrainerOptions(device="cpu", precision="fp32")), small=True)
    assert measured.bandwidth > 0 and measured.rate > 0 and measured.dtype == "fp32"


def test_a_remote_contender_answers_with_seconds_and_its_end_is_an_error():
    code = "print('hello\\nready', flush=True)\nfor line in open(0): print('chatter\\n', int(line) / 4, flush=True)"
    with Remote([sys.executable, "-c", code]) as remote:
        assert [remote(8), remote(2)] == [2.0, 0.5]
    assert remote.process.returncode == 0
    with pytest.raises(UserError, match=r"exit code 3"):
        Remote([sys.executable, "-c", "raise SystemExit(3)"])
