"""Binary cross-entropy: every class a question of its own, as recipes since "ResNet strikes back" train."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Inside
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, number
from kdbench.losses.functional import distribution, mean_over, real
from kdbench.types import LossTerms, Outputs, Target


def bce_rows(student: Tensor, label: Tensor) -> Tensor:
    """sum_k -(y_k log sigmoid(s_k) + (1 - y_k) log(1 - sigmoid(s_k))) a sample [B], in nats; label [B, C] in [0, 1]."""
    return F.binary_cross_entropy_with_logits(real(student), label, reduction="none").sum(-1)


class BCE(DistillationLoss):
    """weights.task BCE(y, s) / C on labels alone: the mean over classes (Wightman et al. 2021; Beyer et al. 2020).

    Labels are smoothed first, (1 - e) y + e / C; with a `threshold` each class whose share of a (mixed) label is above
    it counts as wholly there (timm's --bce-target-thresh: 0.2 in procedure A1). `sum_classes` leaves out the division
    by C (timm's --bce-sum). With a teacher's term: a part of loss=sum (docs/recipes.md).
    """

    uses_teacher: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task",)
    paper: ClassVar[str] = "Wightman et al. 2021, binary cross-entropy"

    def __init__(
        self,
        weights: Weights,
        label_smoothing: Smoothing = 0.0,
        threshold: Inside | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.threshold, self.sum_classes = threshold, sum_classes

    @property
    def formula(self) -> str:
        above = f", y > {number(self.threshold)}" if self.threshold is not None else ""
        smoothed = f" smoothed by {number(self.label_smoothing)}" if self.label_smoothing else ""
        return self.written(task=f"BCE(y{smoothed}{above}, s){'' if self.sum_classes else ' / C'}")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        label, labelled = distribution(target.label, student.logits, self.label_smoothing)
        if self.threshold is not None:
            label = (label > self.threshold).to(label.dtype)
        rows = bce_rows(student.logits, label)
        return self.combine(task=mean_over(rows if self.sum_classes else rows / label.shape[-1], labelled))
