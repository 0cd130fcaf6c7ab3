"""Which coefficients give a loss with one minimum, and saying which of them do not.

phi(p) = -log p + sum_m eps_m (1 - p)^m. Two tests: the coefficient test 1/m + eps_m >= 0 (enough for phi >= 0,
decreasing and convex, not necessary), and the exact one on a grid of p: decreasing where 1 + p S >= 0, convex where
1 + p^2 K >= 0 (S = sum m eps_m q^(m-1), K = sum m (m-1) eps_m q^(m-2)). A decreasing convex phi has one proxy
teacher, and its gradient in the logits vanishes nowhere else. Derived here; the paper names no range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdbench.losses.ptloss.functional import horner, orders

GRID = 2001  # points of p in (0, 1]; a polynomial of order <= 20 has no dip between them that matters
SLACK = 1e-7  # eps = -1/m in float32 is on the border, not outside


class Validity(NamedTuple):
    """What the two tests say of a set of coefficients."""

    decreasing: bool  # phi falls with p, for every class
    convex: bool  # phi is convex, for every class
    complaint: str  # "" if both hold, else which coefficient and which test

    @property
    def safe(self) -> bool:
        return self.decreasing and self.convex


def check(epsilon: Tensor) -> Validity:
    """Test coefficients [M] (shared) or [C, M]; finite numbers are assumed."""
    rows = epsilon.detach().to("cpu", torch.float64).reshape(-1, epsilon.shape[-1])
    low = rows * orders(rows) < -1 - SLACK
    suspects = low.any(dim=-1).nonzero().flatten()
    if len(suspects) == 0:
        return Validity(True, True, "")
    bad = rows[suspects]
    p = torch.linspace(1 / GRID, 1, GRID, dtype=torch.float64)
    slope, curvature = _derivatives(p, bad)
    falls, bends = (slope >= -SLACK).all(dim=-1), (curvature >= -SLACK).all(dim=-1)
    if bool(falls.all()) and bool(bends.all()):
        return Validity(True, True, "")
    worst = int((~(falls & bends)).nonzero()[0])
    row = int(suspects[worst])
    who = _name_of(row, rows, low[row])
    tests = []
    if not falls[worst]:
        tests.append(f"it grows with p near p = {p[slope[worst].argmin()]:.3g} (grid test 1 + p S >= 0)")
    if not bends[worst]:
        tests.append(f"it is not convex near p = {p[curvature[worst].argmin()]:.3g} (grid test 1 + p^2 K >= 0)")
    return Validity(
        bool(falls.all()), bool(bends.all()), f"{who}, and the loss fails the exact test: {'; '.join(tests)}"
    )


def _derivatives(p: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """1 + p S and 1 + p^2 K on a grid: each [R, P]. p [P]; rows [R, M]."""
    m = orders(rows)
    q = (1 - p).expand(len(rows), -1)
    slope = 1 + p * horner(q, (rows * m).unsqueeze(1))
    return slope, 1 + p**2 * horner(q, (rows * m * (m - 1))[:, 1:].unsqueeze(1))


def _name_of(row: int, rows: Tensor, low: Tensor) -> str:
    """ "eps_2 of class 3 = -0.7 is below -1/2 (coefficient test)" for all low coefficients of one row."""
    where = f" of class {row}" if len(rows) > 1 else ""
    found = [int(m) + 1 for m in low.nonzero().flatten()]
    return ", ".join(f"eps_{m}{where} = {rows[row, m - 1]:.4g} is below -1/{m} (coefficient test)" for m in found)
