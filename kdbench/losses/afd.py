"""Attention-based feature distillation: which stage of the student each of the teacher's should be, is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Width
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers
from kdbench.types import LossTerms, Outputs, Target


def energy(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """mean_d f_d^2 of a map [B, D, H, W], averaged to `size` places, as a vector of length 1: [B, places]."""
    return F.normalize(F.adaptive_avg_pool2d(feature.square().mean(1, keepdim=True), size).flatten(1))


def _linear(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), BatchNorm(outputs))


class AFD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_k mean_b sum_l a_kl mean (A_s,l - A_t,k)^2, A = mean_d f_d^2 of a
    stage at length 1, a = softmax over the student's stages l of (<q_k, W_k h_l> + <p_k, p_l>) / sqrt(width), q_k and
    h_l learned of the stages' mean channels (Ji et al. 2021, attention of stages; weight 200, beside a KL).

    The student's A are averaged to the places of the teacher's. The authors compare the outputs of all residual blocks;
    here they are stages.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Ji et al. 2021 (AFD), attention of stages"

    def __init__(
        self, weights: Weights, layers: Layers, width: Width = 128, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.width = width
        self.queries, self.keys = nn.ModuleList(), nn.ModuleList()
        self.bilinear: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_k sum_l a_kl mean (A_s,l - A_t,k)^2")
        kind = f"A = mean_d f_d^2 at length 1, a learned, {number(self.width)} wide"
        return f"{text}, {kind}, l and k in {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.maps(student, teacher)
        device = student.logits.device
        self.queries = nn.ModuleList(_linear(x.shape[1], self.width) for x in t).to(device)
        self.keys = nn.ModuleList(nn.Sequential(*_linear(x.shape[1], self.width), nn.ReLU()) for x in s).to(device)
        self.bilinear = _linear(self.width, self.width * len(t)).to(device)
        places = [torch.empty(len(x), self.width, device=device) for x in (t, s)]
        self.place_t, self.place_s = (nn.Parameter(nn.init.xavier_normal_(place)) for place in places)

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """How much each of the teacher's stages looks at each of the student's [B, L_t, L_s]."""
        keys = torch.stack([key(x.mean((2, 3))) for key, x in zip(self.keys, student)], dim=1)
        query = torch.stack([ask(x.mean((2, 3))) for ask, x in zip(self.queries, teacher)], dim=1)
        turned = self.bilinear(keys.flatten(0, 1)).unflatten(0, keys.shape[:2]).unflatten(2, (len(teacher), -1))
        scores = torch.einsum("bstq,btq->bts", turned, query) + self.place_t @ self.place_s.T
        return F.softmax(scores / math.sqrt(self.width), dim=2)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        share = self.attention(s, t)
        distances = []
        for other in t:
            size = (other.shape[2], other.shape[3])
            own = torch.stack([energy(x, size) for x in s], dim=1)
            distances.append((own - energy(other, size).unsqueeze(1)).square().mean(2))
        distill = (share * torch.stack(distances, dim=1)).sum((1, 2)).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
