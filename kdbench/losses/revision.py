"""Label revision: a teacher that errs is corrected towards the label, one that does not is copied."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Share
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import class_index, log_probs, mean_over, one_hot, real
from kdbench.types import LossTerms, Outputs, Target


def revised(teacher: Tensor, index: Tensor, eta: float) -> Tensor:
    """b p + (1 - b) y [B, C], p = softmax(t) and b = eta / (max p - p_y + 1): a mixture of the teacher's prediction and
    the labelled class `index` [B] in which the label comes first where the teacher puts another class before it."""
    p = log_probs(teacher).exp()
    share = eta / (p.amax(-1, keepdim=True) - p.gather(-1, index.unsqueeze(-1)) + 1)
    return share * p + (1 - share) * one_hot(index, p.shape[-1], p.dtype)


class Revision(DistillationLoss):
    """weights.task CE(y, s) + weights.distill mean_k (s_k - t_k)^2 over the samples that the teacher gets right, and
    weights.revise mean_k (softmax(s)_k - r_k)^2 over those that it gets wrong (Lan et al. 2024, label revision, in the
    form that Sun et al. 2025 compare with).

    r = b softmax(t) + (1 - b) y with b = eta / (max softmax(t) - softmax(t)_y + 1). Each term is a mean over its own
    samples. Needs one class a sample; unlabelled samples have no part.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "revise")
    needs_one_class = True
    paper: ClassVar[str] = "Lan et al. 2024 (label revision), as in Sun et al. 2025"

    def __init__(self, weights: Weights, eta: Share = 0.8, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.eta = eta

    @property
    def formula(self) -> str:
        right, wrong = "mean_k (s_k - t_k)^2", "mean_k (softmax(s)_k - r_k)^2"
        text = self.written(task=self.task_text, distill=right, revise=wrong)
        share = f"b = {number(self.eta)} / (max p - p_y + 1), p = softmax(t)"
        return f"{text}, the last where t is wrong, the others where it is right, r = b p + (1 - b) y, {share}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t, s = detached(teacher, "revision"), real(student.logits)
        index, labelled = class_index(target.label, "revision")
        right = labelled & (t.argmax(-1) == index)
        copied = (s - t).square().mean(-1)
        corrected = (log_probs(s).exp() - revised(t, index, self.eta)).square().mean(-1)
        return self.combine(
            task=self.task(s, torch.where(right, index, -1)),
            distill=mean_over(copied, right),
            revise=mean_over(corrected, labelled & ~right),
        )
