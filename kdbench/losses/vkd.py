"""VkD: the student's feature, turned by an orthogonal matrix, is the teacher's normalised one."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import orthogonal

from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


class VkD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill h(P f_s - N(f_t)), P a matrix with orthonormal columns or rows that
    trains with the student, N layer normalisation without parameters, h the smoothed absolute difference, mean over
    batch and dimensions (Miles et al. 2024, VkD, with their task-specific normalisation for classification).

    P is the exponential of a skew-symmetric matrix, as in the paper. The authors' code leaves it to torch, which takes
    Householder reflections where the widths differ: their signs are kept as whole numbers that the first step of weight
    decay rounds to 0, and P with them. The feature is averaged over places if it is a map. The authors' students are
    DeiTs of two tokens, beside a KL of the second one's logits; their feature is the mean of the other tokens.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Miles et al. 2024 (VkD), orthogonal projection"

    def __init__(self, weights: Weights, layer: OneLayer = "pooled", label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.projector: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="smoothed mean |P f_s - N(f_t)|")
        return f"{text}, P orthogonal and learned, N layer normalisation, f = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        (own, width), device = (x.shape[1] for x in self.map(student, teacher)), student.logits.device
        self.projector = orthogonal(nn.Linear(own, width, bias=False), orthogonal_map="matrix_exp").to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = (x if x.dim() == 2 else x.mean((2, 3)) for x in self.map(student, teacher))
        distill = F.smooth_l1_loss(self.projector(s), F.layer_norm(t, t.shape[1:]))
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
