"""Balanced KL: both directions of the divergence, each class divided by a power of how probable the networks find
it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Share
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.functional import log_probs
from kdbench.types import LossTerms, Outputs, Target


def balanced_rows(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """sum_k (alpha p_k - (1 - alpha) q_k) (log p_k - log q_k) / (p_k^2 + q_k^2)^((1 - beta)/2) a sample [B] (Zhang et
    al. 2025, BKL). log_p, log_q [B, C] log-probabilities.

    The power is taken of a sum of exponentials: its gradient is finite where both probabilities are 0.
    """
    power = ((1 - beta) / 2 * torch.logaddexp(2 * log_p, 2 * log_q)).exp() + 1e-12  # the authors' 1e-12
    return ((alpha * log_p.exp() - (1 - alpha) * log_q.exp()) * (log_p - log_q) / power).sum(-1)


class BKL(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 BKL(softmax(t/tau), softmax(s/tau)) (Zhang et al. 2025).

    `alpha`: share of KL(t || s) against KL(s || t). `beta`: how much a class counts less for being improbable; 1 is the
    plain sum of both divergences, 0 counts all classes by the logarithm of their ratio.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zhang et al. 2025 (BKL)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 2.0,
        alpha: Share = 0.5,
        beta: Share = 0.2,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau
        self.alpha, self.beta = alpha, beta

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 sum_k (a p_k - (1 - a) q_k) log(p_k / q_k) / r_k")
        power = f"r_k = (p_k^2 + q_k^2)^{number((1 - self.beta) / 2)}"
        return f"{text}, a = {number(self.alpha)}, {power}, p = t/tau, q = s/tau, tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        log_t, log_s = log_probs(detached(teacher, "bkl"), self.tau), log_probs(student.logits, self.tau)
        distill = self.tau**2 * balanced_rows(log_t, log_s, self.alpha, self.beta).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
