"""Norm and direction: a large feature that points to where the teacher has its class."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Dropout
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import Seen, Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss
from kdbench.losses.functional import class_index, mean_over, one_hot, real
from kdbench.types import LossTerms, Outputs, Target


def direction_rows(student: Tensor, teacher: Tensor, centre: Tensor) -> Tensor:
    """1 - <s, c / |c|> / max(|s|, |t|) a sample [B] of features and their classes' centres [B, D] (Wang et al. 2023,
    the ND loss); 1 where all is 0."""
    longer = torch.maximum(_length(student), _length(teacher))
    return 1 - (student * F.normalize(centre)).sum(1) / longer.clamp_min(1e-12)


def _length(rows: Tensor) -> Tensor:
    """With a gradient of 0 at 0."""
    squares = rows.square().sum(1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


class ND(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean (1 - <e(f_s), c_y / |c_y|> / max(|e(f_s)|, |f_t|)), f the feature
    that the classifier reads, c_y the teacher's mean of f over the training images of class y (Wang et al. 2023, KD++,
    the ND loss).

    e: batch norm, dropout and a linear layer where the features differ in width, else nothing. KD++ is this beside a KL
    at tau 4 (loss=sum); as published the weight is 2 for resnet56 -> resnet20, and 0.5 to 2 for other pairs. The
    centres cost a pass of the teacher over the training set. Needs one class a sample; mean over labelled samples.
    """

    means: Tensor
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Wang et al. 2023 (KD++), the ND loss"

    def __init__(self, weights: Weights, dropout: Dropout = 0.5, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, ["pooled"], label_smoothing)
        self.dropout = dropout
        self.embed: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean (1 - <e(f_s), c_y / |c_y|> / max(|e(f_s)|, |f_t|))")
        kind = f"e learned with dropout {number(self.dropout)} where widths differ"
        return f"{text}, f = pooled, c = the teacher's means of f by class, {kind}"

    @property
    def surveyed(self) -> str:
        return "pooled"

    def survey(self, seen: Seen) -> None:
        """The mean of each class; 0 for one without images."""
        classes = len(self.means)
        total, count = torch.zeros(()), torch.zeros(classes, device=self.means.device)
        for values, label in seen:
            rows = real(values).flatten(1)
            chosen = one_hot(label, classes, rows.dtype)
            total = chosen.T @ rows + total.to(chosen.device)
            count = count + chosen.sum(0)
        self.means.copy_(total / count.clamp_min(1)[:, None])

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        own, width = s.shape[1], t.shape[1]
        linear = nn.Linear(own, width)
        nn.init.zeros_(linear.bias)
        embed = nn.Sequential(BatchNorm(own), nn.Dropout(self.dropout), linear)
        self.embed = (nn.Identity() if own == width else embed).to(student.logits.device)
        self.register_buffer("means", torch.zeros(student.logits.shape[1], width, device=student.logits.device))

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        index, labelled = class_index(target.label, "nd")
        distill = mean_over(direction_rows(self.embed(s), t, self.means[index]), labelled)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
