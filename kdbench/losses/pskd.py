"""Self-distillation whose targets move from the labels to the network's own past predictions."""

from __future__ import annotations

from typing import ClassVar

from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import kl_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


class PSKD(DistillationLoss):
    """(1 - a) CE(y, s) + a KL(t || s) at temperature 1, a = weights.distill x progress of training (Kim et al. 2021,
    "Self-Knowledge Distillation with Progressive Refinement of Targets", eq. 5 and 6).

    The paper's target (1 - a) y + a t gives the same gradient; its a grows by epochs, here by steps. It takes
    weights.distill 0.8. Use it with procedure=self_distillation, where t is the student's own past.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Kim et al. 2021 (PS-KD), eq. 5 and 6"

    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)

    @property
    def formula(self) -> str:
        text = self.written(task=f"(1 - a) {self.task_text}", distill="progress KL(t || s)")
        return f"{text}, a = {number(self.weights.get('distill', 1.0))} progress"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        past = kl_rows(log_probs(detached(teacher, "pskd")), log_probs(student.logits)).mean()
        share = self.weights.get("distill", 1.0) * target.progress
        task = (1 - share) * self.task(student.logits, target.label)
        return self.combine(task=task, distill=target.progress * past)
