"""Self-distillation whose targets move from the labels to the network's own past predictions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdbench.losses.base import DistillationLoss, Smoothing, Steps, Weights, detached, number
from kdbench.losses.functional import distribution, kl_rows, log_probs
from kdbench.types import LossTerms, Outputs, Target


class PSKD(DistillationLoss):
    """(1 - a) CE(y, s) + a KL(t || s) at temperature 1, a = weights.distill x progress of training (Kim et al. 2021,
    "Self-Knowledge Distillation with Progressive Refinement of Targets", refined targets).

    The paper's target (1 - a) y + a t gives the same gradient; its a grows by epochs, here by steps. It takes
    weights.distill 0.8. Use it with procedure=self_distillation, where t is the student's own past.

    `as_published`: as the authors' code does it. t is what the student said of the sample when it was last trained on
    it, in that crop and in training mode, kept here (4 C bytes a sample; in checkpoints too); the label where it has
    not been yet, in the first epoch. a is that of the whole epoch. Use it without a teacher (teacher=none): it costs no
    second forward pass.
    """

    past: Tensor
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Kim et al. 2021 (PS-KD), refined targets"

    def __init__(self, weights: Weights, as_published: bool = False, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.as_published = as_published
        self.steps: Steps = "epoch" if as_published else "batch"

    @property
    def uses_teacher(self) -> bool:  # type: ignore[override]
        return not self.as_published

    @property
    def formula(self) -> str:
        text = self.written(task=f"(1 - a) {self.task_text}", distill="progress KL(t || s)")
        said = ", t = softmax(s) of the last visit, y before the first" if self.as_published else ""
        return f"{text}, a = {number(self.weights.get('distill', 1.0))} progress{said}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.as_published:
            # One row more than there are: for samples of no row. -1: not seen yet.
            rows, like = (self.train_rows or 0) + 1, student.logits
            self.register_buffer("past", torch.full((rows, like.shape[-1]), -1.0, device=like.device))

    def visited(self, logits: Tensor, target: Target) -> Tensor:
        """log t [B, C] of the samples' last visit, in whose place comes this one."""
        said = log_probs(logits.detach())
        place = torch.where(target.row < 0, len(self.past) - 1, target.row)
        before = self.past.index_select(0, place).to(said.dtype)
        label, labelled = distribution(target.label, logits)
        first = (before[:, :1] < 0) | (target.row < 0).unsqueeze(-1)
        self.past.index_copy_(0, place, said.exp().to(self.past.dtype))
        label = torch.where(labelled.unsqueeze(-1), label, said.exp())
        return torch.where(first, label, before).clamp_min(1e-38).log()

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        if self.as_published:
            log_t, progress = self.visited(student.logits, target), self.reached(target.progress)
        else:
            log_t, progress = log_probs(detached(teacher, "pskd")), target.progress
        past = kl_rows(log_t, log_probs(student.logits)).mean()
        share = self.weights.get("distill", 1.0) * progress
        task = (1 - share) * self.task(student.logits, target.label)
        return self.combine(task=task, distill=progress * past)
