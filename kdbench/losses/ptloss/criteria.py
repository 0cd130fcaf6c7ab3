"""How well a proxy teacher predicts labels: the number that the epsilon search makes small.

The paper's theorem bounds the risk by E||p - p*||_2 (+ entropy), and its search puts labels in p*'s place. Against
one-hot labels the unsquared norm and the entropy are not proper scores: on a perfectly calibrated teacher they are
smallest at the sharpest epsilon on offer. The squared norm (Brier) and the log-loss are proper, so they are the
defaults here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Literal["brier", "nll", "l2", "l2_entropy"]
ScoreAt = Literal["student", "proxy"]
IMPROPER = ("l2", "l2_entropy")


def _index(log_p: Tensor, label: Tensor) -> Tensor:
    return label.unsqueeze(-1).expand(*log_p.shape[:-1], 1)


def brier(log_p: Tensor, label: Tensor) -> Tensor:
    """||p - y||^2 of every row: [..., n, C], [n] -> [..., n], in [0, 2]."""
    index = _index(log_p, label)
    miss = torch.expm1(log_p.gather(-1, index))  # p_y - 1, exact for a sure proxy in float32 too
    return log_p.exp().square().scatter(-1, index, miss.square()).sum(dim=-1)


def nll(log_p: Tensor, label: Tensor) -> Tensor:
    """-log p_y of every row, in nats."""
    return -log_p.gather(-1, _index(log_p, label)).squeeze(-1)


def l2(log_p: Tensor, label: Tensor) -> Tensor:
    """||p - y|| of every row, the theorem's norm; not proper."""
    return brier(log_p, label).clamp_min(1e-12).sqrt()


def l2_entropy(log_p: Tensor, label: Tensor) -> Tensor:
    """||p - y|| + H(p) of every row, the theorem's whole bias term; not proper."""
    return l2(log_p, label) - (log_p.exp() * log_p).sum(dim=-1)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brier": brier,
    "nll": nll,
    "l2": l2,
    "l2_entropy": l2_entropy,
}


def prediction(log_p: Tensor, tau: float, score_at: ScoreAt) -> Tensor:
    """What is held against the labels: log probabilities [..., C] from log p of the proxy at temperature tau.

    `student`: what a student that fits the loss predicts at temperature 1, softmax(tau log p); for epsilon = 0 it
    is the teacher's own prediction. `proxy`: p itself, which for tau > 1 is smooth on purpose, so that the search
    would undo tau.
    """
    return log_p if score_at == "proxy" or tau == 1 else F.log_softmax(tau * log_p, dim=-1)
