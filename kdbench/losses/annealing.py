"""Annealing-KD: regress the teacher's logits as they grow from a fraction to full size, then train on labels alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdbench.arguments.ranges import Count, Share
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import real
from kdbench.types import LossTerms, Outputs, Target


def annealing_factor(progress: Tensor, switch: float, steps: int) -> Tensor:
    """Phi = 1 - (T - 1) / steps, T = steps, steps - 1, ..., 1 in equal parts of the first `switch` of the training
    (0-dim); Phi = 1 from there on. Phi starts at 1/steps."""
    stage = (progress / max(switch, 1e-12) * steps).floor().clamp(0, steps - 1)  # 0, 1, ..., steps - 1
    return (stage + 1) / steps


class Annealing(DistillationLoss):
    """First phase (the first `switch` of the training): weights.distill |s - Phi(T) t|^2, Phi(T) = 1 - (T - 1)/tau_max,
    T falling from tau_max to 1; second phase: weights.task CE(y, s) (Jafari et al. 2021, L_KD^Annealing, then L_CE).

    The two terms are never on together; outside of its phase a term's curve is 0. `reduction`: mean or sum over
    classes. The authors on CIFAR: tau_max 10, half of the training in each phase, learning rates of their own for each.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Jafari et al. 2021 (Annealing-KD)"

    def __init__(
        self,
        weights: Weights,
        tau_max: Count = 10,
        switch: Share = 0.5,
        reduction: Literal["mean", "sum"] = "mean",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau_max = tau_max
        self.switch = switch
        self.reduction = reduction

    @property
    def formula(self) -> str:
        error = f"{self.reduction}_k (s_k - Phi t_k)^2"
        first = f"until {number(self.switch)} of the training {number(self.weights.get('distill', 1.0))} {error}"
        second = f"then {number(self.weights.get('task', 1.0))} {self.task_text}"
        return f"{first}, {second}; Phi = 1 - (T - 1) / {self.tau_max}, T = {self.tau_max} down to 1"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "annealing")
        squared = (real(student.logits) - annealing_factor(target.progress, self.switch, self.tau_max) * t).square()
        error = (squared.mean(-1) if self.reduction == "mean" else squared.sum(-1)).mean()
        first = (target.progress < self.switch).to(error.dtype)
        return self.combine(task=(1 - first) * self.task(student.logits, target.label), distill=first * error)
