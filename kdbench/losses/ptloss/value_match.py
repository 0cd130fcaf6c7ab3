"""Definition B of the proxy teacher: argmin_p |PT(t, p)|, the paper's eqs. 9-10 read literally.

Where the minimum PT(A) is above 0, B = A. Where it is below, every point of a surface has PT = 0, and B is no more
than a choice among them: here, the point that the ray from A through the teacher meets first (PT = 0 is met before
the simplex ends, as PT grows without bound there). With t = (.6, .3, .1) and eps_1 = -.5, A = (.556, .323, .121) is
smoother than the teacher and B is sharper. Kept for comparison; A is what students learn.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kdbench.losses.ptloss.newton import objective

HALVINGS = 100


def match_value(log_t: Tensor, log_a: Tensor, epsilon: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """log B [N, C] and its residual [N]: A's where PT(A) >= 0, |PT(B)| elsewhere. Warns if there are such rows."""
    t = log_t.exp()
    below = (objective(t, log_a, epsilon, log_t) < -1e-12).nonzero().flatten()
    if len(below) == 0:
        return log_a, residual
    warnings.warn(
        f"value_match: PT is negative at the minimiser of {len(below)} of {len(t)} rows, so |PT| = 0 on a whole "
        "surface; the point on the ray from the minimiser through the teacher is returned (definition=minimiser has "
        "no such choice)",
        stacklevel=3,
    )
    log_b, residual = log_a.clone(), residual.clone()
    log_b[below], residual[below] = _on_ray(t[below], log_t[below], log_a[below], epsilon)
    return log_b, residual


def _on_ray(t: Tensor, log_t: Tensor, log_a: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Bisection along a + s (t - a), s from 0 (PT < 0) to where a class reaches 0. A ray of length 0 stays at A."""
    a = log_a.exp()
    ray = t - a
    limit = torch.where(ray < 0, a / -ray, torch.inf).amin(dim=-1, keepdim=True)
    moves = torch.isfinite(limit)
    low, high = torch.zeros_like(limit), torch.where(moves, limit, 0.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        point = (a + middle * ray).clamp_min(1e-300).log()
        under = objective(t, point, epsilon, log_t).unsqueeze(-1) < 0
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    log_b = (a + low * ray).clamp_min(1e-300).log()
    return log_b, objective(t, log_b, epsilon, log_t).abs()
