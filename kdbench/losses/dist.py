"""DIST: correlate with the teacher instead of copying it, along the classes and along the batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import correlation_rows, large, log_probs, real, unlike_rows
from kdbench.types import LossTerms, Outputs, Target


def spread(logits: Tensor, tau: float) -> Tensor:
    """tau (softmax(z/tau) - 1/C) [B, C] without the cancellation of two nearly equal numbers: as correlated, of size
    1."""
    logits = real(logits)
    classes = logits.shape[-1]
    z = (logits - logits.mean(-1, keepdim=True)) / tau
    near = z.abs().amax(-1, keepdim=True) < 1
    growth = torch.where(near, z, 0.0).expm1()
    total = growth.sum(-1, keepdim=True)
    close = (classes * growth - total) / (classes * (classes + total))
    return tau * torch.where(near, close, z.softmax(-1) - 1 / classes)


def relations(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(inter, intra), 0-dim: tau^2 (1 - mean Pearson correlation) of the softmaxes at tau, over a sample's classes
    (inter) and over a class's samples (intra) (Huang et al. 2022, L_inter and L_intra). In [0, 2 tau^2]."""
    if large(tau):
        p, q = spread(teacher, tau), spread(student, tau)
        inter, intra = unlike_rows(q, p), unlike_rows(q.transpose(0, 1), p.transpose(0, 1))
        return tau**2 * inter.mean(), tau**2 * intra.mean()
    p, q = log_probs(teacher, tau).exp(), log_probs(student, tau).exp()
    inter, intra = correlation_rows(q, p), correlation_rows(q.transpose(0, 1), p.transpose(0, 1))
    return tau**2 * (1 - inter.mean()), tau**2 * (1 - intra.mean())


class DIST(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 (inter (1 - corr over classes) + intra (1 - corr over the batch))
    (Huang et al. 2022, L_tr; beta and gamma there).

    Their CIFAR-100: tau 4, weights 1 and 2, inter = intra = 1; ImageNet tau 1. intra depends on the whole batch:
    batches of a few samples make it noise. A class that nobody in the batch predicts counts as uncorrelated.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Huang et al. 2022 (DIST), L_inter and L_intra"

    def __init__(
        self,
        weights: Weights,
        tau: Positive = 4.0,
        inter: NotNegative = 1.0,
        intra: NotNegative = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = tau
        self.inter, self.intra = inter, intra

    @property
    def least_classes(self) -> int:
        return 1 if self.intra else 3  # two probabilities always correlate by +-1 along the classes

    @property
    def formula(self) -> str:
        both = f"tau^2 ({number(self.inter)} (1 - corr_classes) + {number(self.intra)} (1 - corr_batch))"
        text = self.written(task=self.task_text, distill=both)
        return f"{text}, tau = {number(self.tau)}, Pearson's corr of softmax(s/tau) and softmax(t/tau)"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        inter, intra = relations(student.logits, detached(teacher, "dist"), self.tau)
        distill = self.inter * inter + self.intra * intra
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "inter": inter.detach(), "intra": intra.detach()})
