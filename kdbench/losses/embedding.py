"""Losses of embeddings: a student learns where a teacher puts its inputs, without labels."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Positive, within
from kdbench.losses.base import DistillationLoss, Weights, detached, number
from kdbench.losses.functional import log_probs, real
from kdbench.types import LossTerms, Outputs, Target


class EmbeddingLoss(DistillationLoss):
    """A loss whose `logits` are embeddings [B, D] of student and teacher, as data without labels have them."""

    of_embeddings: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("distill",)

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)


def mse_rows(student: Tensor, teacher: Tensor, normalise: bool) -> Tensor:
    """Mean squared difference of two embeddings [B, D] a row [B]; of their directions if `normalise`."""
    s, t = real(student), real(teacher)
    if normalise:
        s, t = F.normalize(s, dim=1), F.normalize(t, dim=1)
    return (s - t).square().mean(1)


class FeatureMSE(EmbeddingLoss):
    """weights.distill mean((s - t)^2) of embeddings s, t (Romero et al. 2015, hint loss, at the last layer).

    `normalise`: of their directions, so that lengths are free.
    """

    paper: ClassVar[str] = "Romero et al. 2015, hint loss"

    def __init__(self, weights: Weights, normalise: bool = False) -> None:
        super().__init__(weights)
        self.normalise = normalise

    @property
    def formula(self) -> str:
        parts = "s / |s| - t / |t|" if self.normalise else "s - t"
        return self.written(distill=f"mean(({parts})^2)")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        rows = mse_rows(student.logits, detached(teacher, "feature_mse"), self.normalise)
        return self.combine(distill=rows.mean())


class Cosine(EmbeddingLoss):
    """weights.distill (1 - cos(s, t)) of embeddings s, t: half the squared distance of their directions."""

    paper: ClassVar[str] = "cosine distance; Xu et al. 2020 (feature normalised KD)"

    @property
    def formula(self) -> str:
        return self.written(distill="(1 - cos(s, t))")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        cosine = F.cosine_similarity(real(student.logits), detached(teacher, "cosine"), dim=1)
        return self.combine(distill=(1 - cosine).mean())


class Relational(EmbeddingLoss):
    """weights.distill CE(softmax(t . Q / tau_teacher), softmax(s . Q / tau)): SEED (Fang et al. 2021, contrast with the
    queue).

    s, t are directions of embeddings; Q holds the teacher's of the last `queue` inputs, and of the input itself as one
    more column. With queue 0 Q is the batch: every image against all others. The queue starts with random directions
    and is kept in checkpoints.
    """

    paper: ClassVar[str] = "Fang et al. 2021 (SEED), contrast with the queue"
    directions: Tensor
    place: Tensor

    def __init__(
        self,
        weights: Weights,
        tau: Positive = 0.2,
        tau_teacher: Positive = 0.01,
        queue: Annotated[int, within(0, 10**6)] = 0,
    ) -> None:
        super().__init__(weights)
        self.tau, self.tau_teacher, self.queue = tau, tau_teacher, queue

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        size = student.logits.shape[1]
        seed = torch.Generator().manual_seed(0)
        self.register_buffer("directions", F.normalize(torch.randn(self.queue, size, generator=seed), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @property
    def formula(self) -> str:
        size = f"the last {self.queue}" if self.queue else "the batch"
        return self.written(
            distill=f"CE(softmax(t.Q/{number(self.tau_teacher)}), softmax(s.Q/{number(self.tau)})), Q of {size}"
        )

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s = F.normalize(real(student.logits), dim=1)
        t = F.normalize(detached(teacher, "relational"), dim=1)
        if self.queue:
            own = [(x * t).sum(1, keepdim=True) for x in (s, t)]
            others = self.directions.to(t.dtype, copy=True)  # the queue moves on before the gradient is taken
            theirs = [torch.cat([column, x @ others.T], 1) for column, x in zip(own, (s, t))]
            self._remember(t)
        else:
            theirs = [s @ t.T, t @ t.T]
        rows = -((theirs[1] / self.tau_teacher).softmax(1) * log_probs(theirs[0], self.tau)).sum(1)
        return self.combine(distill=rows.mean())

    @torch.no_grad()
    def _remember(self, directions: Tensor) -> None:
        """The newest directions in the places of the oldest, without a host sync."""
        newest = directions[-self.queue :]
        places = (self.place + torch.arange(len(newest), device=newest.device)) % self.queue
        self.directions.index_copy_(0, places, newest.to(self.directions.dtype))
        self.place += len(newest)
