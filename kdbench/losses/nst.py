"""Neuron selectivity transfer: the two sets of channels as samples of one distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target


def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
    """mean of <a_i, b_j>^2 over samples and pairs of channels, from [B, D, P] and [B, E, P]: 0-dim."""
    return (a @ b.transpose(1, 2)).square().mean()


def channel_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """sum over layers of the squared maximum mean discrepancy between the channels' maps, each of length 1: 0-dim."""
    distances = []
    for s, t in zip(student, teacher):
        s, t = (F.normalize(x.flatten(2), dim=2) for x in same_size(s, t))
        distances.append(kernel_mean(t, t) + kernel_mean(s, s) - 2 * kernel_mean(s, t))
    return torch.stack(distances).sum()


class NST(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l MMD^2 between the channels of student and teacher, each channel's
    map of length 1, with the kernel <a, b>^2 (Huang and Wang 2017, polynomial kernel). Weight 50 in the field's
    comparisons.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Huang and Wang 2017 (NST), polynomial kernel"

    def __init__(self, weights: Weights, layers: Layers, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, layers, label_smoothing)

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l (k(t,t) + k(s,s) - 2 k(s,t))")
        return f"{text}, k = mean squared inner product of channels of length 1, l in {self.layers_text}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        return self.combine(task=self.task(student.logits, target.label), distill=channel_distance(s, t))
