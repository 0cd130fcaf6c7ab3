"""Newton's method for the minimiser of PT(t, .), many rows at once, in u = log p.

Where phi is decreasing and convex (`plain`): the conditions read log t + log g - u = nu with g = 1 + p S, and sum
exp(u) = 1. Newton's step, with h = (1 + p^2 K) / g > 0, F = log t + log g - u and nu the mean of F under the
weights p / h, is du = (F - nu) / h. It is a direction of descent: dPT = -e^nu sum (p / h) e^F (F - nu) <= 0, as
both factors grow with F (Chebyshev's sum inequality). 3 to 7 steps reach 1e-12, for flat and for peaked teachers.

Elsewhere (`careful`): Newton in p with the curvature made positive, at most 99 % of the way to the simplex's edge;
tens of steps, to a local minimum. Both are followed by a line search on PT, row by row, and stay inside the
simplex. Our own method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses.ptloss.functional import horner, orders, perturbation

Step = tuple[Tensor, Tensor, Tensor]


class Coefficients(NamedTuple):
    """epsilon and what a step needs of it, each [..., J] with a leading part that broadcasts to the rows and
    classes."""

    epsilon: Tensor
    first: Tensor  # 1 + m eps_m
    second: Tensor  # (m - 1)(1 + m eps_m), m >= 2

    @staticmethod
    def of(epsilon: Tensor) -> Coefficients:
        m = orders(epsilon)
        first = 1 + m * epsilon
        return Coefficients(epsilon, first, ((m - 1) * first)[..., 1:])


class Method(NamedTuple):
    """A direction, how far along it a row may go at first, and how to go."""

    direction: Callable[[Tensor, Tensor, Coefficients], Step]
    reach: Callable[[Tensor], Tensor]  # step [N, C] -> [N]
    move: Callable[[Tensor, Tensor], Tensor]  # log p, step -> log p
    polish: bool  # whether a converged row's last step is taken too


def objective(t: Tensor, log_p: Tensor, epsilon: Tensor, log_t: Tensor | float = 0.0) -> Tensor:
    """PT(t, p) of every row, without the teacher's entropy unless log_t is given. [..., C] -> [...]."""
    return (t * (perturbation(-torch.expm1(log_p), epsilon) - log_p + log_t)).sum(dim=-1)


def growth(p: Tensor, q: Tensor, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """g = 1 + p S and k = 1 + p^2 K, as sums of positive terms under the coefficient test, so that nothing cancels.

    From 1/p = sum_{m<=M} q^(m-1) + q^M / p: g = p sum (1 + m eps_m) q^(m-1) + q^M, and its derivative gives k.
    """
    order = coefficients.first.shape[-1]
    top = torch.ones_like(q)
    for _ in range(order - 1):  # several times faster than pow with a general exponent
        top = top * q
    g = torch.addcmul(top * q, p, horner(q, coefficients.first))
    return g, torch.addcmul(top * (q + p * order), p * p, horner(q, coefficients.second))


def plain_step(log_t: Tensor, log_p: Tensor, coefficients: Coefficients) -> Step:
    """The step in log p, the residual max |p - t g / G| before it, and PT's slope along it: [..., C], [...],
    [...]."""
    p, q = log_p.exp(), -torch.expm1(log_p)
    g, k = growth(p, q, coefficients)
    tiny = torch.finfo(p.dtype).tiny
    g = g.clamp_min(tiny)
    weight = log_t.exp() * g
    residual = (p - weight / weight.sum(dim=-1, keepdim=True)).abs().amax(dim=-1)
    inverse = g / k.clamp_min(tiny)  # 1 / h
    force = log_t - log_p + g.log()
    share = p * inverse
    centre = (share * force).sum(dim=-1, keepdim=True) / share.sum(dim=-1, keepdim=True)
    step = (force - centre) * inverse
    return step, residual, -(weight * step).sum(dim=-1)


def careful_step(log_t: Tensor, log_p: Tensor, coefficients: Coefficients) -> Step:
    """The relative step in p for any finite epsilon, the largest gradient in the logits before it, and PT's
    slope."""
    p, q, t = log_p.exp(), -torch.expm1(log_p), log_t.exp()
    g, k = growth(p, q, coefficients)
    weight = t * g
    residual = (weight.sum(dim=-1, keepdim=True) * p - weight).abs().amax(dim=-1)
    stiff = t * k.abs().clamp_min(0.05)
    centre = (p * weight / stiff).sum(dim=-1, keepdim=True) / (p * p / stiff).sum(dim=-1, keepdim=True)
    step = (weight - centre * p) / stiff
    return step, residual, -(weight * step).sum(dim=-1)


PLAIN = Method(
    plain_step,
    reach=lambda step: 20 / step.abs().amax(dim=-1).clamp_min(20),  # no factor beyond e^20 at once
    move=lambda log_p, step: F.log_softmax(log_p + step, dim=-1),
    polish=True,
)
CAREFUL = Method(
    careful_step,
    reach=lambda step: 0.99 / (-step).amax(dim=-1).clamp_min(0.99),
    move=lambda log_p, step: F.log_softmax(log_p + step.log1p(), dim=-1),
    polish=False,
)


def solve(
    log_t: Tensor, log_p: Tensor, coefficients: Coefficients, method: Method, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """From log_p [N, C] to the minimiser: log p, residual [N], steps taken. A row leaves when its residual is
    small."""
    out, worst = log_p.clone(), torch.zeros_like(log_p[:, 0])
    index = torch.arange(len(log_p), device=log_p.device)
    iteration = 0
    while True:
        step, residual, slope = method.direction(log_t, log_p, coefficients)
        done = (residual < tolerance).unsqueeze(-1)
        out[index] = torch.where(done, method.move(log_p, step), log_p) if method.polish else log_p
        worst[index] = residual
        left = (~done).nonzero()[:, 0]
        if len(left) == 0 or iteration == max_iterations:
            return out, worst, iteration
        if len(left) < len(index):
            index, log_t, log_p, step, slope = index[left], log_t[left], log_p[left], step[left], slope[left]
        log_p = _line_search(log_t, log_p, step, slope, coefficients.epsilon, method)
        iteration += 1


def _line_search(log_t: Tensor, log_p: Tensor, step: Tensor, slope: Tensor, epsilon: Tensor, method: Method) -> Tensor:
    """Halve each row's step until PT falls enough (Armijo). Rounding is allowed for: near the end PT cannot
    tell."""
    t = log_t.exp()
    before = objective(t, log_p, epsilon)
    before = before + 1e-14 * (1 + before.abs())
    size = method.reach(step)
    new = method.move(log_p, size.unsqueeze(-1) * step)
    high = (objective(t, new, epsilon) > before + 1e-4 * size * slope).nonzero().flatten()
    for _ in range(40):
        if len(high) == 0:
            break
        size[high] /= 2
        new[high] = method.move(log_p[high], size[high].unsqueeze(-1) * step[high])
        value = objective(t[high], new[high], epsilon)
        high = high[value > before[high] + 1e-4 * size[high] * slope[high]]
    return new
