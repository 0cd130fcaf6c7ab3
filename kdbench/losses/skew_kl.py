"""KL with a mixture in the second place, so that no class of it has probability 0 and no gradient is huge."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdbench.arguments.ranges import Inside
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.functional import kl_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


def skew_rows(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q) a sample [B] nats from log-probabilities [B, C] (Ko et al. 2024, skew KL): at most
    -log skew."""
    return kl_rows(log_p, torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew)))


class SkewKL(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(p || a p + (1 - a) q), p = softmax(t/tau), q = softmax(s/tau),
    a = `skew`; with `reverse` KL(q || a q + (1 - a) p) (Ko et al. 2024 "DistiLLM", skew KL and skew reverse KL).

    a -> 0 is KL, forward (`loss=kl`) or reverse (`loss=kl_reverse`). The authors: a = 0.1, tau = 1, no labels; their
    code leaves out the teacher's entropy, which has no gradient. `tau` in (0, 32].
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Ko et al. 2024 (DistiLLM), skew KL"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 1.0,
        skew: Inside = 0.1,
        direction: Literal["forward", "reverse"] = "forward",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.skew, self.direction = tau, skew, direction

    @property
    def formula(self) -> str:
        p, q = ("t/tau", "s/tau") if self.direction == "forward" else ("s/tau", "t/tau")
        text = self.written(task=self.task_text, distill=f"tau^2 KL({p} || a {p} + (1 - a) {q})")
        return f"{text}, probabilities mixed, a = {number(self.skew)}, tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        log_t, log_s = log_probs(detached(teacher, "skew_kl"), self.tau), log_probs(student.logits, self.tau)
        rows = skew_rows(log_t, log_s, self.skew) if self.direction == "forward" else skew_rows(log_s, log_t, self.skew)
        return self.combine(task=self.task(student.logits, target.label), distill=self.tau**2 * rows.mean())
