"""Information-theoretic distillation: each dimension correlated with the teacher's, and no more information than that.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Positive
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


def standard(x: Tensor) -> Tensor:
    """(x - mean) / std of every dimension over the batch [B, D], std with B - 1; 0 where there is no spread."""
    centred = x - x.mean(0)
    variance = centred.square().sum(0) / max(len(x) - 1, 1)
    spread = variance > 1e-14
    return torch.where(spread, centred / torch.where(spread, variance, 1.0).sqrt(), 0.0)


def decorrelation(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    """log2 sum_d |1 - c_d|^(2 alpha), c_d the correlation of dimension d of both over the batch [B, D] (Miles et al.
    2022, L_corr): 0-dim."""
    correlation = (standard(student) * standard(teacher)).sum(0) / len(student)
    return ((correlation - 1).square() ** alpha).sum().clamp_min(1e-30).log2()


def information(student: Tensor, teacher: Tensor) -> Tensor:
    """|G_s|^2 - |G_s * G_t|^2 of the batch's cosines G [B, B], each divided by its trace (Miles et al. 2022, L_mi):
    0-dim."""
    s, t = F.normalize(student), F.normalize(teacher)
    own = s @ s.T
    both = own * (t @ t.T)
    return _purity(own) - _purity(both)


def _purity(gram: Tensor) -> Tensor:
    trace = gram.diagonal().sum()
    return (gram / torch.where(trace > 0, trace, 1.0)).square().sum()


class ITRD(FeatureLoss):
    """weights.task CE(y, s) + weights.correlation log2 sum_d |1 - c_d|^(2 alpha) + weights.mutual (|G_s|^2 - |G_s
    G_t|^2), c_d the correlation over the batch of dimension d of the teacher's feature and of the student's, embedded
    by a learned linear layer, G the batch's cosines divided by their trace (Miles et al. 2022, L_corr and L_mi).

    The student's own feature makes G_s where it is as wide as the teacher's, as in the authors' code; else the embedded
    one. As published correlation 2 and mutual 1, alpha 1.01 within a family of networks and 1.5 between families.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "correlation", "mutual")
    paper: ClassVar[str] = "Miles et al. 2022 (ITRD), L_corr and L_mi"

    def __init__(
        self,
        weights: Weights,
        alpha: Positive = 1.5,
        layer: OneLayer = "pooled",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.alpha = alpha
        self.embed: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        correlation, mutual = f"log2 sum_d |1 - c_d|^{number(2 * self.alpha)}", "(|G_s|^2 - |G_s G_t|^2)"
        text = self.written(task=self.task_text, correlation=correlation, mutual=mutual)
        kind = "c = correlation of e(f_s) and f_t, G = the batch's cosines at trace 1, e learned"
        return f"{text}, {kind}, f = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = (x.flatten(1) for x in self.map(student, teacher))
        self.embed = nn.Linear(s.shape[1], t.shape[1], device=student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = (x.flatten(1) for x in self.map(student, teacher))
        embedded = self.embed(s)
        return self.combine(
            task=self.task(student.logits, target.label),
            correlation=decorrelation(embedded, t, self.alpha),
            mutual=information(s if s.shape[1] == t.shape[1] else embedded, t),
        )
