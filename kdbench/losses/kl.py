"""Hinton's distillation, with both of its limits in the temperature as losses of their own."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from kdbench.arguments.ranges import Range
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import kl_rows, log_probs, real, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


def temperature(value: float | str) -> float:
    """The number that a temperature stands for: the text "inf" or ".inf" counts as infinity; NaN if it is no number."""
    text = str(value).strip().lower()
    try:
        return math.inf if text in ("inf", ".inf", "+.inf") else float(text)
    except ValueError:
        return math.nan


# A temperature, or 0 or inf for the losses that are its limits.
Temperature = Annotated[float | str, Range("a number > 0, or 0 or inf for the limits", lambda v: temperature(v) >= 0)]


def logit_matching_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """The limit of tau^2 KL(t/tau || s/tau) for tau -> inf, a sample [B] (Hinton et al. 2015, high-temperature limit;
    Kim et al. 2021, the limit tau -> inf).

    With d = s - t: |d|^2 / (2C) - (sum d)^2 / (2C^2) = |d - mean d|^2 / (2C), of which the second is computed; its
    gradient is (d - mean d) / C. Adding a constant to a sample's logits changes nothing, unlike a squared error.
    """
    d = real(student) - real(teacher)
    return (d - d.mean(-1, keepdim=True)).square().mean(-1) / 2


def label_matching_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """The limit of tau^2 KL / tau for tau -> 0, a sample [B] (Kim et al. 2021, the limit tau -> 0): max_k s_k -
    s_[argmax t].

    tau^2 KL itself vanishes with tau, so the limit is taken of (1/tau) times it: the losses of small tau shrink like
    tau, this one does not. Its gradient is the indicator of argmax s minus the indicator of argmax t; 0 on agreement.
    """
    student = real(student)
    return student.amax(-1) - student.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)


class KL(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(softmax(t/tau) || softmax(s/tau)), summed over classes, mean
    over the batch (Hinton et al. 2015, section 2; Kim et al. 2021, L_KL).

    `tau` > 0, or a limit: inf matches logits up to a constant, 0 matches the teacher's label (see the functions above;
    the limit at 0 has another factor of tau in front than the losses near it). `scale`: tau2 multiplies by tau^2, so
    that the gradient keeps its size as tau changes; none does not, and has no limits. Born-Again Networks are this loss
    at tau = 1: their CE(t, s) differs from KL(t || s) by a constant.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = (
        "Hinton et al. 2015, section 2; limits: Kim et al. 2021; at tau = 1: Furlanello et al. 2018 (BAN)"
    )

    def __init__(
        self,
        weights: Weights,
        tau: Temperature = 4.0,
        scale: Literal["tau2", "none"] = "tau2",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau = temperature(tau)
        self.scale = scale
        if self.scale == "none" and self.tau in (0.0, math.inf):
            allowed = f"tau2 with tau={number(self.tau)}: without the factor the loss has no limit there"
            raise UserError("scale", scale, allowed)

    @property
    def formula(self) -> str:
        if self.tau == math.inf:
            return self.written(task=self.task_text, distill="|d - mean d|^2 / (2C)") + ", d = s - t (tau = inf)"
        if self.tau == 0.0:
            return self.written(task=self.task_text, distill="(max_k s_k - s_[argmax t])") + " (tau = 0)"
        factor = "tau^2 " if self.scale == "tau2" else ""
        return self.written(task=self.task_text, distill=f"{factor}KL(t/tau || s/tau)") + f", tau = {number(self.tau)}"

    def distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's term a sample [B], in nats."""
        if self.tau == math.inf:
            return logit_matching_rows(student, teacher)
        if self.tau == 0.0:
            return label_matching_rows(student, teacher)
        if self.scale == "none":
            return kl_rows(log_probs(teacher, self.tau), log_probs(student, self.tau))
        return tempered_kl_rows(student, teacher, self.tau)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        distill = self.distances(student.logits, detached(teacher, "kl")).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
