"""The distillation token: the student's second head learns from the teacher, the first from the labels."""

from __future__ import annotations

from typing import ClassVar, Literal

from kdbench.arguments.ranges import Positive
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number, task_cross_entropy
from kdbench.losses.features import student_maps
from kdbench.losses.functional import tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


class DeiT(DistillationLoss):
    """weights.task CE(y, s) + weights.distill D(t, d), s and d the logits of the student's class token and distillation
    token (Touvron et al. 2021, DeiT, hard label and token: both weights 1/2).

    `kind`: D is CE(argmax t, d) (hard), or tau^2 KL(t/tau || d/tau) (soft; their code takes a mean over the classes,
    too: C times smaller). The student needs the features "head" and "head_dist" (a network of timm with
    `distilled: true`, kdbench/models/distillation_token.py); its own logits, by which it is evaluated, are their mean.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Touvron et al. 2021 (DeiT), hard label and token"

    def __init__(
        self,
        weights: Weights,
        kind: Literal["hard", "soft"] = "hard",
        tau: Positive = 3.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.kind, self.tau = kind, tau

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for a student without a distillation token."""
        if not set(self.student_needs) <= set(student.features):
            hint = "any ViT of timm has one with +student.options.distilled=true"
            raise UserError(f"loss=deit needs a student with a distillation token: {hint}")

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ("head", "head_dist")

    @property
    def formula(self) -> str:
        soft = f"tau^2 KL(t/tau || d/tau), tau = {number(self.tau)}"
        text = self.written(task=self.task_text, distill="CE(argmax t, d)" if self.kind == "hard" else soft)
        return f"{text}, s and d the logits of the class token and of the distillation token"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "deit")
        own, other = student_maps(student, self.student_needs)
        if self.kind == "hard":
            distill = task_cross_entropy(other, t.argmax(-1))
        else:
            distill = tempered_kl_rows(other, t, self.tau).mean()
        return self.combine(task=self.task(own, target.label), distill=distill)
