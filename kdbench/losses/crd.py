"""Contrastive representation distillation: tell the teacher's view of the same image from its views of thousands of
others."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, Inside, Positive, Width
from kdbench.errors import UserError, require
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one
from kdbench.types import LossTerms, Outputs, Target


def contrast(scores: Tensor, images: int) -> Tensor:
    """Noise-contrastive estimate from log-scores z [B, 1 + K], the first of each row the true pair's: mean, 0-dim.

    With p = exp z: -log(p / (p + K/N)) for the pair, -log((K/N) / (p + K/N)) for each of the K others, N `images` (Tian
    et al. 2020, the critic h and L_critic). Sums of exponentials by log-sum-exp: finite for any temperature.
    """
    noise = (scores.shape[1] - 1) / images
    log_noise = torch.full_like(scores, math.log(noise + 1e-7))  # the authors' 1e-7
    rows = torch.logaddexp(scores, log_noise).sum(1) - scores[:, 0]
    return rows.mean() - (scores.shape[1] - 1) * math.log(noise)


class Memory(nn.Module):
    """Embeddings of all training images by one network, as it last saw them, and the logarithm of their scores'
    scale."""

    rows: Tensor
    log_scale: Tensor

    def __init__(self, images: int, dimensions: int) -> None:
        super().__init__()
        bound = (3 / dimensions) ** 0.5
        self.register_buffer("rows", torch.empty(images, dimensions).uniform_(-bound, bound))
        self.register_buffer("log_scale", torch.tensor(-math.inf))  # set by the first batch

    def scores(self, embedding: Tensor, chosen: Tensor, tau: float) -> Tensor:
        """<row, e> / tau - log scale [B, 1 + K] for the rows chosen [B, 1 + K]; the first batch sets the scale, to the
        sum that all images' exp(<row, e> / tau) would have."""
        raw = self._products(embedding, chosen) / tau
        first = raw.detach().logsumexp((0, 1)) + math.log(len(self.rows) / chosen.numel())
        # A choice on the device, not an `if`: no host sync. In place: kept in checkpoints, replayed by a graph.
        self.log_scale.copy_(torch.where(self.log_scale.isinf(), first, self.log_scale))
        return raw - self.log_scale.clone()

    def _products(self, embedding: Tensor, chosen: Tensor) -> Tensor:
        """Inner products [B, 1 + K] with the chosen rows. One with every row is a matrix product, and quicker than to
        collect 1 + K rows for each image (20 times, for 50,000 rows and K = 16384) until there are many more rows."""
        if len(self.rows) <= 8 * chosen.shape[1]:
            rows = self.rows.clone()  # `update` changes them before the backward pass reads them
            return (embedding @ rows.T).gather(1, chosen)
        return torch.einsum("bkd,bd->bk", self.rows[chosen], embedding)

    @torch.no_grad()
    def update(self, row: Tensor, embedding: Tensor, momentum: float) -> None:
        """Move the rows of these images towards their new embeddings [B, D], and back to length 1."""
        moved = momentum * self.rows[row] + (1 - momentum) * embedding
        self.rows.index_copy_(0, row, F.normalize(moved))


class CRD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill (contrast of student against the teacher's memory + of teacher against
    the student's), in learned linear embeddings of length 1 (Tian et al. 2020, L_critic; 0.8, K = 16384 in the paper).

    Each image's pair is told from `negatives` other rows of a memory of all `images` training images, drawn evenly from
    torch's generator (the paper's default draws from other classes only: its labels are not known here). `images` null
    is the size of the training set; `target.row` must lie below it. Costs 8 B `negatives` `dimensions` bytes a step
    and 8 `images` `dimensions` bytes in every checkpoint.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Tian et al. 2020 (CRD), L_critic"

    def __init__(
        self,
        weights: Weights,
        images: Count | None = None,
        negatives: Count = 16384,
        tau: Positive = 0.07,
        momentum: Inside = 0.5,
        dimensions: Width = 128,
        layer: OneLayer = "pooled",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.images = images
        self.negatives = negatives
        self.tau, self.momentum = tau, momentum
        self.dimensions = dimensions
        self.embed = nn.ModuleList()
        self.memory = nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="(NCE(s, memory t) + NCE(t, memory s))")
        size = f"K = {self.negatives} of {self.images or 'all'} images, tau = {number(self.tau)}"
        kept = f"memory momentum {number(self.momentum)}"
        return f"{text}, {size}, {self.dimensions} learned dimensions of {self.layers_text}, {kept}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        both = self.map(student, teacher)
        device = student.logits.device
        self.embed = nn.ModuleList(nn.Linear(f.flatten(1).shape[1], self.dimensions, device=device) for f in both)
        self.images = self.images or self.train_rows
        if self.images is None:
            raise UserError("images", None, "the size of the training set")
        least = self.train_rows or 0
        require(self.images >= least, "images", self.images, f"null, or {least:,} or more: the training set's rows")
        self.memory = nn.ModuleList(Memory(self.images, self.dimensions) for _ in range(2)).to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        features = self.map(student, teacher)
        s, t = (F.normalize(embed(f.flatten(1))) for embed, f in zip(self.embed, features))
        assert self.images is not None
        others = torch.randint(self.images, (len(s), self.negatives), device=s.device)
        chosen = torch.cat([target.row.unsqueeze(1), others], dim=1)
        of_s, of_t = self.memory[0], self.memory[1]
        distill = contrast(of_t.scores(s, chosen, self.tau), self.images)  # type: ignore[operator]
        distill = distill + contrast(of_s.scores(t, chosen, self.tau), self.images)  # type: ignore[operator]
        of_s.update(target.row, s.detach(), self.momentum)  # type: ignore[operator]
        of_t.update(target.row, t.detach(), self.momentum)  # type: ignore[operator]
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
