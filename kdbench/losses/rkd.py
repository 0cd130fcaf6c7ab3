"""Relational distillation: distances and angles between the images of a batch."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import NotNegative
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


def differences(embedding: Tensor) -> Tensor:
    """e_i - e_j of embeddings [B, D]: [B, B, D]."""
    return embedding.unsqueeze(0) - embedding.unsqueeze(1)


def distances(between: Tensor) -> Tensor:
    """Lengths of differences [B, B, D] over their mean among pairs of different samples: [B, B] (Park et al. 2019,
    psi_D)."""
    length = torch.linalg.vector_norm(between, dim=2)
    apart = (length > 0).sum().clamp_min(1)
    return length / (length.sum() / apart).clamp_min(1e-12)


def angles(between: Tensor) -> Tensor:
    """Cosines at every sample between every two others, from differences [B, B, D]: [B, B, B] (Park et al. 2019,
    psi_A)."""
    unit = F.normalize(between, dim=2)
    return unit @ unit.transpose(1, 2)


class RKD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill (distance h(D_s - D_t) + angle h(A_s - A_t)), D: pairwise distances over
    their mean, A: cosines of all triples, h: mean smooth-L1 (Park et al. 2019, L_RKD-D and L_RKD-A).

    `distance` 25 and `angle` 50 with weight 1 in the field's comparisons. Costs B^2 D + B^3 numbers: for a batch of 512
    over half a gigabyte.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Park et al. 2019 (RKD), RKD-DA"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "pooled",
        distance: NotNegative = 25.0,
        angle: NotNegative = 50.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.distance, self.angle = distance, angle

    @property
    def formula(self) -> str:
        both = f"({number(self.distance)} h(D_s - D_t) + {number(self.angle)} h(A_s - A_t))"
        text = self.written(task=self.task_text, distill=both)
        return (
            f"{text}, D = distances over their mean, A = cosines of triples of {self.layers_text}, h = mean smooth_l1"
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = (differences(x.flatten(1)) for x in self.map(student, teacher))
        distance = F.smooth_l1_loss(distances(s), distances(t))
        angle = F.smooth_l1_loss(angles(s), angles(t))
        distill = self.distance * distance + self.angle * angle
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "distance": distance.detach(), "angle": angle.detach()})
