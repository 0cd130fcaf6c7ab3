"""Swapped logits: the teacher's highest logit is given to the labelled class before the student sees it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import class_index, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


def swapped(logits: Tensor, index: Tensor, labelled: Tensor) -> Tensor:
    """logits [B, C] whose highest one and that of class index [B] have changed places, where `labelled` [B] bool."""
    highest, own = logits.max(-1, keepdim=True), index.unsqueeze(-1)
    exchanged = logits.scatter(-1, highest.indices, logits.gather(-1, own)).scatter(-1, own, highest.values)
    return torch.where(labelled.unsqueeze(-1), exchanged, logits)


class Swap(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(softmax(t'/tau) || softmax(s/tau)), t': the teacher's logits,
    the highest of which has changed places with that of the labelled class (Wen et al. 2019, logit swapping, in the
    form that Sun et al. 2025 compare with: without a label term). Unlabelled samples keep theirs. Needs one class a
    sample."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Wen et al. 2019, as in Sun et al. 2025"

    def __init__(self, weights: Weights, tau: Positive = 4.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 KL(t'/tau || s/tau)")
        return f"{text}, tau = {number(self.tau)}, t' = t with max t and t_y exchanged"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = swapped(detached(teacher, "swap"), *class_index(target.label, "swap"))
        distill = tempered_kl_rows(student.logits, t, self.tau).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
