"""Regression on the teacher's logits."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached
from kdbench.losses.functional import real, standardize
from kdbench.types import LossTerms, Outputs, Target


def centred(logits: Tensor, center: str) -> Tensor:
    """Logits as they are (none), minus their mean a sample (zero_mean), or divided by their spread too
    (standardize)."""
    if center == "standardize":
        return standardize(logits)
    logits = real(logits)
    return logits - logits.mean(-1, keepdim=True) if center == "zero_mean" else logits


def regression_rows(student: Tensor, teacher: Tensor, reduction: str, center: str, kind: str) -> Tensor:
    """Squared or smooth-L1 error of the logits [B, C], mean or sum over the classes: [B].

    smooth_l1 (Girshick 2015, smooth L1): d^2 / 2 where |d| < 1, else |d| - 1/2.
    """
    d = centred(student, center) - centred(teacher, center)
    if kind == "smooth_l1":
        # Quadratic and linear piece added up without a branch: min(|d|, 1) carries the gradient of the first.
        near = d.abs().clamp_max(1.0)
        error = near * (d.abs() - near / 2)
    else:
        error = d.square()
    return torch.mean(error, -1) if reduction == "mean" else torch.sum(error, -1)


class MSE(DistillationLoss):
    """weights.task CE(y, s) + weights.distill (1/C) sum_k (s_k - t_k)^2, mean over the batch.

    Ba and Caruana 2014, regression on logits: sum over the classes with weights.distill 1/2 (`loss=ba_caruana`); Kim et
    al. 2021, L_MSE: mean over classes (`loss=kim_mse`). A sum is C times a mean: mind the learning rate. `center`:
    none; zero_mean of every sample's logits (Hinton's condition for KL's limit: with reduction=mean this is twice the
    loss at tau=inf); standardize (mean 0, deviation 1). `kind`: squared or smooth_l1. No temperature.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Ba and Caruana 2014, regression on logits; Kim et al. 2021, L_MSE"

    def __init__(
        self,
        weights: Weights,
        reduction: Literal["mean", "sum"] = "mean",
        center: Literal["none", "zero_mean", "standardize"] = "none",
        kind: Literal["squared", "smooth_l1"] = "squared",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.reduction = reduction
        self.center = center
        self.kind = kind

    @property
    def least_classes(self) -> int:
        return 3 if self.center == "standardize" else 1  # two standardised logits are always +-0.707

    @property
    def formula(self) -> str:
        error = "(s_k - t_k)^2" if self.kind == "squared" else "smooth_l1(s_k - t_k)"
        notes = {"none": "", "zero_mean": ", logits minus their mean", "standardize": ", logits (z - mean) / std"}
        text = self.written(task=self.task_text, distill=f"{self.reduction}_k {error}")
        return text + notes[self.center]

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        rows = regression_rows(student.logits, detached(teacher, "mse"), self.reduction, self.center, self.kind)
        return self.combine(task=self.task(student.logits, target.label), distill=rows.mean())
