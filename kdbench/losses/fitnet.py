"""FitNets: a middle layer of the student is regressed on a middle layer of the teacher."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative
from kdbench.errors import require
from kdbench.losses.base import DistillationLoss, First, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.features import FeatureLoss, OneLayer, one, same_size
from kdbench.losses.functional import kl_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


def regressor(student: Tensor, teacher: Tensor, resize: bool) -> nn.Sequential:
    """Convolution, batch norm and ReLU from the student's map to the teacher's channels: a 1x1 convolution, or, to
    `resize`, one that gives the teacher's height and width, too."""
    inputs, outputs = student.shape[1], teacher.shape[1]
    convolution = resizing(student, teacher) if resize else nn.Conv2d(inputs, outputs, kernel_size=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()).to(student.device)


def resizing(student: Tensor, teacher: Tensor) -> nn.Module:
    """The convolution that brings a map [B, D, H, W] to the teacher's shape, as RepDistiller chooses it: transposed 4x4
    of stride 2 to twice the height, 3x3 of stride 2 to half of it, else as large as the difference wants it.

    Raises UserError for a student's map that is smaller than the teacher's by another factor than 2.
    """
    inputs, (high, wide) = student.shape[1], student.shape[2:]
    outputs, (height, width) = teacher.shape[1], teacher.shape[2:]
    if high == 2 * height:
        return nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
    if 2 * high == height:
        return nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
    sizes = f"the student's map has {high} x {wide} places, the teacher's {height} x {width}"
    require(high >= height and wide >= width, "adapter", "repdistiller", f"average here: {sizes}")
    return nn.Conv2d(inputs, outputs, kernel_size=(1 + high - height, 1 + wide - width))


class FitNet(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean (r(f_s) - f_t)^2 over all elements of one layer, r: a convolution
    with batch norm and ReLU that trains with the student (Romero et al. 2015, hint loss).

    `adapter`: average, a 1x1 convolution, and the larger of the two maps is averaged down to the size of the smaller;
    repdistiller, a convolution that brings the student's map to the size of the teacher's (see `resizing`), as in the
    field's comparisons; with maps of one size both are the same. `layer`: the hint, of both networks. Both terms act
    throughout, as in the field's comparisons (weight 100); the paper's two stages are loss=fitnet_hints.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Romero et al. 2015 (FitNets), hint loss"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "stage2",
        adapter: Literal["average", "repdistiller"] = "average",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.adapter = adapter
        self.regressor: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean (r(f_s) - f_t)^2")
        size = ", r resizes" if self.adapter == "repdistiller" else ""
        return f"{text}, f = {self.layers_text}, r learned{size}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        self.regressor = regressor(*self.map(student, teacher), resize=self.adapter == "repdistiller")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        if self.adapter == "average":
            s, t = same_size(s, t)
        distill = torch.mean((self.regressor(s) - t).square())
        return self.combine(task=self.task(student.logits, target.label), distill=distill)


class Hint(FeatureLoss):
    """mean over samples and places of 1/2 sum_d (r(f_s) - f_t)^2, r a convolution with ReLU to the shape of the
    teacher's map: the student learns its layers up to this one (Romero et al. 2015, hint loss)."""

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("hint",)
    paper: ClassVar[str] = "Romero et al. 2015 (FitNets), hint loss"

    def __init__(self, layer: OneLayer) -> None:
        super().__init__({"hint": 1.0}, one(layer), 0.0, "layer")
        self.regressor: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        return f"mean 1/2 sum_d (r(f_s) - f_t)^2, f = {self.layers_text}, r learned"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        self.regressor = nn.Sequential(resizing(*self.map(student, teacher)), nn.ReLU()).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        return self.combine(hint=(self.regressor(s) - t).square().sum(1).mean() / 2)


class FitNetHints(DistillationLoss):
    """weights.task CE(y, s) + weights.distill a KL(t/tau || s/tau), a falling from `start` to `end` along the training,
    after a training of the student's layers up to a hint of the teacher's (Romero et al. 2015, hint loss).

    The first training takes `epochs` at the constant rate `lr` (Hint). There is no tau^2. As published a falls from 4
    to 1 over 400 epochs, of which 288 are trained, at tau 3.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Romero et al. 2015 (FitNets), hint loss"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "stage2",
        tau: Moderate = 3.0,
        start: NotNegative = 4.0,
        end: NotNegative = 1.0,
        epochs: Count = 30,
        lr: NotNegative | None = None,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.layer, self.tau, self.start, self.end = layer, tau, start, end
        self.first_epochs, self.first_lr = epochs, lr
        Hint(layer)  # refuses layers that there cannot be

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="a KL(t/tau || s/tau)")
        falls = f"a from {number(self.start)} to {number(self.end)}, tau = {number(self.tau)}"
        return f"{text}, {falls}, after {self.first_epochs} epochs of {Hint(self.layer).formula}"

    @property
    def first_training(self) -> First:
        return First(Hint(self.layer), self.first_epochs, self.first_lr)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "fitnet_hints")
        factor = self.start + (self.end - self.start) * target.progress
        rows = kl_rows(log_probs(t, self.tau), log_probs(student.logits, self.tau))
        return self.combine(task=self.task(student.logits, target.label), distill=factor * rows.mean())
