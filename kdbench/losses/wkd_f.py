"""Wasserstein distance of features: the mean and the spread of every channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, Share
from kdbench.errors import require
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import Smoothing, Steps, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.losses.fitnet import resizing
from kdbench.types import LossTerms, Outputs, Target


def moments(feature: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sqrt(variance + 1e-5) of every channel in each of grid x grid cells of a map
    [B, D, H, W]: two of [B, D, grid^2]. Cells are those of adaptive pooling; the variance is the unbiased one."""
    high, wide = feature.shape[2:]
    cells = [
        feature[:, :, a:b, c:d].flatten(2)
        for a, b in _bounds(high, grid)
        for c, d in _bounds(wide, grid)
    ]  # fmt: skip
    mean = torch.stack([cell.mean(2) for cell in cells], dim=2)
    return mean, torch.stack([(cell.var(2) + 1e-5).sqrt() for cell in cells], dim=2)


def _bounds(size: int, grid: int) -> list[tuple[int, int]]:
    return [(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]


class WKDF(FeatureLoss):
    """weights.task CE(y, s) + weights.distill d (ratio |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2), mu and sigma the mean
    and standard deviation of every channel of r(f_s) and f_t in grid x grid cells: the Wasserstein distance of
    Gaussians with diagonal covariances (Lv et al. 2024, WKD-F, Gaussian Wasserstein), sum over channels, mean over
    batch and cells.

    r: a convolution with batch norm and ReLU to the teacher's shape. d falls from 1 to 0 along half a cosine from
    `decay` of the training on (150 of 240 epochs). As published weight 0.08, ratio 4 and one cell for resnet32x4 ->
    resnet8x4; 0.3, 3 and 4 x 4 cells for wrn_40_2 -> shufflenetv1.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Lv et al. 2024 (WKD-F), Gaussian Wasserstein"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "last",
        ratio: NotNegative = 4.0,
        grid: Count = 1,
        decay: Share = 150 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.ratio, self.grid, self.decay, self.steps = ratio, grid, decay, steps
        self.connector: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        falling = "d " if self.decay < 1 else ""
        text = self.written(
            task=self.task_text, distill=f"{falling}({number(self.ratio)} |mu_s - mu_t|^2 + |sigma_s - sigma_t|^2)"
        )
        kind = f"of r(f_s) and f_t in {self.grid} x {self.grid} cells, r learned, f = {self.layers_text}"
        return f"{text}, {kind}" + (f", d falls from {self.decay:.4g} of the training on" if self.decay < 1 else "")

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        places = math.prod(min(b - a for a, b in _bounds(size, self.grid)) for size in t.shape[2:])
        require(places > 1, "grid", self.grid, f"smaller: a cell has one of the teacher's {list(t.shape[2:])} places")
        made = nn.Sequential(resizing(s, t), BatchNorm(t.shape[1]), nn.ReLU())
        self.connector = made.to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        means, spreads = zip(moments(self.connector(s), self.grid), moments(t, self.grid))
        mean, spread = ((a - b).square().sum(1).mean() for a, b in (means, spreads))
        past = (self.reached(target.progress) - self.decay).clamp_min(0) / max(1 - self.decay, 1e-9)
        falling = (1 + torch.cos(math.pi * past)) / 2
        distill = falling.to(mean) * (self.ratio * mean + spread)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
