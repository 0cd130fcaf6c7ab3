"""Timing several things against each other on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

Contender = Callable[[int], float]  # does so many steps and returns the seconds that they took


class Figure(NamedTuple):
    """The median of n measurements, with their quartiles."""

    median: float
    low: float
    high: float
    n: int


def figure(values: Sequence[float]) -> Figure:
    """Raises ValueError for no values."""
    ordered = sorted(values)
    return Figure(median(ordered), _quantile(ordered, 0.25), _quantile(ordered, 0.75), len(ordered))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class Race(NamedTuple):
    """Seconds a step of every contender, one value a round; the contenders took turns."""

    seconds: dict[str, list[float]]

    def step(self, name: str) -> Figure:
        """Seconds a step."""
        return figure(self.seconds[name])

    def ratio(self, slow: str, fast: str, times: float = 1.0) -> Figure:
        """How many times as long a step of `slow` took, round by round, so that a busy spell of the machine hits both.

        `times` steps of `slow` are compared with one of `fast`.
        """
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return figure([times * a / b for a, b in pairs])


def race(contenders: Mapping[str, Contender], budget: float, turn: float = 1.0, least: int = 3) -> Race:
    """Let contenders take turns of about `turn` seconds for about `budget` seconds, `least` rounds at least.

    Every contender has one turn outside of the measurement first (a table is filled in it); the order turns with every
    round.
    """
    steps = {name: _steps_a_turn(contender, turn) for name, contender in contenders.items()}
    for name, contender in contenders.items():
        contender(steps[name])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names, begin, number = list(contenders), time.perf_counter(), 0
    while number < least or time.perf_counter() - begin < budget:
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(contenders[name](steps[name]) / steps[name])
        number += 1
    return Race(seconds)


def _steps_a_turn(contender: Contender, turn: float) -> int:
    contender(2)  # first steps make buffers, choose kernels, fill caches
    return max(2, min(200, round(turn / (contender(2) / 2))))


def best_of(work: Callable[[], object], wait: Callable[[], object], repeats: int) -> float:
    """The least seconds of some runs of `work`: what the machine can do undisturbed. `wait` waits for the device."""
    work()
    wait()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begin)
    return min(times)
