"""Attention transfer: where a network looks, not what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target


def attention(feature: Tensor, power: float) -> Tensor:
    """mean_d |f_d|^power of a map [B, D, H, W], as a vector of length 1: [B, H W]; a map of zeros stays zero."""
    energy = feature.square() if power == 2 else feature.abs().clamp_min(1e-12) ** power
    return F.normalize(energy.mean(1).flatten(1))


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], power: float) -> Tensor:
    """sum over layers of the mean squared difference of attention maps, the larger maps averaged down: 0-dim."""
    pairs = [same_size(s, t) for s, t in zip(student, teacher)]
    return torch.stack([(attention(s, power) - attention(t, power)).square().mean() for s, t in pairs]).sum()


class AT(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l mean (A_s / |A_s| - A_t / |A_t|)^2, A = mean_d |f_d|^power at every
    place of layer l (Zagoruyko and Komodakis 2017, activation-based attention transfer).

    Mean over batch and places, weight 1000 in the field's comparisons. Channels may differ, numbers of layers may not.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zagoruyko and Komodakis 2017 (AT), activation-based"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        power: Positive = 2.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.power = power

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l mean (A_s/|A_s| - A_t/|A_t|)^2")
        return f"{text}, A = mean_d |f_d|^{number(self.power)}, l in {self.layers_text}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        return self.combine(task=self.task(student.logits, target.label), distill=attention_distance(s, t, self.power))
