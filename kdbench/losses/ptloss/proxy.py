"""The proxy teacher: the prediction that PTLoss really teaches.

p_A = argmin_p PT(t, p), where every student ends that fits the loss. It is also the fixed point of the gradient's
target, p_A = pull(p_A, t). The paper's definition, read literally, asks for argmin_p |PT(t, p)|: the same where PT(p_A)
is 0 or more, and elsewhere any point of a surface on which PT = 0. Exact equality of the risks of all students, which
it states, holds for neither. The paper solves "numerically" and says no more; the solver is ours.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdbench.errors import UserError
from kdbench.losses.ptloss.newton import CAREFUL, PLAIN, Coefficients, Method, objective, solve
from kdbench.losses.ptloss.validity import check

LOG_FLOOR = -69.0  # log 1e-30: a class the teacher gives nothing keeps this much
BLOCK = 1 << 18  # numbers per block, 2 MB: the dozen arrays of a step stay in cache


class Proxy(NamedTuple):
    """The solution, and how good it is."""

    probability: Tensor  # [N, C] float64
    residual: Tensor  # [N] max_c |p - target(p)|; outside the safe region of the gradient
    value: Tensor  # [N] PT(t, proxy) in nats
    iterations: int  # the most that any row took


def proxy_teacher(
    teacher_probs: Tensor,
    epsilon: Tensor,
    tolerance: float = 1e-10,
    max_iterations: int = 300,
    start: Tensor | None = None,
    on_failure: Literal["raise", "warn"] = "raise",
) -> Proxy:
    """Proxy teacher of every row, in float64 on the device of teacher_probs.

    teacher_probs [N, C] rows that sum to 1; epsilon [M] (shared) or [C, M]; start [N, C]: where to begin (default:
    the teacher). Raises UserError on wrong shapes or values, and if a residual stays above `tolerance` (`warn`:
    says so instead). Warns if epsilon is outside the region with one minimum: the result is then a local one.
    """
    t, epsilon = _checked(teacher_probs, epsilon)
    validity = check(epsilon)
    if not validity.safe:
        warnings.warn(
            f"the proxy teacher may not be unique, a local one is returned: {validity.complaint}", stacklevel=2
        )
    log_t = log_teacher(t)
    # Outside the safe region a vertex may be a saddle, and Newton would rest there: start a little inside.
    first = (
        start.to(t) if start is not None else log_t.exp() if validity.safe else 0.99 * log_t.exp() + 0.01 / t.shape[1]
    )
    log_p = first.clamp_min(1e-300).log().log_softmax(dim=-1)
    method = PLAIN if validity.safe else CAREFUL
    log_p, residual, iterations = _in_blocks(log_t, log_p, Coefficients.of(epsilon), method, tolerance, max_iterations)
    _report(residual, tolerance, on_failure)
    return Proxy(log_p.exp(), residual, objective(log_t.exp(), log_p, epsilon, log_t), iterations)


def log_teacher(t: Tensor) -> Tensor:
    """log of the rows of t, none below 1e-30, renormalised."""
    return t.clamp_min(torch.finfo(t.dtype).tiny).log().clamp_min(LOG_FLOOR).log_softmax(dim=-1)


def _checked(teacher_probs: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    t = teacher_probs.detach().to(torch.float64)
    epsilon = torch.as_tensor(epsilon).detach().to(t)
    if t.dim() != 2 or not bool(torch.isfinite(t).all()) or bool((t < 0).any()):
        raise UserError("teacher_probs", list(t.shape), "finite probabilities [N, C]")
    if bool(((t.sum(dim=-1) - 1).abs() > 1e-3).any()):
        allowed = "probabilities (rows that sum to 1); apply softmax to logits first"
        raise UserError("teacher_probs", t.sum(dim=-1).tolist()[:3], allowed)
    if epsilon.dim() not in (1, 2) or epsilon.shape[-1] < 1 or not bool(torch.isfinite(epsilon).all()):
        raise UserError("epsilon", list(epsilon.shape), "finite numbers [M] or [C, M] with M >= 1")
    if epsilon.dim() == 2 and epsilon.shape[0] not in (1, t.shape[1]):
        raise UserError("epsilon", f"{epsilon.shape[0]} rows", f"one row for each of {t.shape[1]} classes")
    return t, epsilon


def _in_blocks(
    log_t: Tensor, log_p: Tensor, coefficients: Coefficients, method: Method, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    rows = max(1, BLOCK // log_t.shape[-1])
    blocks = zip(log_t.split(rows), log_p.split(rows))
    parts = [solve(a, b, coefficients, method, tolerance, max_iterations) for a, b in blocks]
    return torch.cat([x[0] for x in parts]), torch.cat([x[1] for x in parts]), max(x[2] for x in parts)


def _report(residual: Tensor, tolerance: float, on_failure: str) -> None:
    failed = int((~(residual < tolerance)).sum())  # not >=: a NaN has failed too
    if not failed:
        return
    message = (
        f"the proxy teacher of {failed} of {len(residual)} rows did not converge: "
        f"residual up to {float(residual.max()):.2g}, tolerance {tolerance:g}"
    )
    if on_failure == "raise":
        raise UserError(message)
    warnings.warn(message, stacklevel=3)
