"""The settings of the epsilon search, and the coefficient sets that it draws.

The paper draws sets at random and names neither range nor count; ranges, families and defaults here are ours. Every
draw keeps 1/m + eps_m >= 0, so each candidate's proxy teacher is unique. epsilon = 0, the teacher itself, is always
the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdbench.errors import UserError
from kdbench.losses.ptloss.criteria import CRITERIA
from kdbench.losses.ptloss.functional import orders as counted

FAMILIES = ("r/m", "uniform")


class Candidate(NamedTuple):
    """One set of coefficients and where it comes from."""

    origin: str
    epsilon: Tensor  # [M] or [C, M] float64, M the loss's order (zeros beyond its own)


@dataclass(frozen=True)
class SearchOptions:
    """`loss.search.*`; see configs/loss/ptloss.yaml for what each means. Raises UserError for what cannot be."""

    count: int = 200
    seed: int = 0
    families: Sequence[str] = FAMILIES
    orders: Sequence[int] | None = None
    r: Sequence[float] = (-0.95, 8.0)
    uniform: Sequence[float] = (-1.0, 2.0)
    per_class: bool = False
    criterion: str = "brier"
    score_at: str = "student"
    holdout: float = 0.5
    samples: int = 10000
    penalties: Sequence[float] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)

    def __post_init__(self) -> None:
        need(isinstance(self.count, int) and self.count >= 2, "count", "a whole number >= 2", self.count)
        need(isinstance(self.seed, int) and self.seed >= 0, "seed", "a whole number >= 0", self.seed)
        known = len(self.families) > 0 and set(self.families) <= set(FAMILIES)
        need(known, "families", f"a list from {', '.join(FAMILIES)}", self.families)
        need(_range(self.r) and self.r[0] > -1, "r", "two numbers [low, high] with -1 < low < high", self.r)
        need(
            _range(self.uniform) and self.uniform[0] >= -1,
            "uniform",
            "two numbers [low, high], -1 <= low < high",
            self.uniform,
        )
        need(isinstance(self.per_class, bool), "per_class", "true or false", self.per_class)
        need(self.criterion in CRITERIA, "criterion", f"one of {', '.join(CRITERIA)}", self.criterion)
        need(self.score_at in ("student", "proxy"), "score_at", "student or proxy", self.score_at)
        need(_number(self.holdout) and 0 < self.holdout < 1, "holdout", "between 0 and 1", self.holdout)
        need(isinstance(self.samples, int) and self.samples >= 20, "samples", "a whole number >= 20", self.samples)
        positive = len(self.penalties) > 0 and all(_number(x) and x > 0 for x in self.penalties)
        need(positive, "penalties", "a list of numbers > 0", self.penalties)

    @staticmethod
    def of(search: Mapping[str, Any] | None, order: int) -> SearchOptions:
        """From the YAML's mapping; `orders` null becomes 1, 3 and `order`. Raises UserError for unknown keys."""
        given = dict(search or {})
        names = [field.name for field in fields(SearchOptions)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise UserError(f"loss.search.{unknown[0]} is not a setting; there are {', '.join(names)}")
        if given.get("orders") is None:
            given["orders"] = sorted({m for m in (1, 3, order) if m <= order})
        options = SearchOptions(**given)
        chosen = options.orders or ()
        good = len(chosen) > 0 and all(isinstance(m, int) and 1 <= m <= order for m in chosen)
        need(good, "orders", f"null or whole numbers from 1 to loss.order = {order}", options.orders)
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


def need(good: bool, name: str, allowed: str, value: Any) -> None:
    """Raises UserError unless good."""
    if not good:
        raise UserError(f"loss.search.{name} must be {allowed}, got {value}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _range(value: Any) -> bool:
    return len(value) == 2 and all(_number(x) for x in value) and value[0] < value[1]
