"""The perturbed loss as pure functions, and the closed form of its gradient.

Notation: t teacher, p student, q = 1 - p, M the order, eps_{c,m} the coefficients. Since -log p = sum_{m>=1} q^m /
m, adding eps_m to the m-th coefficient of the cross-entropy's series gives

    PT(t, p) = KL(t || p) + sum_c t_c sum_{m=1..M} eps_{c,m} (1 - p_c)^m

Source: Zhang et al., "Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher", KDD
2024, the perturbed loss, rebuilt from second-hand descriptions; that the logarithm is kept whole and only the
perturbation is cut at M follows PolyLoss (Leng et al. 2022, Poly-N). The gradient below is our derivation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdbench.losses.functional import Ratio, large, log_probs

Series = Literal["exact", "truncated"]


def orders(epsilon: Tensor) -> Tensor:
    """1, 2, ..., M in the type and on the device of epsilon [..., M]."""
    return torch.arange(1, epsilon.shape[-1] + 1, dtype=epsilon.dtype, device=epsilon.device)


def horner(q: Tensor, coefficients: Tensor) -> Tensor:
    """sum_{j>=0} coefficients[..., j] q^j. The leading part of coefficients ([J], [C, J], [K, 1, C, J]) broadcasts
    to q."""
    total = torch.zeros_like(q)
    for j in range(coefficients.shape[-1] - 1, -1, -1):
        total = torch.addcmul(coefficients[..., j], q, total)
    return total


def perturbation(q: Tensor, epsilon: Tensor) -> Tensor:
    """sum_m eps_m q^m, the amount added to -log p. q [..., C]; epsilon [M] or [C, M]."""
    return q * horner(q, epsilon)


def perturbed_kl(
    student_logits: Tensor, teacher_logits: Tensor, epsilon: Tensor, tau: float = 1.0, series: Series = "exact"
) -> Tensor:
    """PT(softmax(z_t / tau), softmax(z_s / tau)) of every row, in nats: [B]. It may be negative where epsilon is.

    student_logits, teacher_logits [B, C]; epsilon [M] (shared) or [C, M]. The teacher is a constant. Computed in
    float32 at least. `truncated` replaces -log p by the first M terms of its series: even with epsilon = 0 its
    minimiser is not the teacher (t = (.7, .2, .1), M = 5: (.883, .117, 0)), so it is here for comparison only.
    """
    log_p = log_probs(student_logits, tau)
    log_t = log_probs(teacher_logits.detach(), tau).to(log_p)
    epsilon = epsilon.to(log_p.dtype)
    t = log_t.exp()
    q = -torch.expm1(log_p)  # 1 - p without the rounding that puts it below zero
    exact = series == "exact"
    phi = perturbation(q, epsilon if exact else epsilon + 1 / orders(epsilon)) - (log_p if exact else 0.0)
    # A class the teacher rules out counts nothing, even if its logits are -inf (0 * inf would be NaN).
    rows = (t * (log_t + phi)).masked_fill(t == 0, 0.0).sum(dim=-1)
    if not (exact and large(tau)):
        return rows
    added = (t * perturbation(q, epsilon)).masked_fill(t == 0, 0.0).sum(dim=-1)
    return Ratio.of(student_logits, teacher_logits.detach(), tau).kl(rows - added) + added


def pull(p: Tensor, t: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Where PTLoss pulls a student, and how hard: (G [B], target [B, C]) with dPT/dz = G (p - target) at tau = 1.

    p, t [B, C] probabilities; epsilon [M] or [C, M]. G >= 0 wherever the loss falls with p. With a temperature the
    gradient of tau^2 PT is tau G (p - target), all taken at tau. At the proxy teacher, target = p.
    """
    weight = t * (1 + p * horner(1 - p, epsilon * orders(epsilon)))
    gain = weight.sum(dim=-1)
    return gain, weight / gain.unsqueeze(-1)
