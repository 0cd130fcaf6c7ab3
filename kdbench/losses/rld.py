"""Refined logits: the teacher's certainty and order of classes, without what it says against the label."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Share
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Steps, Weights, detached, number
from kdbench.losses.dkd import warmup_text
from kdbench.losses.functional import among_rows, class_index, mean_over, real, split_at
from kdbench.types import LossTerms, Outputs, Target


def confidence_rows(student: Tensor, teacher: Tensor, index: Tensor, tau: float) -> Tensor:
    """tau^2 KL of two pairs [B]: (the teacher's highest class, all others) || (the student's labelled class, all
    others) (Sun et al. 2025, sample confidence distillation). The teacher is as sure of the label as it is of its own
    answer. index [B] int64: the labelled class."""
    t_own, t_rest, _ = split_at(real(teacher) / tau, teacher.argmax(-1))
    s_own, s_rest, _ = split_at(real(student) / tau, index)
    return tau**2 * (t_own.exp() * (t_own - s_own) + t_rest.exp() * (t_rest - s_rest))


def correlation_rows(student: Tensor, teacher: Tensor, index: Tensor, tau: float) -> Tensor:
    """tau^2 KL within the classes that the teacher puts below the labelled one [B]; 0 where there are none (Sun et al.
    2025, masked correlation distillation)."""
    return among_rows(student, teacher, teacher < teacher.gather(-1, index.unsqueeze(-1)), tau)


class RLD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill r (scd SCD + mcd MCD) (Sun et al. 2025, RLD; alpha and beta there).

    SCD at `tau_scd` compares how sure the networks are, MCD at `tau` the classes that the teacher ranks below the
    labelled one. r rises linearly from 0 to 1 over the first `warmup` of the training (the authors: 20 of 240 epochs).
    Needs one class a sample; averaged over labelled samples.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Sun et al. 2025 (RLD)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 4.0,
        tau_scd: Moderate = 1.0,
        scd: NotNegative = 1.0,
        mcd: NotNegative = 8.0,
        warmup: Share = 20 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.tau, self.tau_scd = tau, tau_scd
        self.scd, self.mcd = scd, mcd
        self.warmup = warmup

    @property
    def least_classes(self) -> int:
        return 1 if self.scd else 3  # of two classes, one at most is below the labelled one

    @property
    def formula(self) -> str:
        both = f"{'r ' if self.warmup else ''}({number(self.scd)} SCD + {number(self.mcd)} MCD)"
        kept = "SCD = tau_scd^2 KL((max t, rest) || (s_y, rest)), MCD = tau^2 KL(t || s) of classes with t_k < t_y"
        taus = f"tau_scd = {number(self.tau_scd)}, tau = {number(self.tau)}"
        return f"{self.written(task=self.task_text, distill=both)}, {kept}, {taus}{warmup_text(self.warmup)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "rld")
        index, labelled = class_index(target.label, "rld")
        scd = mean_over(confidence_rows(student.logits, t, index, self.tau_scd), labelled)
        mcd = mean_over(correlation_rows(student.logits, t, index, self.tau), labelled)
        distill = self.risen(target.progress, self.warmup) * (self.scd * scd + self.mcd * mcd)
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "scd": scd.detach(), "mcd": mcd.detach()})
