"""Probabilistic knowledge transfer: similarities in a batch as probabilities of being neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target

EPSILON = 1e-7  # the authors'


def neighbourhoods(embedding: Tensor) -> Tensor:
    """(cos(e_i, e_j) + 1) / 2 over its sum along j: [B, B], from embeddings [B, D] (Passalis and Tefas 2018, the cosine
    kernel)."""
    unit = embedding / (torch.linalg.vector_norm(embedding, dim=1, keepdim=True) + EPSILON)
    affinity = (unit @ unit.T + 1) / 2
    return affinity / affinity.sum(1, keepdim=True)


class PKT(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean_ij P_t log(P_t / P_s), P_ij: the cosine of samples i and j, shifted
    to 0..1 and normalised along j (Passalis and Tefas 2018, the divergence of the two).

    A mean over all B^2 pairs, which is why the weight of the field's comparisons is 30000.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Passalis and Tefas 2018 (PKT), cosine kernel"

    def __init__(self, weights: Weights, layer: OneLayer = "pooled", label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean_ij P_t log(P_t / P_s)")
        return f"{text}, P_ij = (cos(f_i, f_j) + 1) / 2 over its sum along j, f = {self.layers_text}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        q, p = neighbourhoods(s.flatten(1)), neighbourhoods(t.flatten(1))
        distill = torch.mean(p * ((p + EPSILON) / (q + EPSILON)).log())
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
