"""Review and correction: beside the teacher, the student's own logits with the labelled class lifted above all
others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import class_index, mean_over, real, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


def lifted(logits: Tensor, index: Tensor) -> Tensor:
    """logits [B, C] with the row's maximum added to class index [B], without gradient."""
    logits = logits.detach()
    own = index.unsqueeze(-1)
    return logits.scatter(-1, own, logits.gather(-1, own) + logits.amax(-1, keepdim=True))


class RC(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(t/tau || s/tau) + weights.revise tau^2 KL(s'/tau || s/tau), s':
    the student's own logits with their maximum added to that of the labelled class (Cao et al. 2023, review and
    correction, in the form that Sun et al. 2025 compare with). Needs one class a sample; an unlabelled one has no part
    in the last term."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "revise")
    needs_one_class = True
    paper: ClassVar[str] = "Cao et al. 2023 (review and correction), as in Sun et al. 2025"

    def __init__(self, weights: Weights, tau: Positive = 4.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau

    @property
    def formula(self) -> str:
        both = {"distill": "tau^2 KL(t/tau || s/tau)", "revise": "tau^2 KL(s'/tau || s/tau)"}
        text = self.written(task=self.task_text, **both)
        return f"{text}, tau = {number(self.tau)}, s' = s with s_y + max s at the labelled class"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t, s = detached(teacher, "rc"), real(student.logits)
        index, labelled = class_index(target.label, "rc")
        own = tempered_kl_rows(s, lifted(s, index), self.tau)
        return self.combine(
            task=self.task(s, torch.where(labelled, index, -1)),
            distill=tempered_kl_rows(s, t, self.tau).mean(),
            revise=mean_over(own, labelled),
        )
