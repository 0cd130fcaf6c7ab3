"""DIST: correlate with the teacher instead of copying it, along the classes and along the batch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import correlation_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


def relations(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(inter, intra), 0-dim: tau^2 (1 - mean Pearson correlation) of the softmaxes at tau, over a sample's classes
    (inter) and over a class's samples (intra) (Huang et al. 2022, L_inter and L_intra). In [0, 2 tau^2]."""
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
    def formula(self) -> str:
        both = f"tau^2 ({number(self.inter)} (1 - corr_classes) + {number(self.intra)} (1 - corr_batch))"
        text = self.written(task=self.task_text, distill=both)
        return f"{text}, tau = {number(self.tau)}, Pearson's corr of softmax(s/tau) and softmax(t/tau)"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        inter, intra = relations(student.logits, detached(teacher, "dist"), self.tau)
        distill = self.inter * inter + self.intra * intra
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "inter": inter.detach(), "intra": intra.detach()})
