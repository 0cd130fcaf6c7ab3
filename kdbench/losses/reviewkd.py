"""Knowledge review: every level of the student, fused with what the deeper levels know, against one level of the
teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Share, Width
from kdbench.errors import UserError
from kdbench.losses.base import Smoothing, Steps, Weights, number
from kdbench.losses.dkd import warmup_text
from kdbench.losses.features import FeatureLoss, Layers, Pair, before_relu
from kdbench.types import LossTerms, Outputs, Target

Size = tuple[int, int]


def as_map(feature: Tensor) -> Tensor:
    """[B, D, H, W] as it is, a vector [B, D] as a map of one place."""
    return feature if feature.dim() == 4 else feature[:, :, None, None]


def context_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps as they are (weight 1) and averaged to 4x4, 2x2, 1x1 (1/2, 1/4, 1/8, only below
    their own height), over the sum of the weights (Chen et al. 2021, hierarchical context loss): 0-dim."""
    total, norm, weight = (student - teacher).square().mean(), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            small = F.adaptive_avg_pool2d(student - teacher, size)  # pooling is linear: once, on the difference
            total, norm = total + weight * small.square().mean(), norm + weight
    return total / norm


class Normalise(nn.BatchNorm2d):
    """Batch normalisation that takes its running statistics where a channel has one value only: an epoch's last batch
    may be of one image, whose deepest map is of one place."""

    def forward(self, maps: Tensor) -> Tensor:
        if maps.numel() > maps.shape[1]:
            return super().forward(maps)
        return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Fusion(nn.Module):
    """Attention-based fusion (Chen et al. 2021): one student level with the fused deeper level, in the teacher's
    shape."""

    def __init__(self, student: int, middle: int, teacher: int, deepest: bool) -> None:
        super().__init__()
        narrow, wide = nn.Conv2d(student, middle, 1, bias=False), nn.Conv2d(middle, teacher, 3, padding=1, bias=False)
        self.reduce = nn.Sequential(narrow, Normalise(middle))
        self.expand = nn.Sequential(wide, Normalise(teacher))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for convolution in (narrow, wide):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, level: Tensor, deeper: Tensor | None, size: Size) -> tuple[Tensor, Tensor]:
        """(in the teacher's shape, fused for the next shallower level). size: the teacher's height and width."""
        fused = self.reduce(level)
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            share = self.attend(torch.cat([fused, deeper], dim=1))
            fused = fused * share[:, :1] + deeper * share[:, 1:]
        if tuple(fused.shape[2:]) != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.expand(fused), fused


class ReviewKD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill r sum_l hcl(u_l, f_t,l), u_l: the student's level l fused with its deeper
    levels by learned attention, hcl: squared error at several resolutions (Chen et al. 2021).

    `layers` from shallow to deep; r rises from 0 to 1 over the first `warmup` of the training (20 of 240 epochs in the
    field's comparisons). The authors tune weights.distill for each pair of networks, 0.6 to 8 on CIFAR-100. `middle`:
    width of the fused maps, at most. `before_relu`: the teacher's maps are those before the last ReLU of a stage
    ("stage1.pre"), as in the authors' code, where its network gives them; the student's are always those after it.
    """

    every: ClassVar[str] = r"stage\d+|pooled"

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Chen et al. 2021 (ReviewKD)"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        before_relu: bool = True,
        middle: Width = 512,
        warmup: Share = 20 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.steps = steps
        self.before_relu = before_relu
        self.middle, self.warmup = middle, warmup
        self.fusions = nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill=f"{'r ' if self.warmup else ''}sum_l hcl(u_l, f_t,l)")
        kind = f"u = student levels fused by learned attention at most {number(self.middle)} wide"
        return f"{text}, {kind}, l in {self.layers_text}{warmup_text(self.warmup)}"

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        own, other = super().chosen(student, teacher)
        return Pair(own, before_relu(other, teacher) if self.before_relu else other)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = ([as_map(f) for f in maps] for maps in self.maps(student, teacher))
        if any(shallow.shape[2] < deep.shape[2] for shallow, deep in zip(s, s[1:])):  # noqa: RUF007
            raise UserError("layers", self.layers, "from shallow to deep")
        middle = min(self.middle, s[-1].shape[1])
        last = len(s) - 1
        made = [Fusion(a.shape[1], middle, b.shape[1], i == last) for i, (a, b) in enumerate(zip(s, t))]
        self.fusions = nn.ModuleList(made).to(student.logits.device)

    def reviewed(self, student: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """The student's levels in the teacher's shapes, deepest first."""
        found: list[Tensor] = []
        deeper: Tensor | None = None
        for level, fusion, size in zip(reversed(student), reversed(self.fusions), reversed(sizes)):  # type: ignore[call-overload]
            out, deeper = fusion(level, deeper, size)
            found.append(out)
        return found

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = ([as_map(f) for f in maps] for maps in self.maps(student, teacher))
        u = self.reviewed(s, [(f.shape[2], f.shape[3]) for f in t])
        error = torch.stack([context_distance(a, b) for a, b in zip(u, reversed(t))]).sum()
        distill = self.risen(target.progress, self.warmup) * error
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
