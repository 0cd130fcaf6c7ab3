"""SemCKD: every stage of the student learns from all of the teacher's, as far as they see the batch alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, Positive
from kdbench.errors import require
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target


class Projection(nn.Sequential):
    """1x1, 3x3 and 1x1 convolution to another number of channels, twice as wide in the middle."""

    def __init__(self, inputs: int, outputs: int) -> None:
        middle = 2 * outputs
        super().__init__(
            nn.Conv2d(inputs, middle, 1, bias=False), BatchNorm(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False), BatchNorm(middle), nn.ReLU(),
            nn.Conv2d(middle, outputs, 1, bias=False),
        )  # fmt: skip


class Embedding(nn.Module):
    """How a stage sees the batch [B, B], a row for each sample, as vectors of length 1 [B, D]. Of a smaller batch the
    missing columns count as 0."""

    def __init__(self, batch: int, factor: int) -> None:
        super().__init__()
        outputs = max(1, batch // factor)
        self.first, self.second = nn.Linear(batch, 2 * outputs), nn.Linear(2 * outputs, outputs)

    def forward(self, stage: Tensor) -> Tensor:
        rows = stage.flatten(1)
        alike = F.pad(rows @ rows.T, (0, self.first.in_features - len(rows)))
        return F.normalize(self.second(F.relu(self.first(alike))))


class SemCKD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean over samples and l of sum_k a_lk mean (p_lk(f_s,l) - f_t,k)^2, where
    a is the softmax over the teacher's stages k of <q_l, k_k> / soft, q and k learned embeddings of how a stage of the
    student and of the teacher tells the samples of the batch apart, p three convolutions (Chen et al. 2021, semantic
    calibration).

    The larger of two maps is averaged down. In the field's comparisons weight 400, beside a KL of weight 1 (loss=sum).
    The embeddings are as wide as a batch: an epoch's smaller last one, which the authors leave out, is filled up with
    zeros; `factor`: they are so many times narrower. Costs a projection for each pair of stages.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Chen et al. 2021 (SemCKD), semantic calibration"

    def __init__(
        self,
        weights: Weights,
        layers: Layers,
        soft: Positive = 1.0,
        factor: Count = 4,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.soft, self.factor = soft, factor
        self.queries, self.keys, self.projections = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean_l sum_k a_lk mean (p_lk(f_s,l) - f_t,k)^2")
        kind = f"a = softmax_k <q_l, k_k> / {number(self.soft)}, p, q and k learned"
        return f"{text}, {kind}, l and k in {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        require(self.batch_size is not None, "loss", "semckd", "another here: the batch size is not known")
        s, t = self.maps(student, teacher)
        device, size = student.logits.device, int(self.batch_size or 0)
        self.queries = nn.ModuleList(Embedding(size, self.factor) for _ in s).to(device)
        self.keys = nn.ModuleList(Embedding(size, self.factor) for _ in t).to(device)
        self.projections = nn.ModuleList(Projection(a.shape[1], b.shape[1]) for a in s for b in t).to(device)

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """How much each sample's stage of the student looks at each of the teacher's [B, L_s, L_t]."""
        queries = torch.stack([embed(stage) for embed, stage in zip(self.queries, student)], dim=1)
        keys = torch.stack([embed(stage) for embed, stage in zip(self.keys, teacher)], dim=2)
        return F.softmax(queries @ keys / self.soft, dim=-1)

    def distances(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean squared error of every pair of stages, by sample [B, L_s, L_t]."""
        found = []
        for i, own in enumerate(student):
            for j, other in enumerate(teacher):
                a, b = same_size(own, other)
                found.append((self.projections[i * len(teacher) + j](a) - b).square().flatten(1).mean(1))
        return torch.stack(found, dim=1).unflatten(1, (len(student), len(teacher)))

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        distill = (self.attention(s, t) * self.distances(s, t)).sum(2).mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
