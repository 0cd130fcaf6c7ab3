"""Born-Again Networks' first control: how sure the teacher is, without what it says."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached
from kdbench.losses.functional import distribution, log_probs
from kdbench.types import LossTerms, Outputs, Target


def confidence_weights(teacher: Tensor, counted: Tensor) -> Tensor:
    """w_b = max_k p_b / sum_u max_k p_u over the samples counted [B] bool: [B], sums to 1; 0 where not counted."""
    confidence = torch.where(counted, log_probs(teacher).amax(-1).exp(), 0.0)
    return confidence / confidence.sum().clamp_min(1e-12)


class CWTM(DistillationLoss):
    """weights.distill sum_b w_b CE(y_b, s_b), w_b = max_k p_b / sum_u max_k p_u, p = softmax(t) (Furlanello et al.
    2018, "confidence weighted by teacher max").

    The weight is the teacher's confidence, right or wrong; a constant confidence gives the plain cross-entropy. Samples
    without a label are left out of both sums.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Furlanello et al. 2018 (BAN), CWTM"

    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)

    @property
    def formula(self) -> str:
        weighted = f"sum_b w_b {self.task_text}_b"
        return self.written(task=self.task_text, distill=weighted) + ", w_b = max p_b / sum_u max p_u, p = softmax(t)"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        logits = student.logits
        label, labelled = distribution(target.label, logits, self.label_smoothing)
        rows = -(label * log_probs(logits)).sum(-1)
        distill = (confidence_weights(detached(teacher, "cwtm"), labelled) * rows).sum()
        return self.combine(task=self.task(logits, target.label), distill=distill)
