"""Logit standardisation: the student matches the shape of the teacher's logits, not their mean and spread."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive, Share
from kdbench.losses.base import DistillationLoss, Smoothing, Steps, Weights, detached, number
from kdbench.losses.dkd import decoupled_rows, warmup_text
from kdbench.losses.functional import class_index, mean_over, standardize, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


class LogitStd(DistillationLoss):
    """weights.task CE(y, s) + weights.distill D(Z(t)/tau, Z(s)/tau), Z(z) = (z - mean z) / std z a sample (Sun et al.
    2024).

    `base`: D is tau^2 KL (kl), or r tau^2 (tckd TCKD + nckd NCKD) (dkd, see `DKD`; needs one class a sample). `tau` > 0
    is the paper's base temperature, 2. The authors: weights.distill 9 with both bases, weights.task 0.1 with kl and 1
    with dkd (`loss=logit_std_dkd`). `tckd`, `nckd` and `warmup` only act with dkd.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Sun et al. 2024, Z-score"

    def __init__(
        self,
        weights: Weights,
        base: Literal["kl", "dkd"] = "kl",
        tau: Positive = 2.0,
        tckd: NotNegative = 1.0,
        nckd: NotNegative = 8.0,
        warmup: Share = 20 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.base = base
        self.tau = tau
        self.tckd, self.nckd = tckd, nckd
        self.warmup = warmup if self.base == "dkd" else 0.0

    @property
    def needs_one_class(self) -> bool:  # type: ignore[override]
        return self.base == "dkd"

    @property
    def least_classes(self) -> int:
        return 3  # two standardised logits are always +-0.707

    @property
    def formula(self) -> str:
        distill = "tau^2 KL(Z(t)/tau || Z(s)/tau)"
        if self.base == "dkd":
            both = f"{number(self.tckd)} TCKD + {number(self.nckd)} NCKD"
            distill = f"{'r ' if self.warmup else ''}tau^2 ({both})(Z(t)/tau, Z(s)/tau)"
        text = self.written(task=self.task_text, distill=distill)
        return f"{text}, tau = {number(self.tau)}, Z(z) = (z - mean z) / std z{warmup_text(self.warmup)}"

    def distill(self, student: Tensor, teacher: Tensor, target: Target) -> Tensor:
        """The teacher's term, 0-dim, from standardised logits."""
        if self.base == "kl":
            return tempered_kl_rows(student, teacher, self.tau).mean()
        index, labelled = class_index(target.label, "logit_std with loss.base=dkd")
        tckd, nckd = decoupled_rows(student, teacher, index, self.tau)
        return self.risen(target.progress, self.warmup) * mean_over(self.tckd * tckd + self.nckd * nckd, labelled)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = standardize(detached(teacher, "logit_std"))
        distill = self.distill(standardize(student.logits), t, target)
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
