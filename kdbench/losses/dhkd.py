"""Dual-head distillation: the teacher's logits are learned by a second head, away from the one that learns the
labels."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Dropout, within
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.features import student_maps
from kdbench.types import LossTerms, Outputs, Target


def log_cosh(x: Tensor) -> Tensor:
    """log cosh x, with all its digits near 0 and finite for every x."""
    size = x.abs()
    near = size < 1
    close = (2 * (torch.where(near, x, 0.0) / 2).sinh().square()).log1p()
    return torch.where(near, close, size + (-2 * size).exp().log1p() - math.log(2))


class Norm(nn.BatchNorm1d):
    """Batch norm that takes a batch of one as in evaluation: a single sample has no spread."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) > 1:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class DHKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 sum_k KL(1/2 || sigmoid((a_k - t_k)/tau)), the KL of two outcomes,
    a: logits of a second head on the student's "pooled" feature (Yang et al. 2024, DHKD, binary KL norm).

    That is log cosh((a_k - t_k) / (2 tau)) a class. The head is a linear layer of `hidden` units, dropout, batch norm,
    ReLU and a linear layer; with `hidden` 0 one linear layer (the authors: 200 on CIFAR-100, 0 on ImageNet). It trains
    with the student and is not exported. The teacher needs no features: a table of its logits serves. The authors'
    CIFAR-100 runs take conflicting gradients of the two terms apart: `optimizer=aligned_sgd`.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Yang et al. 2024 (DHKD)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 2.0,
        hidden: Annotated[int, within(0, 2**16)] = 200,
        dropout: Dropout = 0.1,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.hidden, self.dropout = tau, hidden, dropout
        self.head: nn.Module = nn.Identity()

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ("pooled",)

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 sum_k log cosh((a_k - t_k) / (2 tau))")
        kind = f"{self.hidden} hidden units" if self.hidden else "one linear layer"
        return f"{text}, tau = {number(self.tau)}, a: a second head on the student's features, {kind}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        (pooled,) = student_maps(student, self.student_needs)
        width, classes = pooled.shape[-1], student.logits.shape[-1]
        if not self.hidden:
            head: nn.Module = nn.Linear(width, classes)
        else:
            first = nn.Linear(width, self.hidden)
            drop = nn.Dropout(self.dropout) if self.dropout else nn.Identity()
            head = nn.Sequential(first, drop, Norm(self.hidden), nn.ReLU(), nn.Linear(self.hidden, classes))
        self.head = head.to(pooled.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "dhkd")
        (pooled,) = student_maps(student, self.student_needs)
        distill = self.tau**2 * log_cosh((self.head(pooled) - t) / (2 * self.tau)).sum(-1).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
