"""Several teachers, each weighted by how well it knows the label of the sample."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, number
from kdbench.losses.features import teacher_maps
from kdbench.losses.functional import class_index, log_probs, real, tempered_kl_rows
from kdbench.types import MEMBERS, LossTerms, Outputs, Target


def member_rows(student: Tensor, members: Tensor, tau: float) -> Tensor:
    """tau^2 KL(t_k/tau || s/tau) [B, K] of each teacher's logits [B, K, C] and the student's [B, C]."""
    return tempered_kl_rows(student.unsqueeze(1).expand_as(members), members, tau)


def confidences(members: Tensor, index: Tensor, labelled: Tensor) -> Tensor:
    """(1 - softmax_k CE(y, t_k)) / (K - 1) [B, K], summing to 1 over the teachers (Zhang et al. 2022, confidence
    weights); equal where there is no label."""
    wrong = -log_probs(members).gather(-1, index[:, None, None].expand(-1, members.shape[1], 1)).squeeze(-1)
    wrong = torch.where(labelled.unsqueeze(-1), wrong, 0.0)
    return (1 - wrong.softmax(-1)) / max(members.shape[1] - 1, 1)


class CAMKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill mean_k w_k tau^2 KL(t_k/tau || s/tau), a weight for each teacher and
    sample: w_k = (1 - softmax_k CE(y, t_k)) / (K - 1) (Zhang et al. 2022, CA-MKD, the logits' part).

    A mean over the K teachers, as in the authors' code, of weights that sum to 1. Needs teacher=ensemble and one class
    a sample; for an unlabelled sample all teachers count alike. The part on features is not here: the members' maps
    differ.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    needs = (MEMBERS,)
    paper: ClassVar[str] = "Zhang et al. 2022 (CA-MKD), confidence weights"

    def __init__(self, weights: Weights, tau: Positive = 4.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean_k w_k tau^2 KL(t_k/tau || s/tau)")
        return f"{text}, w_k = (1 - softmax_k CE(y, t_k)) / (K - 1), over K teachers, tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        (members,) = teacher_maps(teacher, self.needs, "camkd")
        weight = confidences(members, *class_index(target.label, "camkd"))
        distill = (weight * member_rows(real(student.logits), members, self.tau)).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
