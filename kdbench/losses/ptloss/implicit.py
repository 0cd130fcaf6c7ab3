"""The proxy teacher as a differentiable function of epsilon and of the teacher.

From the conditions t_c g_c(p_c) = G p_c, sum p = 1 (implicit function theorem; derived here): with h = (1 + p^2 K)
/ g and an incoming gradient v, let w_c = p_c (v_c - vbar) / (G h_c), vbar = sum(p v / h) / sum(p / h). Then

    dL/d eps_{c,m} = sum_rows w_c t_c m (1 - p_c)^(m-1)        dL/dt_c = w_c g_c / p_c
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdbench.losses.ptloss.functional import orders
from kdbench.losses.ptloss.newton import Coefficients, growth
from kdbench.losses.ptloss.proxy import log_teacher, proxy_teacher


def differentiable_proxy(
    teacher_probs: Tensor, epsilon: Tensor, start: Tensor | None = None, tolerance: float = 1e-10
) -> Tensor:
    """Proxy teacher (minimiser) [N, C] in float64 with gradients to epsilon ([M] or [C, M]) and to teacher_probs.

    The derivative is that of a strict minimum: epsilon must be in the safe region. `start` [N, C] speeds up the
    solver (the solution for a nearby epsilon). First derivatives only. Raises UserError as `proxy_teacher`.
    """
    t = teacher_probs.to(torch.float64)
    return _ImplicitProxy.apply(t / t.sum(dim=-1, keepdim=True), epsilon.to(torch.float64), start, tolerance)


class _ImplicitProxy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, epsilon: Tensor, start: Tensor | None, tolerance: float) -> Tensor:
        p = proxy_teacher(t, epsilon, start=start, tolerance=tolerance).probability
        ctx.save_for_backward(log_teacher(t).exp(), epsilon, p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (v,) = gradients
        t, epsilon, p = ctx.saved_tensors
        q = -torch.expm1(p.log())
        g, k = growth(p, q, Coefficients.of(epsilon))
        gain = (t * g).sum(dim=-1, keepdim=True)
        share = p * g / k
        mean = (share * v).sum(dim=-1, keepdim=True) / share.sum(dim=-1, keepdim=True)
        w = share * (v - mean) / gain
        return w * g / p, _to_epsilon(w * t, q, epsilon), None, None


def _to_epsilon(weight: Tensor, q: Tensor, epsilon: Tensor) -> Tensor:
    """sum over rows (and classes, if epsilon is shared) of weight m q^(m-1): the shape of epsilon."""
    columns = []
    for _ in range(epsilon.shape[-1]):
        columns.append(weight.sum(dim=0))
        weight = weight * q
    per_class = torch.stack(columns, dim=-1) * orders(epsilon)
    return per_class.sum_to_size(epsilon.shape)
