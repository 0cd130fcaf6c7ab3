"""Normalised distillation: each sample's temperature follows from the spread of its own logits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import kl_rows, log_probs, real
from kdbench.types import LossTerms, Outputs, Target


def spread(logits: Tensor) -> Tensor:
    """Standard deviation over classes [B, 1], with the C - 1 denominator; 1, without gradient, where all are equal."""
    variance = (logits - logits.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    flat = variance <= 1e-12
    return torch.where(flat, 1.0, torch.where(flat, 1.0, variance).sqrt())


def normalised_rows(student: Tensor, teacher: Tensor, norm: float) -> Tensor:
    """tau_t^2 KL(softmax(t/tau_t) || softmax(s/tau_s)) [B], tau = norm std z of each network's own sample (Chi et al.
    2023)."""
    student, teacher = real(student), real(teacher)
    tau = norm * spread(teacher)
    return tau.squeeze(-1) ** 2 * kl_rows(log_probs(teacher, tau), log_probs(student, norm * spread(student)))


class NormKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau_t^2 KL(softmax(t/tau_t) || softmax(s/tau_s)), tau = norm std z (Chi
    et al. 2023). Unlike `LogitStd`, the weight of a sample grows with the spread of the teacher's logits."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Chi et al. 2023 (NormKD)"

    def __init__(self, weights: Weights, norm: Positive = 2.0, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.norm = norm

    @property
    def least_classes(self) -> int:
        return 3  # two logits over their spread are always +-0.707 apart from their mean

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau_t^2 KL(t/tau_t || s/tau_s)")
        return f"{text}, tau_z = {number(self.norm)} std z of each sample"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        distill = normalised_rows(student.logits, detached(teacher, "normkd"), self.norm).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
