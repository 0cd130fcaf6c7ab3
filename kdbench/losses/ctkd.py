"""Curriculum temperature: a temperature that learns to make the student's task harder."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Finite, NotNegative, Positive, Share
from kdbench.losses.base import DistillationLoss, Smoothing, Steps, Weights, detached, number
from kdbench.losses.functional import tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target


def reversed_gradient(x: Tensor, strength: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by -strength (Ganin and Lempitsky 2015's reversal layer, as arithmetic:
    the two terms with strength cancel exactly in value, and one of them carries no gradient)."""
    scaled = strength * x
    return x.detach() + (scaled.detach() - scaled)


class CTKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(softmax(t/tau) || softmax(s/tau)), tau = start + span
    sigmoid(theta) with one learned theta (Li et al. 2023, global temperature).

    theta starts at `init` and climbs the loss: its gradient is multiplied by -lambda, where lambda rises from 0 to 1
    along a cosine over the first `ramp` of the training (the authors: 10 of 240 epochs) and stays. It belongs to the
    loss's parameters, trains with the student's optimizer (weight decay included, as theirs) and is not exported.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Li et al. 2023 (CTKD), global temperature"

    def __init__(
        self,
        weights: Weights,
        start: Positive = 1.0,
        span: NotNegative = 20.0,
        init: Finite = 1.0,
        ramp: Share = 10 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.start, self.span = start, span
        self.ramp = ramp
        self.init = init
        self.theta = nn.Parameter(torch.tensor(self.init))

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="tau^2 KL(t/tau || s/tau)")
        tau = f"tau = {number(self.start)} + {number(self.span)} sigmoid(theta)"
        when = f"lambda 0 to 1 over the first {number(self.ramp)} of the training" if self.ramp else "lambda = 1"
        return f"{text}, {tau}, theta learned from {number(self.init)} by -lambda times its gradient, {when}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        strength = (1 - torch.cos(math.pi * self.risen(target.progress, self.ramp))) / 2
        tau = self.start + self.span * reversed_gradient(self.theta, strength).sigmoid()
        distill = tempered_kl_rows(student.logits, detached(teacher, "ctkd"), tau, self.start + self.span).mean()
        terms = self.combine(task=self.task(student.logits, target.label), distill=distill)
        return terms._replace(parts={**terms.parts, "tau": tau.detach()})
