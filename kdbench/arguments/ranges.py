"""Ranges of values, written where the value is declared: `tau: Annotated[float, above(0)]`. `fit` checks them.

Numbers are finite unless a range says otherwise, and no larger than LARGEST: the square of a larger one is infinite in
float32. Whole numbers fit into 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

LARGEST = 1e15
BITS = 2**63


class Range(NamedTuple):
    """What a value of the right type must be, in words that follow "must be", and whether one is."""

    words: str
    holds: Callable[[Any], bool]


def above(low: float) -> Range:
    """A number above `low`."""
    return Range(f"above {low:g}", lambda value: low < value <= _most(value))


def at_least(low: float) -> Range:
    """A number that is `low` or more."""
    return Range(f"at least {low:g}", lambda value: low <= value <= _most(value))


def between(low: float, high: float) -> Range:
    """A number strictly between two others."""
    return Range(f"in ({low:g}, {high:g})", lambda value: low < value < high)


def within(low: float, high: float) -> Range:
    """A number between two others, both of them included; an infinite end includes infinity."""
    words = f"at least {low:g}, at most {high:,}" if 10_000 < high < 1e12 else f"in [{low:g}, {high:g}]"
    return Range(words, lambda value: low <= value <= high)


def from_to(low: float, high: float) -> Range:
    """A number from `low` on, below `high`."""
    return Range(f"in [{low:g}, {high:g})", lambda value: low <= value < high)


def above_to(low: float, high: float) -> Range:
    """A number above `low`, up to `high`."""
    return Range(f"in ({low:g}, {high:g}]", lambda value: low < value <= high)


def finite() -> Range:
    """Any number but infinity."""
    return Range("finite", lambda value: -_most(value) <= value <= _most(value))


def listed(least: int, words: str = "", most: int | None = None, different: bool = False) -> Range:
    """A list of at least (at most) so many entries, `different` from each other."""
    text = words or f"a list of {least} or more"

    def holds(value: Sequence[Any]) -> bool:
        fits = least <= len(value) and (most is None or len(value) <= most)
        return fits and not (different and len(set(value)) < len(value))

    return Range(text, holds)


def some_text(words: str = "text that is not empty") -> Range:
    """Text with more in it than spaces."""
    return Range(words, lambda value: bool(str(value).strip()))


def _most(value: float) -> float:
    return BITS - 1 if isinstance(value, int) else LARGEST


Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Finite = Annotated[float, finite()]
Share = Annotated[float, within(0, 1)]
Inside = Annotated[float, between(0, 1)]
Momentum = Annotated[float, from_to(0, 1)]
Count = Annotated[int, within(1, 10**9)]
Width = Annotated[int, within(1, 2**16)]  # channels or dimensions of a layer
Seed = Annotated[int, Range("within 64 bits", lambda value: -BITS <= value < BITS)]
Depth = Annotated[int, within(1, 10_000)]  # layers of a network
Scale = Annotated[float, above_to(0, 64)]  # how many times as wide
Dropout = Annotated[float, from_to(0, 1)]
Amount = Annotated[float, Range("a share up to 1 or a number of things above", lambda value: 0 <= value <= 2**53)]
Text = Annotated[str, some_text()]
