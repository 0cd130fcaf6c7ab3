"""Focal loss: cross-entropy that cares less for what the network already gets right."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import NotNegative
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, number
from kdbench.losses.functional import distribution, log_probs, mean_over
from kdbench.types import LossTerms, Outputs, Target


def focal_rows(student: Tensor, label: Tensor, gamma: float) -> Tensor:
    """sum_k y_k (1 - p_k)^gamma (-log p_k) a sample [B], p = softmax(s); label [B, C] distribution (Lin et al. 2017,
    focal loss)."""
    log_p = log_probs(student)
    miss = (-log_p.expm1()).clamp_min(1e-12)  # x^gamma with gamma < 1 has an infinite slope at 0
    return -(label * miss**gamma * log_p).sum(-1)


class Focal(DistillationLoss):
    """weights.task (1 - p_y)^gamma CE(y, s), p = softmax(s), on labels alone (Lin et al. 2017, focal loss, for
    softmax).

    `gamma` >= 0; 0 is cross-entropy. The paper's class balance and sigmoid belong to detection and are left out.
    """

    uses_teacher: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task",)
    paper: ClassVar[str] = "Lin et al. 2017, focal loss"

    def __init__(self, weights: Weights, gamma: NotNegative = 2.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.gamma = gamma

    @property
    def formula(self) -> str:
        return self.written(task=f"(1 - p_y)^{number(self.gamma)} {self.task_text}") + ", p = softmax(s)"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        label, labelled = distribution(target.label, student.logits, self.label_smoothing)
        return self.combine(task=mean_over(focal_rows(student.logits, label, self.gamma), labelled))
