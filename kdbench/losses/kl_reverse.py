"""KL with the student first: it pays for probability where the teacher has none, and may drop the teacher's modes."""

from __future__ import annotations

from typing import ClassVar

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


class ReverseKL(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(softmax(s/tau) || softmax(t/tau)), summed over classes, mean
    over the batch (mode-seeking; Gu et al. 2024 "MiniLLM", there over sequences). `tau` > 0."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Gu et al. 2024 (MiniLLM), reverse KL"

    def __init__(self, weights: Weights, tau: Positive = 4.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau

    @property
    def formula(self) -> str:
        return self.written(task=self.task_text, distill="tau^2 KL(s/tau || t/tau)") + f", tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        distill = tempered_kl_rows(detached(teacher, "kl_reverse"), student.logits, self.tau).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
