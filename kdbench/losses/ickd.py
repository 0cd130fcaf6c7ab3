"""Inter-channel correlation: how a layer's channels go together."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.losses.adapters import connector
from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


def correlations(feature: Tensor) -> Tensor:
    """<f_c, f_d> over all places of a map [B, D, H, W], each row at length 1: [B, D, D]."""
    flat = feature.flatten(2)
    return F.normalize(flat @ flat.transpose(1, 2), dim=2)


class ICKD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean over samples and c of sum_d (G_s - G_t)_cd^2, G the channels'
    products over all places, each row at length 1, of r(f_s) and f_t; r a 1x1 convolution with batch norm that trains
    with the student (Liu et al. 2021, inter-channel correlation, ICKD-C; weight 2.5 in the authors' code). The maps'
    sizes may differ.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Liu et al. 2021 (ICKD-C), inter-channel correlation"

    def __init__(self, weights: Weights, layer: OneLayer = "last", label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.connector: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean_c sum_d (G_s - G_t)_cd^2")
        return f"{text}, G = channel products at length 1 of r(f_s) and f_t, r learned, f = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        self.connector = connector(s.shape[1], t.shape[1], relu=False).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        distill = (correlations(self.connector(s)) - correlations(t)).square().sum(2).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
