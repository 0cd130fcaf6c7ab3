"""Training on labels alone: the baseline that every distillation result is measured against."""

from __future__ import annotations

from typing import ClassVar

from kdbench.losses.base import DistillationLoss, Smoothing, Weights
from kdbench.types import LossTerms, Outputs, Target


class CE(DistillationLoss):
    """weights.task CE(y, s): cross-entropy with the labels, without a teacher.

    `label_smoothing` e replaces the label by (1 - e) y + e / C (Szegedy et al. 2016, section 7). Any teacher is
    ignored.
    """

    uses_teacher: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task",)
    paper: ClassVar[str] = "cross-entropy; label smoothing: Szegedy et al. 2016, section 7"

    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)

    @property
    def formula(self) -> str:
        return self.written(task=self.task_text)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        return self.combine(task=self.task(student.logits, target.label))
