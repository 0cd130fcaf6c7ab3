"""The Jensen-Shannon divergence: symmetric, and bounded however confident the teacher is."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Inside, Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import Ratio, excess, kl_rows, large, log_probs
from kdbench.types import LossTerms, Outputs, Target


def jensen_shannon_rows(student: Tensor, teacher: Tensor, tau: float, mix: float) -> Tensor:
    """mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q, p = softmax(t/tau), q = softmax(s/tau): [B] nats.

    Lin 1991, JS divergence. Between 0 and the entropy of (mix, 1 - mix), log 2 at mix = 0.5.
    """
    log_p, log_q = log_probs(teacher, tau), log_probs(student, tau)
    log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))
    rows = mix * kl_rows(log_p, log_m) + (1 - mix) * kl_rows(log_q, log_m)
    if not large(tau):
        return rows
    ratio = Ratio.of(student, teacher, tau)
    to_teacher = ((1 - mix) * ratio.log.expm1()).log1p()  # log m - log p
    to_student = (mix * (-ratio.log).expm1()).log1p()  # log m - log q
    close = mix * ratio.p * excess(to_teacher) + (1 - mix) * ratio.p * ratio.log.exp() * excess(to_student)
    return torch.where(ratio.near.squeeze(-1), close.sum(-1), rows)


class JS(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 JS(softmax(t/tau), softmax(s/tau)) (Lin 1991, JS divergence; as a
    distillation loss Agarwal et al. 2024 "GKD", generalised JSD).

    `mix` in (0, 1) is the teacher's share of the mixture: the gradient goes to that of mix KL(t || s) as mix -> 0, and
    to that of (1 - mix) KL(s || t) as mix -> 1. `tau` > 0.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Lin 1991, JS divergence; Agarwal et al. 2024 (GKD), generalised JSD"

    def __init__(
        self, weights: Weights, tau: Positive = 4.0, mix: Inside = 0.5, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau
        self.mix = mix

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 JS(t/tau, s/tau)")
        mixture = f"m = a p + (1 - a) q, a = {number(self.mix)}"
        return f"{text}, tau = {number(self.tau)}, JS(p, q) = a KL(p || m) + (1 - a) KL(q || m), {mixture}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        rows = jensen_shannon_rows(student.logits, detached(teacher, "js"), self.tau, self.mix)
        return self.combine(task=self.task(student.logits, target.label), distill=self.tau**2 * rows.mean())
