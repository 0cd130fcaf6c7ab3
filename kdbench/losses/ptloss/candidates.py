"""The settings of the epsilon search, and the coefficient sets that it draws.

The paper draws sets at random and names neither range nor count; ranges, families and defaults here are ours. Every
draw keeps 1/m + eps_m >= 0, so each candidate's proxy teacher is unique. epsilon = 0, the teacher itself, is always
the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from kdbench.arguments import call, checked
from kdbench.arguments.ranges import Count, Finite, Inside, Positive, Range, at_least, listed, within
from kdbench.errors import require
from kdbench.losses.ptloss.functional import orders as counted

Family = Literal["r/m", "uniform"]
FAMILIES: tuple[Family, ...] = ("r/m", "uniform")


class Candidate(NamedTuple):
    """One set of coefficients and where it comes from."""

    origin: str
    epsilon: Tensor  # [M] or [C, M] float64, M the loss's order (zeros beyond its own)


class Ranked(NamedTuple):
    """A candidate's line of the table."""

    rank: int  # 1: the best
    origin: str
    choose: float  # the criterion where it was chosen
    held_out: float  # and on the images that had no say
    coefficients: dict[str, float]

    def row(self) -> dict[str, object]:
        *known, coefficients = self
        return dict(zip(self._fields, known)) | coefficients


def ranked(rank: int, candidate: Candidate, choose: Tensor, held_out: Tensor) -> Ranked:
    """A line of the table; of a set per class, the coefficients' means over the classes and their widest range."""
    epsilon = candidate.epsilon
    per_class = epsilon.dim() == 2
    means = epsilon.mean(dim=0) if per_class else epsilon
    values = {f"eps_{m}": round(float(value), 6) for m, value in enumerate(means, 1)}
    if per_class:
        values["range"] = round(float((epsilon.amax(dim=0) - epsilon.amin(dim=0)).max()), 6)
    return Ranked(rank, candidate.origin, float(choose), float(held_out), values)


def _ends(low: float, included: bool) -> Range:
    """Two numbers, the first of them the smaller, and no smaller than `low`."""

    def holds(value: Sequence[float]) -> bool:
        return len(value) == 2 and value[0] < value[1] and (value[0] > low or (included and value[0] == low))

    return Range(f"two numbers [low, high] with {low:g} {'<=' if included else '<'} low < high", holds)


@checked
@dataclass(frozen=True)
class SearchOptions:
    """`loss.search.*`; see configs/loss/ptloss.yaml for what each means. Raises UserError for what cannot be."""

    count: Annotated[int, within(2, 10**6)] = 200
    seed: Annotated[int, at_least(0)] = 0
    families: Annotated[Sequence[Family], listed(1)] = FAMILIES
    orders: Annotated[Sequence[Count], listed(1)] | None = None
    r: Annotated[Sequence[Finite], _ends(-1.0, False)] = (-0.95, 8.0)
    uniform: Annotated[Sequence[Finite], _ends(-1.0, True)] = (-1.0, 2.0)
    per_class: bool = False
    criterion: Literal["brier", "nll", "l2", "l2_entropy"] = "brier"
    score_at: Literal["student", "proxy"] = "student"
    holdout: Inside = 0.5
    samples: Annotated[int, within(20, 10**9)] = 10000
    penalties: Annotated[Sequence[Positive], listed(1)] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)

    @staticmethod
    def of(search: Mapping[str, object] | None, order: int) -> SearchOptions:
        """From the YAML's mapping; `orders` null becomes 1, 3 and `order`. Raises UserError for unknown keys."""
        given = dict(search or {})
        if given.get("orders") is None:
            given["orders"] = sorted({m for m in (1, 3, order) if m <= order})
        options = call(SearchOptions, given, "search")
        good = all(m <= order for m in options.orders or ())
        require(good, "search.orders", options.orders, f"null or whole numbers from 1 to order = {order}")
        return options


def draw(options: SearchOptions, order: int, classes: int) -> list[Candidate]:
    """`count` candidates; the same options give the same list. Families take turns, and within them the orders."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (classes, order) if options.per_class else (order,)
    found = [Candidate("teacher (epsilon = 0)", torch.zeros(shape, dtype=torch.float64))]
    orders, families = list(options.orders or [order]), list(options.families)
    rounds = -(-(options.count - 1) // (len(families) * len(orders)))
    for turn in range(rounds):
        for m in orders:
            for family in families:
                make = _ratio if family == "r/m" else _uniform
                epsilon, note = make(options, m, classes, turn, rounds, generator)
                padded = torch.zeros(shape, dtype=torch.float64)
                padded[..., :m] = epsilon
                found.append(Candidate(f"{family} M={m}{note}", padded))
    return found[: options.count]


def _ratio(
    options: SearchOptions, m: int, classes: int, turn: int, rounds: int, generator: torch.Generator
) -> tuple[Tensor, str]:
    """eps_m = r/m with log(1 + r) uniform, one draw in each of `rounds` equal strata."""
    low, high = (torch.tensor(x, dtype=torch.float64).log1p() for x in options.r)
    shared = low + (high - low) * (turn + _uniform01((), generator)) / rounds
    own, spread = shared, 0.0
    if options.per_class:
        own = low + (high - low) * _uniform01((classes, 1), generator)
        spread = _spread(generator)
    ratio = torch.lerp(shared.expand_as(own), own, spread).expm1()
    note = f" spread={spread:.2f}" if options.per_class else f" r={float(ratio):.3g}"
    return ratio / counted(torch.zeros(m, dtype=torch.float64)), note


def _uniform(
    options: SearchOptions, m: int, classes: int, turn: int, rounds: int, generator: torch.Generator
) -> tuple[Tensor, str]:
    """eps_m uniform in [low / m, high], each coefficient by itself."""
    low = options.uniform[0] / counted(torch.zeros(m, dtype=torch.float64))
    high = torch.full_like(low, options.uniform[1])
    shared = low + (high - low) * _uniform01((m,), generator)
    if not options.per_class:
        return shared, ""
    own = low + (high - low) * _uniform01((classes, m), generator)
    spread = _spread(generator)
    return torch.lerp(shared.expand_as(own), own, spread), f" spread={spread:.2f}"


def _spread(generator: torch.Generator) -> float:
    """How far classes differ: 0 (all share one set) for one candidate in four, else uniform up to 1 (all
    independent)."""
    return max(0.0, float(_uniform01((), generator)) * 4 / 3 - 1 / 3)


def _uniform01(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
