"""Correlation congruence: neighbours in a batch differ from their teachers in the same directions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kdbench.arguments.ranges import Width
from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


def neighbour_product(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_b <|s_b - t_b|, |s_b+1 - t_b+1|> over neighbouring samples of embeddings [B, D]: 0-dim, 0 for one sample."""
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


class CC(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean_b <|e_s - e_t|_b, |e_s - e_t|_(b+1)>, e: a linear embedding of each
    network's features, both trained with the student (Peng et al. 2019, in the form that the authors gave the field's
    comparisons; weight 0.02, 128 dimensions). Its value depends on the order of the batch, which is random."""

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Peng et al. 2019 (CC), as in RepDistiller"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "pooled",
        dimensions: Width = 128,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.dimensions = dimensions
        self.embed = nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean_b <|e_s - e_t|_b, |e_s - e_t|_(b+1)>")
        return f"{text}, e = learned embeddings of {self.layers_text} in {self.dimensions} dimensions"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        both = self.map(student, teacher)
        self.embed = nn.ModuleList(
            nn.Linear(f.flatten(1).shape[1], self.dimensions, device=student.logits.device) for f in both
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        distill = neighbour_product(self.embed[0](s.flatten(1)), self.embed[1](t.flatten(1)))
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
