"""PolyLoss: cross-entropy as a series in 1 - p, with its first coefficients changed."""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from kdbench.arguments.ranges import Finite, listed
from kdbench.errors import require
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, number
from kdbench.losses.functional import distribution, log_probs, mean_over
from kdbench.types import LossTerms, Outputs, Target


def polynomial_rows(student: Tensor, label: Tensor, epsilon: list[float]) -> Tensor:
    """sum_k y_k (-log p_k + sum_j epsilon_j (1 - p_k)^j) a sample [B], p = softmax(s); label [B, C] distribution.

    -log p = sum_j (1 - p)^j / j, so epsilon_j is added to the coefficient 1/j (Leng et al. 2022, Poly-N).
    """
    log_p = log_probs(student)
    miss = -log_p.expm1()  # 1 - p without cancellation
    rows = -log_p
    power = miss
    for j, coefficient in enumerate(epsilon):
        power = miss if j == 0 else power * miss
        rows = rows + coefficient * power
    return (label * rows).sum(-1)


class PolyN(DistillationLoss):
    """weights.task (CE(y, s) + sum_j epsilon_j (1 - p_y)^j), p = softmax(s), on labels alone (Leng et al. 2022,
    Poly-N).

    `epsilon`: one number (Poly-1, `loss=poly1`) or a list, each >= -1/j so that no coefficient turns negative.
    """

    uses_teacher: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task",)
    paper: ClassVar[str] = "Leng et al. 2022 (PolyLoss), Poly-N and Poly-1"

    def __init__(
        self,
        weights: Weights,
        epsilon: Finite | Annotated[list[Finite], listed(1)] = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.epsilon = [float(value) for value in (epsilon if isinstance(epsilon, list) else [epsilon])]
        for j, value in enumerate(self.epsilon):
            key = f"epsilon[{j}]" if isinstance(epsilon, list) else "epsilon"
            allowed = f"at least -1/{j + 1}, or the coefficient of (1 - p)^{j + 1} turns negative"
            require(value >= -1 / (j + 1), key, value, allowed)

    @property
    def formula(self) -> str:
        extra = " + ".join(f"{number(e)} (1 - p_y)^{j + 1}" for j, e in enumerate(self.epsilon))
        return self.written(task=f"({self.task_text} + {extra})") + ", p = softmax(s)"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        label, labelled = distribution(target.label, student.logits, self.label_smoothing)
        return self.combine(task=mean_over(polynomial_rows(student.logits, label, self.epsilon), labelled))
