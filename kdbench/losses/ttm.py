"""Transformed teacher matching: a temperature on the teacher only."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import kl_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


def power_sum(teacher: Tensor, tau: float) -> Tensor:
    """sum_k p_k^(1/tau), p = softmax(t): [B], 1 for a certain teacher, C^(1 - 1/tau) for one that knows nothing."""
    return (log_probs(teacher) / tau).logsumexp(-1).exp()


class TTM(DistillationLoss):
    """weights.task CE(y, s) + weights.distill mean_b u_b KL(softmax(t/tau) || softmax(s)), the student at temperature 1
    (Zheng and Yang 2024; their exponent gamma is 1/tau).

    u = 1 (TTM), or with `weighted` u = sum_k p_k^(1/tau), more for samples of which the teacher is unsure (WTTM,
    `loss=wttm`). There is no tau^2: the student has no temperature.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zheng and Yang 2024 (TTM, WTTM)"

    def __init__(
        self, weights: Weights, tau: Positive = 10.0, weighted: bool = False, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.weighted = tau, weighted

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill=f"{'u ' if self.weighted else ''}KL(t/tau || s)")
        note = ", u = sum_k p_k^(1/tau), p = softmax(t)" if self.weighted else ""
        return f"{text}, tau = {number(self.tau)}{note}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "ttm")
        rows = kl_rows(log_probs(t, self.tau), log_probs(student.logits))
        rows = power_sum(t, self.tau) * rows if self.weighted else rows
        return self.combine(task=self.task(student.logits, target.label), distill=rows.mean())
