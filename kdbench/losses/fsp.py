"""Flow of the solution procedure: how one layer's channels turn into the next one's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Share
from kdbench.errors import UserError
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target


def flows(maps: Sequence[Tensor]) -> list[Tensor]:
    """For every two layers in turn, mean over places of f_i g_j: [B, D, E] (Yim et al. 2017, FSP matrix)."""
    found = []
    for low, high in pairwise(maps):
        low, high = (x.flatten(2) for x in same_size(low, high))
        found.append(low @ high.transpose(1, 2) / low.shape[2])
    return found


class FSP(FeatureLoss):
    """First the flows alone, weights.distill sum_l mean (F_s - F_t)^2, F = mean over places of f_l f_(l+1)^T, until
    `switch` of the training; then weights.task CE(y, s) alone (Yim et al. 2017, FSP matrix, in two stages as there).

    Both networks need the same channels in `layers`. In the field's comparisons the first stage has weight 1 (the 50 on
    their command line multiplies a second-stage term that is 0) and takes 30 epochs before the usual 240: with
    schedule.epochs=270, milestones 30 later, and `switch` 30/270. `switch` = 1 would never see a label.
    """

    every: ClassVar[str] = r"stem|stage\d+"
    maps_only: ClassVar[bool] = True
    least_layers: ClassVar[int] = 2
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Yim et al. 2017 (FSP), FSP matrix"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        switch: Share = 30 / 270,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.switch = switch

    @property
    def formula(self) -> str:
        first = f"{number(self.weights.get('distill', 1.0))} sum_l mean (F_s - F_t)^2"
        then = f"{number(self.weights.get('task', 1.0))} {self.task_text}"
        flow = f"F = mean over places of f_l f_(l+1)^T, l in {self.layers_text}"
        return f"until {number(self.switch)} of the training {first}, then {then}; {flow}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.maps(student, teacher)
        widths = [x.shape[1] for x in s], [x.shape[1] for x in t]
        if widths[0] != widths[1]:
            raise UserError(f"loss=fsp needs equal channels in loss.layers; student {widths[0]}, teacher {widths[1]}")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = (flows(maps) for maps in self.maps(student, teacher))
        error = torch.stack([(a - b).square().mean() for a, b in zip(s, t)]).sum()
        first = (target.progress < self.switch).to(error.dtype)
        return self.combine(task=(1 - first) * self.task(student.logits, target.label), distill=first * error)
