"""FitNets: a middle layer of the student is regressed on a middle layer of the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.losses.base import DistillationLoss, Smoothing, Weights
from kdbench.losses.features import Layer, needs_maps, same_size, student_maps, teacher_maps
from kdbench.types import LossTerms, Outputs, Target


def regressor(student: Tensor, teacher: Tensor) -> nn.Sequential:
    """1x1 convolution, batch norm and ReLU from the student's channels to the teacher's."""
    convolution = nn.Conv2d(student.shape[1], teacher.shape[1], kernel_size=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(teacher.shape[1]), nn.ReLU()).to(student.device)


class FitNet(DistillationLoss):
    """weights.task CE(y, s) + weights.distill mean (r(f_s) - f_t)^2 over all elements of one layer, r: a 1x1
    convolution with batch norm and ReLU that trains with the student (Romero et al. 2015, eq. 3).

    The larger of the two maps is averaged down to the size of the smaller. `layer`: the hint, of both networks. The
    paper trains the lower half on it first; here, as in the field's comparisons (weight 100), both terms act
    throughout.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Romero et al. 2015 (FitNets), eq. 3"

    def __init__(self, weights: Weights, layer: Layer = "stage2", label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.needs = (layer,)
        self.regressor: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        return self.written(task=self.task_text, distill="mean (r(f_s) - f_t)^2") + f", f = {self.needs[0]}, r learned"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        s, t = student_maps(student, self.needs), teacher_maps(teacher, self.needs, "fitnet")
        needs_maps(self.needs, [*s, *t], "fitnet")
        self.regressor = regressor(s[0], t[0])

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = student_maps(student, self.needs)[0], teacher_maps(teacher, self.needs, "fitnet")[0]
        s, t = same_size(s, t)
        distill = torch.mean((self.regressor(s) - t).square())
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
