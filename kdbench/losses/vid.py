"""Variational information distillation: the teacher's features as a Gaussian that the student predicts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target

FLOOR = 1e-5  # least variance


class Predictor(nn.Module):
    """Mean (three 1x1 convolutions of the student's map) and variance (one number a channel) of the teacher's map."""

    def __init__(self, student: int, teacher: int, variance: float) -> None:
        super().__init__()
        widths = (student, teacher, teacher, teacher)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, kernel_size=1, bias=False), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        self.scale = nn.Parameter(torch.full((teacher,), math.log(math.expm1(variance - FLOOR))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Negative log-likelihood (without its constant) of the teacher's map, mean over all elements: 0-dim."""
        student, teacher = same_size(student, teacher)
        variance = (F.softplus(self.scale) + FLOOR).view(1, -1, 1, 1)
        return torch.mean((self.mean(student) - teacher).square() / variance + variance.log()) / 2


class VID(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l mean ((m(f_s) - f_t)^2 / v + log v) / 2, m and the variances v
    learned with the student (Ahn et al. 2019, the Gaussian L_VID). Weight 1 in the field's comparisons.

    `variance` is v before training. A log-likelihood: it may be negative.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Ahn et al. 2019 (VID), Gaussian"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        variance: Positive = 5.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.variance = variance
        self.predictors = nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l mean ((m(f_s) - f_t)^2 / v + log v) / 2")
        return f"{text}, m and v learned, v from {number(self.variance)}, l in {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        made = [Predictor(s.shape[1], t.shape[1], self.variance) for s, t in zip(*self.maps(student, teacher))]
        self.predictors = nn.ModuleList(made).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        maps = self.maps(student, teacher)
        distill = torch.stack([predict(s, t) for predict, s, t in zip(self.predictors, *maps)]).sum()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
