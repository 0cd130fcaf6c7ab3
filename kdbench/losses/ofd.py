"""Overhauled feature distillation: maps before the ReLU, and only where the teacher's sign wants it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.losses.adapters import connector
from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, Layers, Pair, before_relu
from kdbench.types import LossTerms, Outputs, Parts, Target


def margins(norm: nn.Module) -> Tensor:
    """E[x | x < 0] of each channel x ~ N(bias, weight^2) of a batch norm [D], or -3 |weight| where fewer than one value
    in a thousand is negative (Heo et al. 2019, margin ReLU and the authors' code)."""
    pair: list[Tensor] = [norm.bias.detach(), norm.weight.detach()]  # type: ignore[union-attr, operator, list-item]
    # MPS has no float64; what is tried without memory cannot be copied.
    mean, std = (value.double() if value.is_meta else value.cpu().double() for value in pair)
    std = std.abs().clamp_min(1e-12)
    below = torch.special.ndtr(-mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    found = torch.where(below > 0.001, mean - std * density / below.clamp_min(0.001), -3 * std)
    return found.float()


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """sum over channels and places of (s - max(t, m))^2 where s > max(t, m) or t > 0, mean over the batch: 0-dim (Heo
    et al. 2019, margin ReLU, partial L2). margin [D]."""
    aim = torch.maximum(teacher, margin.to(teacher)[:, None, None])
    wanted = (student > aim) | (aim > 0)
    return torch.where(wanted, (student - aim).square(), 0.0).sum() / len(student)


class OFD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l 2^(l - L) d(r_l(f_s), max(f_t, m)), l = 1..L, f the maps before the
    last ReLU of each stage, r 1x1 convolutions with batch norm that train with the student, d the squared distance that
    counts only where f_t is positive or the student is above it, m the mean of the teacher's negative values by its
    batch norms (Heo et al. 2019, margin ReLU, partial L2). Weight 0.001 as published.

    The teacher's map is averaged to the student's height and width. Networks of three and of four stages are compared
    from the last stage back. The teacher must say which batch norms make its maps; kdbench's own networks but
    ShuffleNets and DenseNets do.
    """

    from_the_end: ClassVar[bool] = True
    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Heo et al. 2019 (OFD), margin ReLU, partial L2"

    def __init__(self, weights: Weights, layers: Layers, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.connectors = nn.ModuleList()
        self._norms: Mapping[str, nn.Module] = {}

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l 2^(l - L) d(r(f_s), max(f_t, m))")
        kind = "d = squared where f_t > 0 or above, m = mean of negative f_t, r learned"
        return f"{text}, {kind}, l in {self.layers_text}"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        self._norms = teacher.norms if teacher else {}

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        own, other = super().chosen(student, teacher)
        return Pair(before_relu(own, student), before_relu(other, teacher))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.maps(student, teacher)
        device = student.logits.device
        made = [connector(a.shape[1], b.shape[1], relu=False, kaiming=True) for a, b in zip(s, t)]
        self.connectors = nn.ModuleList(made).to(device)
        for i, name in enumerate(self.needs):
            if name not in self._norms:
                has = ", ".join(self._norms) or "none"
                allowed = f"another here: of {name} the teacher knows no batch norm (it has {has})"
                raise UserError("loss", "ofd", allowed)
            self.register_buffer(f"margin{i}", margins(self._norms[name]).to(device))

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        found = []
        for i, (connect, own, other) in enumerate(zip(self.connectors, s, t)):
            other = F.adaptive_avg_pool2d(other, own.shape[2:])  # type: ignore[arg-type]
            distance = partial_distance(connect(own), other, self.get_buffer(f"margin{i}"))
            found.append(distance / 2 ** (len(s) - i - 1))
        return self.combine(task=self.task(student.logits, target.label), distill=torch.stack(found).sum())
