"""TAID: the student follows a mixture of itself and its teacher that moves to the teacher as it learns."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import Momentum, Share
from kdbench.errors import require
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached, number
from kdbench.losses.functional import log_probs, real
from kdbench.types import LossTerms, Outputs, Target


class TAID(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 CE(softmax(m/tau), softmax(s/tau)), m = (1 - r) s + r t of logits,
    the student's in it without gradient (Shing et al. 2025, temporally adaptive interpolated distillation).

    r begins at `start` and never falls. After each step it is the larger of the line start + (end - start) progress and
    r + alpha sigmoid(v) (1 - r), at most `end`; v is the mean, with momentum `beta`, of how much of itself the
    distillation term lost in a step. alpha = 0: the line alone. r, v and the last value are kept in buffers, which a
    checkpoint carries; with trainer.accumulate every part of a batch moves them. The authors: no labels, tau = 1. `tau`
    in (0, 32]. Raises UserError for an `end` below `start`.
    """

    gone: Tensor  # r - start
    drift: Tensor
    last: Tensor
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Shing et al. 2025 (TAID)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 1.0,
        start: Share = 0.4,
        end: Share = 1.0,
        alpha: Share = 5e-4,
        beta: Momentum = 0.99,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        require(start <= end, "end", end, f"{number(start)} or more, where start={number(start)}")
        self.tau, self.start, self.end, self.alpha, self.beta = tau, start, end, alpha, beta
        self.register_buffer("gone", torch.zeros(()))
        self.register_buffer("drift", torch.zeros(()))
        self.register_buffer("last", torch.tensor(math.inf))

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 CE(((1 - r) s + r t)/tau, s/tau)")
        line = f"r from {number(self.start)} to {number(self.end)}"
        ahead = f", ahead by {number(self.alpha)} sigmoid(v) (1 - r) a step" if self.alpha else ""
        return f"{text}, {line}{ahead}, tau = {number(self.tau)}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = real(student.logits), detached(teacher, "taid")
        share = self.start + self.gone
        mixed = (1 - share) * s.detach() + share * t
        rows = -(log_probs(mixed, self.tau).exp() * log_probs(s, self.tau)).sum(-1)
        distill = self.tau**2 * rows.mean()
        self._advance(distill.detach(), target.progress)
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "teacher_share": share})

    def _advance(self, value: Tensor, progress: Tensor) -> None:
        """Move r on, in place; the first value is only kept."""
        lost = (self.last - value) / (self.last + 1e-15)
        drift = self.beta * self.drift + (1 - self.beta) * lost
        line = (self.end - self.start) * progress
        step = self.gone + self.alpha * drift.sigmoid() * (1 - self.start - self.gone)
        known = self.last.isfinite()
        self.gone.copy_(torch.where(known, torch.maximum(line, step).clamp(max=self.end - self.start), self.gone))
        self.drift.copy_(torch.where(known, drift, self.drift))
        self.last.copy_(value)
