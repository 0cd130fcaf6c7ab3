"""Decoupled knowledge distillation: the labelled class and the others, each with its own weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive, Share
from kdbench.losses.base import DistillationLoss, Smoothing, Steps, Weights, detached, number
from kdbench.losses.functional import Ratio, excess, large, largest_class, mean_over, real, split_at, without
from kdbench.types import LossTerms, Outputs, Target


def decoupled_rows(student: Tensor, teacher: Tensor, index: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) a sample, both [B], nats times tau^2 (Zhao et al. 2022, the decoupled KD).

    TCKD: KL of the pair (labelled class, all others together). NCKD: KL within the others, renormalised. KL of the
    whole is TCKD + (1 - p_y) NCKD. index [B] int64: the labelled class.
    """
    t_own, t_rest, t_within = split_at(real(teacher) / tau, index)
    s_own, s_rest, s_within = split_at(real(student) / tau, index)
    tckd = t_own.exp() * (t_own - s_own) + t_rest.exp() * (t_rest - s_rest)
    nckd = (without(t_within.exp(), index) * (t_within - s_within)).sum(-1)
    if large(tau):
        tckd, nckd = _close_rows(student, teacher, index, tau, tckd, nckd)
    return tau**2 * tckd, tau**2 * nckd


def _close_rows(
    student: Tensor, teacher: Tensor, index: Tensor, tau: float, tckd: Tensor, nckd: Tensor
) -> tuple[Tensor, Tensor]:
    """The same pair without cancellation where the logits are close (see `Ratio`), else as they are."""
    own = index.unsqueeze(-1)
    whole = Ratio.of(student, teacher, tau)
    p_own, r_own = whole.p.gather(-1, own).squeeze(-1), whole.log.gather(-1, own).squeeze(-1)
    p_rest = without(whole.p, index).sum(-1)
    near = whole.near.squeeze(-1) & (p_rest > 0.1)  # a sure teacher's digits are in the logarithms
    r_rest = torch.where(near, -p_own / p_rest.clamp_min(0.1) * r_own.expm1(), 0.0).clamp_min(-0.9).log1p()
    near = near & (r_rest.abs() < 1)
    pair = p_own * excess(r_own) + p_rest * excess(r_rest.clamp(-1, 1))
    others = torch.ones_like(whole.p, dtype=torch.bool).scatter(-1, own, False)
    return torch.where(near, pair, tckd), Ratio.of(student, teacher, tau, others).kl(nckd)


def warmup_text(warmup: float) -> str:
    """How `formula` says that the distillation term starts from 0."""
    return f", r rises from 0 to 1 over the first {number(warmup)} of the training" if warmup else ""


class DKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill r tau^2 (tckd TCKD + nckd NCKD) (Zhao et al. 2022, decoupled KL; alpha
    and beta there).

    r rises linearly from 0 to 1 over the first `warmup` of the training (the authors: 20 of 240 epochs). They tune
    `nckd` for each pair of networks: 8, 6 or 2 on CIFAR-100. Averaged over labelled samples;
    of a mixed label the class with the larger share counts, as in the code of OFA-KD (Hao et al. 2023).
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zhao et al. 2022, decoupled KL"

    def __init__(
        self,
        weights: Weights,
        tau: Positive = 4.0,
        tckd: NotNegative = 1.0,
        nckd: NotNegative = 8.0,
        warmup: Share = 20 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.tau = tau
        self.tckd, self.nckd = tckd, nckd
        self.warmup = warmup

    @property
    def least_classes(self) -> int:
        return 1 if self.tckd else 3  # of two classes, one is all the others

    @property
    def formula(self) -> str:
        both = f"{'r ' if self.warmup else ''}tau^2 ({number(self.tckd)} TCKD + {number(self.nckd)} NCKD)"
        return f"{self.written(task=self.task_text, distill=both)}, tau = {number(self.tau)}{warmup_text(self.warmup)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        index, labelled = largest_class(target.label)
        rows = decoupled_rows(student.logits, detached(teacher, "dkd"), index, self.tau)
        tckd, nckd = (mean_over(row, labelled) for row in rows)
        distill = self.risen(target.progress, self.warmup) * (self.tckd * tckd + self.nckd * nckd)
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "tckd": tckd.detach(), "nckd": nckd.detach()})
