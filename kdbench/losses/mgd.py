"""Masked generative distillation: the student's map, with channels missing, must let the teacher's be generated."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from kdbench.arguments.ranges import Momentum
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one, same_size
from kdbench.types import LossTerms, Outputs, Target


class MGD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum (g(m a(f_s)) - f_t)^2 / B, sum over channels and places, m 0 for each
    channel of each sample with probability `ratio` and 1 else, a a 1x1 convolution where the channels differ, g two 3x3
    convolutions with a ReLU between them; both train with the student (Yang et al. 2022, masked generation, for
    classification: weight 7e-5, ratio 0.15). The larger map is averaged down."""

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Yang et al. 2022 (MGD), masked generation"

    def __init__(
        self, weights: Weights, layer: OneLayer = "last", ratio: Momentum = 0.15, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.ratio = ratio
        self.align: nn.Module = nn.Identity()
        self.generation: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum (g(m a(f_s)) - f_t)^2 / B")
        return f"{text}, m without {number(self.ratio)} of the channels, a and g learned, f = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        (own, width), device = (x.shape[1] for x in self.map(student, teacher)), student.logits.device
        self.align = (nn.Identity() if own == width else nn.Conv2d(own, width, 1)).to(device)
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        ).to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = same_size(*self.map(student, teacher))
        kept = torch.rand((len(t), t.shape[1], 1, 1), device=t.device) >= self.ratio
        distill = (self.generation(self.align(s) * kept) - t).square().sum() / len(t)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
