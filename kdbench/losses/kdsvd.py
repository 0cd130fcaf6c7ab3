"""Singular vectors: the directions in which a stage's channels vary, and how they change from stage to stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Count
from kdbench.errors import UserError
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers
from kdbench.types import LossTerms, Outputs, Target

NEAR = {torch.float32: 1e-6, torch.float64: 1e-12}  # gaps between squared singular values below it count as none


class RightVectors(torch.autograd.Function):
    """The first right singular vectors [B, C, n] of matrices [B, N, C], and the singular values [B, n].

    d v_i = sum_(j != i) v_j v_j^T dG v_i / (l_i - l_j), G = A^T A, l its eigenvalues, the null space among them. Where
    two meet, the quotient by the gap g becomes g / (g^2 + NEAR^2 l_1^2): nothing, in place of an infinite gradient. The
    values themselves have no gradient here.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
        _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        ctx.save_for_backward(matrix, values, vectors)
        kept = vectors[:, :count].transpose(1, 2), values[:, :count]
        ctx.mark_non_differentiable(kept[1])
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        matrix, values, vectors = ctx.saved_tensors
        squares, count = values.square(), grad.shape[2]
        near = (NEAR[matrix.dtype] * squares[:, :1]).square().clamp_min(torch.finfo(matrix.dtype).tiny)
        gaps = squares[:, None, :count] - squares[:, :, None]  # [B, R, n]: l_i - l_j
        along = vectors @ grad  # v_j^T g_i
        inner = vectors.transpose(1, 2) @ (along * gaps / (gaps.square() + near[:, :, None]))
        alone = squares[:, :count] / (squares[:, :count].square() + near)
        outer = (grad - vectors.transpose(1, 2) @ along) * alone[:, None]
        turned = (inner + outer) @ vectors[:, :count]  # dL/dG
        return matrix @ (turned + turned.transpose(1, 2)), None


def directions(feature: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors [B, C, n] of a map [B, C, H, W] as matrices of places and channels, and the
    singular values [B, n] at length 1. Of a vector's two directions that in which its largest component is positive:
    the field's code leaves it to the library, and R depends on it."""
    vectors, values = RightVectors.apply(feature.flatten(2).transpose(1, 2), count)  # type: ignore[no-untyped-call]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = vectors * largest.sign().detach()
    return F.normalize(vectors, dim=1), F.normalize(values, dim=1)


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors [B, C, k] the student's [B, C, n] that is nearest, in its direction: [B, C, k].
    """
    cosine = student.transpose(1, 2) @ teacher
    nearest = cosine.abs() == cosine.abs().amax(1, keepdim=True)
    return student @ torch.where(nearest, cosine.sign(), 0.0).detach()


def changes(stages: Sequence[Tensor]) -> list[Tensor]:
    """exp(-(v_l - v_(l-1))^2 / 8) of every two components of successive stages [B, C_l, C_(l-1), k]."""
    return [torch.exp(-(high.unsqueeze(2) - low.unsqueeze(1)).square() / 8) for low, high in pairwise(stages)]


class KDSVD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill sum_l |R_s,l - R_t,l|^2 / B, R = exp(-(v_l - v_(l-1))^2 / 8) of all
    components of the first `vectors` right singular vectors v of successive stages, times the teacher's singular values
    at length 1; for each of the teacher's vectors the nearest of the student's first `vectors` + 3 (Lee et al. 2018,
    singular vectors).

    Both networks need the same channels in `layers`. The gradient is stable where singular values meet or vanish, where
    the field's code sets what is not finite to 0. A singular value decomposition of each map and sample: slow.
    """

    maps_only: ClassVar[bool] = True
    least_layers: ClassVar[int] = 2
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Lee et al. 2018 (KD-SVD), singular vectors"

    def __init__(
        self, weights: Weights, layers: Layers, vectors: Count = 1, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.vectors = vectors

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_l |R_s,l - R_t,l|^2 / B")
        kind = f"R = exp(-(v_l - v_(l-1))^2 / 8), v the first {number(self.vectors)} right singular vectors"
        return f"{text}, {kind}, l in {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        widths = [[x.shape[1] for x in maps] for maps in self.maps(student, teacher)]
        if widths[0] != widths[1]:
            raise UserError(f"loss=kdsvd needs equal channels in loss.layers; student {widths[0]}, teacher {widths[1]}")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        own, other = [], []
        for s, t in zip(*self.maps(student, teacher)):
            vectors, values = directions(t, self.vectors)
            own.append(aligned(directions(s, self.vectors + 3)[0], vectors) * values.unsqueeze(1))
            other.append(vectors * values.unsqueeze(1))
        found = [(a - b).square().sum() for a, b in zip(changes(own), changes(other))]
        distill = torch.stack(found).sum() / len(student.logits)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
