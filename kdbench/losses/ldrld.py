"""Local dense relations: every pair of the student's likeliest classes is compared by itself, and the rest together."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import NotNegative, within
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.functional import among_rows, kl_rows, log_probs, real
from kdbench.types import LossTerms, Outputs, Target


def pair_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of two classes alone, from the differences of their logits [...]; finite for every difference."""
    p = teacher.sigmoid()
    own, other = (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student) for sign in (1, -1))
    return p * own + (1 - p) * other


def decayed(first: Tensor, second: Tensor, decay: float) -> Tensor:
    """2 exp(-decay (i + j)) / (1.5 + |i - j|): what the pair of the classes ranked i and j (from 1) counts for (Xu et
    al. 2025, adaptive decay weight)."""
    return 2 / (1.5 + (first - second).abs()) * (-decay * (first + second)).exp()


class LDRLD(DistillationLoss):
    """weights.task CE(y, s) + weights.local L + weights.rest R (Xu et al. 2025, LDRLD).

    L, over the `k` classes that the student finds likeliest: tau^2 KL(t/tau || s/tau) of every pair of them alone, with
    the weight 2 exp(-decay (i + j)) / (1.5 + |i - j|) of their ranks, and of all k together with weight 1, divided by
    the number of these. R: the same KL among all other classes. With k classes or fewer there is no R.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "local", "rest")
    paper: ClassVar[str] = "Xu et al. 2025 (LDRLD)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 4.0,
        k: Annotated[int, within(3, 100)] = 7,
        decay: NotNegative = 0.05,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.k, self.decay = tau, k, decay

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, local="L", rest="R")
        local = f"L = tau^2 mean of w_ij KL(t/tau || s/tau) over pairs of the {self.k} likeliest classes and KL of all"
        weight = f"w_ij = 2 exp(-{number(self.decay)} (i + j)) / (1.5 + |i - j|)"
        return f"{text}, {local}, {weight}, R = tau^2 KL of the other classes, tau = {number(self.tau)}"

    def local(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L a sample [B], from the logits [B, k] of the likeliest classes in their order."""
        rank = torch.arange(1, student.shape[-1] + 1, dtype=student.dtype, device=student.device)
        weight = decayed(rank.unsqueeze(-1), rank, self.decay).triu(1)  # each pair once
        gap_s, gap_t = ((z.unsqueeze(-1) - z.unsqueeze(-2)) / self.tau for z in (student, teacher))
        whole = kl_rows(log_probs(teacher, self.tau), log_probs(student, self.tau))
        pairs = len(rank) * (len(rank) - 1) // 2
        return self.tau**2 * ((weight * pair_rows(gap_s, gap_t)).sum((-1, -2)) + whole) / (pairs + 1)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t, s = detached(teacher, "ldrld"), real(student.logits)
        likeliest = s.detach().topk(min(self.k, s.shape[-1]), -1).indices
        local = self.local(s.gather(-1, likeliest), t.gather(-1, likeliest)).mean()
        others = torch.ones_like(s, dtype=torch.bool).scatter(-1, likeliest, False)
        rest = among_rows(s, t, others, self.tau).mean()
        return self.combine(task=self.task(s, target.label), local=local, rest=rest)
