"""Softmax regression representation learning: the student's feature must pass the teacher's own classifier."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from kdbench.losses.adapters import classifier_of, connector, known_classifiers
from kdbench.losses.base import Smoothing, Weights, detached
from kdbench.losses.features import FeatureLoss
from kdbench.losses.functional import real
from kdbench.types import LossTerms, Outputs, Parts, Target


class SRRL(FeatureLoss):
    """weights.task CE(y, s) + weights.feature mean (r(f_s) - f_t)^2 + weights.logits mean (W_t r(f_s) + b_t - t)^2, f
    the feature that a network's classifier reads ("pooled"), r a linear layer with batch norm and ReLU that trains with
    the student, W_t and b_t the teacher's classifier, frozen (Yang et al. 2021, L_FM and L_SR by squared error).

    Means over batch and dimensions. In the field's comparisons all weights are 1, and a KL stands beside (loss=sum).
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "feature", "logits")
    paper: ClassVar[str] = "Yang et al. 2021 (SRRL), L_FM and L_SR"

    def __init__(self, weights: Weights, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, ["pooled"], label_smoothing)
        self.connector: nn.Module = nn.Identity()
        self._classifier: tuple[nn.Linear, ...] = ()

    @property
    def formula(self) -> str:
        feature, logits = "mean (r(f_s) - f_t)^2", "mean (W_t r(f_s) + b_t - t)^2"
        text = self.written(task=self.task_text, feature=feature, logits=logits)
        return f"{text}, f = pooled, r learned, W_t and b_t the teacher's classifier"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        self._classifier = (classifier_of(teacher, "srrl"),)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        known_classifiers(self._classifier, "srrl")
        s, t = self.map(student, teacher)
        self.connector = connector(s.shape[1], t.shape[1]).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        (classifier,) = self._classifier
        passed = self.connector(s[:, :, None, None]).flatten(1)
        bias = None if classifier.bias is None else classifier.bias.detach().to(passed)
        answer = F.linear(passed, classifier.weight.detach().to(passed), bias)
        return self.combine(
            task=self.task(student.logits, target.label),
            feature=(passed - t).square().mean(),
            logits=(answer - real(detached(teacher, "srrl"))).square().mean(),
        )
