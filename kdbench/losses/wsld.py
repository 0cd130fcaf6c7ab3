"""Weighted soft labels: less distillation where the student already fits the label better than the teacher does."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import cross_entropy_rows, distribution, large, log_probs, mean_over
from kdbench.types import LossTerms, Outputs, Target


def soft_label_weights(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """1 - exp(-CE(y, s) / CE(y, t)) a sample [B], in [0, 1), without gradient. label [B, C] distribution."""
    ratio = (label * log_probs(student.detach())).sum(-1) / ((label * log_probs(teacher)).sum(-1) - 1e-7)
    return -(-ratio).expm1()


class WSLD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 mean_b w_b CE(t/tau, s/tau), w = 1 - exp(-CE(y, s) / CE(y, t)) at
    tau 1 (Zhou et al. 2021, weighted soft labels).

    A cross-entropy: not 0 when the student equals the teacher. The authors: tau 2, weight 2.5 on ImageNet; tau 4,
    weight 2.25 on CIFAR-100. Averaged over labelled samples: without a label there is no weight.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zhou et al. 2021 (WSLD), weighted soft labels"

    def __init__(self, weights: Weights, tau: Positive = 4.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 mean_b w_b CE(t/tau, s/tau)")
        return f"{text}, tau = {number(self.tau)}, w = 1 - exp(-CE(y, s) / CE(y, t))"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "wsld")
        label, labelled = distribution(target.label, t)
        if large(self.tau):
            soft = cross_entropy_rows(student.logits, t, self.tau)
        else:
            soft = -(log_probs(t, self.tau).exp() * log_probs(student.logits, self.tau)).sum(-1)
        distill = self.tau**2 * mean_over(soft_label_weights(student.logits, t, label) * soft, labelled)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
