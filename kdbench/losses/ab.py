"""Activation boundaries: first the student learns which of the teacher's neurons are on, then the labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, Positive
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import DistillationLoss, First, Smoothing, Weights, detached, number
from kdbench.losses.features import FeatureLoss, Layers, Pair, before_relu
from kdbench.losses.fitnet import resizing
from kdbench.types import LossTerms, Outputs, Target


def boundary_distance(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """sum over all elements of (s - margin)^2 where t > 0 and s is not above the margin, (s + margin)^2 where t <= 0
    and s is not below minus the margin, over the batch: 0-dim (Heo et al. 2019, AAAI, boundary transfer)."""
    on = teacher > 0
    off_by = torch.where(on, margin - student, student + margin).clamp_min(0)
    return off_by.square().sum() / len(student)


class Boundaries(FeatureLoss):
    """0.003 sum_l 2^(l - L) b(r_l(f_s), f_t), l = 1..L, f the maps before the ReLUs, r convolutions with batch norm
    where the shapes differ, b the distance of AB."""

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("boundaries",)
    paper: ClassVar[str] = "Heo et al. 2019 (AB), boundary transfer"

    def __init__(self, layers: Layers, margin: float) -> None:
        super().__init__({"boundaries": 1.0}, layers, 0.0)
        self.margin = margin
        self.connectors = nn.ModuleList()

    @property
    def formula(self) -> str:
        kind = f"b squared up to {number(self.margin)} beyond the teacher's sign, r learned"
        return f"0.003 sum_l 2^(l - L) b(r(f_s), f_t), {kind}, l in {self.layers_text}"

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        own, other = super().chosen(student, teacher)
        return Pair(before_relu(own, student), before_relu(other, teacher))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        made = [_connector(s, t) for s, t in zip(*self.maps(student, teacher))]
        self.connectors = nn.ModuleList(made).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        found = [
            boundary_distance(connect(own), other, self.margin) * 2 ** (i - len(s) + 1) / 1000 * 3
            for i, (connect, own, other) in enumerate(zip(self.connectors, s, t))
        ]
        return self.combine(boundaries=torch.stack(found).sum())


def _connector(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.shape[1:] == teacher.shape[1:]:
        return nn.Identity()
    return nn.Sequential(resizing(student, teacher), BatchNorm(teacher.shape[1]))


class AB(DistillationLoss):
    """CE(y, s), after a training of the student's stages alone by 0.003 sum_l 2^(l - L) b(r_l(f_s), f_t), b the squared
    distance by which a value is not `margin` beyond 0 on the side of the teacher's (Heo et al. 2019, AAAI, boundary
    transfer).

    The first training takes `epochs` at the constant rate `lr`, and the student's classifier has no part in it
    (Boundaries). In the field's comparisons labels alone follow; a KL beside them (loss=sum) is the paper's.
    """

    uses_teacher: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task",)
    paper: ClassVar[str] = "Heo et al. 2019 (AB), boundary transfer"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        margin: Positive = 1.0,
        epochs: Count = 30,
        lr: NotNegative | None = None,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.margin, self.layers = margin, layers
        self.first_epochs, self.first_lr = epochs, lr
        Boundaries(layers, margin)  # refuses layers that there cannot be

    @property
    def formula(self) -> str:
        before = Boundaries(self.layers, self.margin).formula
        return f"{self.written(task=self.task_text)} after {self.first_epochs} epochs of {before}"

    @property
    def first_training(self) -> First:
        return First(Boundaries(self.layers, self.margin), self.first_epochs, self.first_lr)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        detached(teacher, "ab")
        return self.combine(task=self.task(student.logits, target.label))
