"""Teacher-free distillation from a virtual teacher that is always right."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Inside, Positive
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, number
from kdbench.losses.functional import distribution, kl_rows, log_probs, mean_over
from kdbench.types import LossTerms, Outputs, Target


def virtual_log_probs(label: Tensor, correct: float, tau: float) -> Tensor:
    """log softmax(p / tau) [B, C], p = `correct` on the label's class and the rest spread evenly; label [B, C]
    distribution.

    For mixed labels the virtual teachers of the classes are mixed likewise.
    """
    classes = label.shape[-1]
    p = label * correct + (1 - label) * (1 - correct) / max(classes - 1, 1)
    return torch.log_softmax(p / tau, dim=-1)


class TfKDVirtual(DistillationLoss):
    """weights.task CE(y, s) + weights.distill KL(softmax(p/tau) || softmax(s)), p = `correct` at the label, (1 -
    correct)/(C - 1) elsewhere (Yuan et al. 2020, Tf-KD_reg, the manually designed teacher).

    As the authors' code has it: the probabilities p, not their logarithms, are what tau divides, and the student keeps
    temperature 1; the target is nearly uniform. Their KL is averaged over classes too: their `multiplier` / C is our
    weight. Needs no teacher. Averaged over labelled samples.
    """

    uses_teacher: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Yuan et al. 2020, Tf-KD_reg"

    def __init__(
        self, weights: Weights, tau: Positive = 20.0, correct: Inside = 0.99, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.correct = tau, correct

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="KL(softmax(p/tau) || s)")
        return f"{text}, tau = {number(self.tau)}, p = {number(self.correct)} at y, the rest spread evenly"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        label, labelled = distribution(target.label, student.logits)
        rows = kl_rows(virtual_log_probs(label, self.correct, self.tau), log_probs(student.logits))
        return self.combine(task=self.task(student.logits, target.label), distill=mean_over(rows, labelled))
