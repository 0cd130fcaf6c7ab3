"""Normalised knowledge distillation: the labelled class as it is, the other classes renormalised."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import (
    class_index,
    cross_entropy_rows,
    large,
    log_probs,
    mean_over,
    real,
    split_at,
    without,
)
from kdbench.types import LossTerms, Outputs, Target


def normalised_rows(student: Tensor, teacher: Tensor, index: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(target, non-target) cross-entropies a sample, both [B], nats (Yang et al. 2023, the NKD loss).

    Target: -p_y log q_y at temperature 1. Non-target: tau^2 times the cross-entropy between the two networks' softmaxes
    at tau over all classes but y. Cross-entropies: not 0 when the student equals the teacher.
    """
    own = index.unsqueeze(-1)
    p_own = log_probs(teacher).gather(-1, own).exp()
    goal = -(p_own * log_probs(student).gather(-1, own)).squeeze(-1)
    if large(tau):
        others = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, own, False)
        return goal, tau**2 * cross_entropy_rows(student, teacher, tau, others)
    within = without(split_at(real(teacher) / tau, index)[2].exp(), index)
    return goal, -(tau**2) * (within * split_at(real(student) / tau, index)[2]).sum(-1)


class NKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill (-p_y log q_y + gamma tau^2 CE(N(t/tau), N(s/tau))), N: softmax over all
    classes but y (Yang et al. 2023, L_nkd; their lambda is tau).

    Their settings: CIFAR-100 ResNet-34 to 18 tau 3, gamma 3.5; ImageNet tau 1, gamma 1.5. Needs one class a sample;
    averaged over labelled samples.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Yang et al. 2023, L_nkd"

    def __init__(
        self, weights: Weights, tau: Positive = 3.0, gamma: NotNegative = 3.5, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.gamma = tau, gamma

    @property
    def formula(self) -> str:
        both = f"(-p_y log q_y + {number(self.gamma)} tau^2 CE(N(t/tau), N(s/tau)))"
        text = self.written(task=self.task_text, distill=both)
        return f"{text}, tau = {number(self.tau)}, p = softmax(t), q = softmax(s), N = softmax over all classes but y"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        index, labelled = class_index(target.label, "nkd")
        goal, others = normalised_rows(student.logits, detached(teacher, "nkd"), index, self.tau)
        distill = mean_over(goal + self.gamma * others, labelled)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
