"""Plot: what is drawn, as data: series on two axes, or a grid of cells. Places are shares of the axis, 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

# Okabe and Ito's colours, which people with any kind of colour vision tell apart, without the yellow, which paper
# swallows. The last one is that of the text: black on light, white on dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "ink")
DASHES = ("", "6 3", "2 2", "8 3 2 3", "10 4", "4 2 1 2", "1 3")  # told apart on gray paper, too
MOST_SERIES = len(COLOURS)
_ROOM = 0.03  # between a logarithmic axis' frame and what lies outermost
_END = 0.12  # of an axis, where 0 or infinity lie beyond the logarithms


class Series(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # of y: a band around a line, bars at points; NaN: none there
    high: Sequence[float] | None = None
    # marked: a line with its points, and bars; across: points with bars of x
    kind: Literal["line", "points", "marked", "across"] = "line"
    colour: int = 0  # of COLOURS; -1: gray


class Axis(NamedTuple):
    title: str
    low: float
    high: float
    log: bool = False
    ends: tuple[bool, bool] = (False, False)  # whether 0 and infinity have their places beyond the logarithms
    ticks: Sequence[tuple[float, str]] = ()

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1 from the axis' lower end."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0 or math.isinf(value):
            return _ROOM if value <= 0 else 1 - _ROOM
        first, last = (_END if end else _ROOM for end in self.ends)
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return first + (1 - first - last) * share


class Cells(NamedTuple):
    """A grid of shares in [0, 1], the darker the larger: by their square roots, so that small ones are seen."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]


class Plot(NamedTuple):
    name: str  # of its file
    title: str
    note: str  # a sentence on what is seen
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    cells: Cells | None = None


def linear(title: str, values: Sequence[float], scale: float = 0.05) -> Axis:
    """An axis that holds the values, with room of `scale` of its length at both ends, and round ticks."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = scale * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return Axis(title, low, high, ticks=round_ticks(low, high))


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """An axis of the values' logarithms with a tick at each of them; 0 and infinity lie at its ends."""
    inside = sorted({value for value in values if 0 < value < math.inf}) or [1.0]
    low, high = (inside[0], inside[-1]) if len(inside) > 1 else (inside[0] / 2, inside[0] * 2)
    ends = (any(value <= 0 for value in values), any(value == math.inf for value in values))
    ticks = [(value, f"{value:g}") for value in inside]
    ticks = [*([(0.0, "0")] if ends[0] else []), *ticks, *([(math.inf, "inf")] if ends[1] else [])]
    axis = Axis(title, low, high, log=True, ends=ends)
    return axis._replace(ticks=_apart(axis, ticks))


def decades(title: str, values: Sequence[float]) -> Axis:
    """An axis of logarithms with round ticks, for values that are all above 0."""
    low, high = min(values) / 1.3, max(values) * 1.3
    steps = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [(step * 10.0**power, short(step * 10.0**power)) for power in powers for step in steps]
    axis = Axis(title, low, high, log=True)
    inside = [tick for tick in ticks if low <= tick[0] <= high]
    if len(inside) < 2:  # within an octave: the round ones of a linear axis
        inside = round_ticks(low, high)
    return axis._replace(ticks=_apart(axis, inside))


def round_ticks(low: float, high: float, about: int = 5) -> list[tuple[float, str]]:
    """Ticks at multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, digits = math.ceil(low / step), max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:.{digits}f}") for n in range(first, math.floor(high / step) + 1)]


def short(value: float) -> str:
    """1500000 as 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _apart(axis: Axis, ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those whose texts have room; the ends' always have."""
    kept: list[tuple[float, str]] = []
    for tick in ticks:
        if not kept or axis.place(tick[0]) - axis.place(kept[-1][0]) >= 0.075:
            kept.append(tick)
    if ticks and kept[-1] != ticks[-1]:
        kept[-1] = ticks[-1]
    return kept
