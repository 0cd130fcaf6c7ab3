"""DeepKD's loss: the labelled class and the others as two terms of their own, the latter through a growing mask."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import Share
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Steps, Weights, detached, number
from kdbench.losses.dkd import decoupled_rows, warmup_text
from kdbench.losses.functional import among_rows, class_index, log_probs, mean_over
from kdbench.types import LossTerms, Outputs, Target


def ranks(logits: Tensor) -> Tensor:
    """The place of each class [B, C] in its row, 0 for the largest logit."""
    return logits.argsort(-1, descending=True).argsort(-1)


class DeepKD(DistillationLoss):
    """weights.task CE(y, s) + r (weights.tckd TCKD + weights.nckd NCKD), with the terms of `DKD` at `tau` (Huang et al.
    2025, DeepKD). Its three gradients have a momentum each under `optimizer=deepkd`; any other optimizer adds them up.

    NCKD is among those classes, the labelled one left out, that are with the teacher's K likeliest: K rises from the
    share `first` of the classes at the start of the training to `last` at its end (the paper's dynamic mask grows from
    a few classes to all; the authors' code has a constant K, first = last). 1: all classes. `coupled`: NCKD of a sample
    counts 1 - p_y, so that TCKD + NCKD is the KL of loss=kl. r rises from 0 to 1 over the first `warmup` of the
    training. Needs one class a sample; averaged over labelled samples.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "tckd", "nckd")
    needs_one_class = True
    paper: ClassVar[str] = "Huang et al. 2025 (DeepKD)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 4.0,
        first: Share = 0.05,
        last: Share = 1.0,
        coupled: bool = False,
        warmup: Share = 20 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.tau, self.first, self.last = tau, first, last
        self.coupled, self.warmup = coupled, warmup

    @property
    def formula(self) -> str:
        r = "r " if self.warmup else ""
        nckd = f"{r}{'(1 - p_y) ' if self.coupled else ''}tau^2 NCKD(t/tau, s/tau)"
        text = self.written(task=self.task_text, tckd=f"{r}tau^2 TCKD(t/tau, s/tau)", nckd=nckd)
        mask = f"NCKD among the teacher's likeliest classes, {number(self.first)} to {number(self.last)} of all"
        return f"{text}, {mask}, tau = {number(self.tau)}{warmup_text(self.warmup)}"

    def kept(self, teacher: Tensor, index: Tensor, progress: Tensor) -> Tensor:
        """The classes that NCKD compares [B, C] bool."""
        share = self.first + (self.last - self.first) * progress
        count = (share * teacher.shape[-1]).round().clamp_min(1)
        return (ranks(teacher) < count).scatter(-1, index.unsqueeze(-1), False)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "deepkd")
        index, labelled = class_index(target.label, "deepkd")
        tckd, nckd = decoupled_rows(student.logits, t, index, self.tau)
        if self.first < 1 or self.last < 1:
            nckd = among_rows(student.logits, t, self.kept(t, index, target.progress), self.tau)
        if self.coupled:
            nckd = (1 - log_probs(t, self.tau).exp().gather(-1, index.unsqueeze(-1)).squeeze(-1)) * nckd
        risen = self.risen(target.progress, self.warmup)
        return self.combine(
            task=self.task(student.logits, target.label),
            tckd=risen * mean_over(tckd, labelled),
            nckd=risen * mean_over(nckd, labelled),
        )
