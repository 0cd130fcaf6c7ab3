"""Similarity-preserving distillation: which images of a batch resemble each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, Layers
from kdbench.types import LossTerms, Outputs, Target


def similarities(feature: Tensor) -> Tensor:
    """The batch's inner products [B, B] of whole features, every row of length 1."""
    flat = feature.flatten(1)
    return F.normalize(flat @ flat.T)


def similarity_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """sum over layers of the mean squared difference of the similarity matrices: 0-dim. Sizes need not match."""
    return torch.stack([(similarities(s) - similarities(t)).square().mean() for s, t in zip(student, teacher)]).sum()


class SP(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l |G_s - G_t|^2 / B^2, G = f f^T of the batch's features with rows of
    length 1 (Tung and Mori 2019, L_SP). Weight 3000 in the field's comparisons, on the last stage of each network."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Tung and Mori 2019 (SP), L_SP"

    def __init__(self, weights: Weights, layers: Layers, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, layers, label_smoothing)

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l |G_s - G_t|^2 / B^2")
        return f"{text}, G = rows of f f^T over their length, l in {self.layers_text}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        return self.combine(task=self.task(student.logits, target.label), distill=similarity_distance(s, t))
