"""The alpha-beta divergence: how much weight go to large errors and to classes that the student is sure of."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import NotNegative
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.functional import log_probs
from kdbench.types import LossTerms, Outputs, Target


def divergence_rows(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    """D_AB(p || q) a sample [B] from log-probabilities [B, C], alpha and beta >= 0 (Wang et al. 2025, definition of
    the alpha-beta divergence): KL(p || q) at (1, 0), KL(q || p) at (0, 1), half the squared log-ratio at (0, 0)."""
    gap = log_q - log_p
    if alpha == 0 and beta == 0:
        return gap.square().sum(-1) / 2
    if alpha == 0:
        q, p = (beta * log_q).exp(), (beta * log_p).exp()
        return (q * beta * gap - q + p).sum(-1) / beta
    if beta == 0:
        q, p = (alpha * log_q).exp(), (alpha * log_p).exp()
        return (-p * alpha * gap - p + q).sum(-1) / alpha
    both = alpha + beta
    mixed = (alpha * log_p + beta * log_q).exp()
    return (alpha / both * (both * log_p).exp() + beta / both * (both * log_q).exp() - mixed).sum(-1) / (alpha * beta)


class ABKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill D_AB(softmax(t/tau) || softmax(s/tau)) (Wang et al. 2025, ABKD).

    `alpha` and `beta` lie between the forward KL (1, 0) and the reverse one (0, 1); where one of them is 0 it is the
    other one times the limit, and there is no factor tau^2, both as in the authors' code.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Wang et al. 2025 (ABKD)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 4.0,
        alpha: NotNegative = 0.8,
        beta: NotNegative = 0.3,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau
        self.alpha, self.beta = alpha, beta

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="D_AB(t/tau || s/tau)")
        return f"{text}, alpha = {number(self.alpha)}, beta = {number(self.beta)}, tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        log_t, log_s = log_probs(detached(teacher, "abkd"), self.tau), log_probs(student.logits, self.tau)
        distill = divergence_rows(log_t, log_s, self.alpha, self.beta).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
