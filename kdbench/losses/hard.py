"""Hard distillation: the teacher's answer as a second label."""

from __future__ import annotations

from typing import ClassVar

from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, task_cross_entropy
from kdbench.types import LossTerms, Outputs, Target


class Hard(DistillationLoss):
    """weights.task CE(y, s) + weights.distill CE(argmax t, s) (Touvron et al. 2021, DeiT, hard label: both 1/2).

    The student has one head; `loss=deit` trains the distillation token beside it. Mixtures (mixup) have soft labels and
    one answer of the teacher.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Touvron et al. 2021 (DeiT), hard label"

    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)

    @property
    def formula(self) -> str:
        return self.written(task=self.task_text, distill="CE(argmax t, s)")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        answer = detached(teacher, "hard").argmax(-1)
        distill = task_cross_entropy(student.logits, answer)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
