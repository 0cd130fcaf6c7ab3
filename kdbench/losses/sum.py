"""Several losses at once, each with its own settings and its own weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from kdbench.errors import UserError, require
from kdbench.losses.base import Classifier, DistillationLoss, Smoothing, Weights
from kdbench.types import Calibration, LossTerms, Outputs, Target


class Sum(DistillationLoss):
    """weights.task CE(y, s) + sum over `parts` of weights.<part> times that loss, whole and with its own weights.

    RepDistiller's CRD+KD is a cross-entropy, a KL and a contrast: parts whose own weights.task is 0. A part that
    `weights` does not name counts once. A table of teacher logits serves the sum if no part reads features. What a part
    draws, learns or keeps stays its own.
    """

    paper: ClassVar[str] = "those of its parts"

    def __init__(
        self, parts: Mapping[str, DistillationLoss], weights: Weights, label_smoothing: Smoothing = 0.0
    ) -> None:
        free = all(str(name).isidentifier() and not hasattr(nn.ModuleDict, name) for name in parts)
        named = bool(parts) and free and "task" not in parts
        require(named, "parts", list(parts), "one loss or more, by plain names other than task")
        for name, part in parts.items():
            require(isinstance(part, DistillationLoss), f"parts.{name}", part, "a loss: a node with its _target_")
        self.terms = ("task", *parts)  # type: ignore[misc]
        super().__init__(weights, label_smoothing)
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if self.weights.get(name, 1.0) != 0.0})

    def named_losses(self) -> Iterator[tuple[str, DistillationLoss]]:
        """The parts that count, by name."""
        yield from self.parts.items()  # type: ignore[misc]

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(key for _, part in self.named_losses() for key in part.needs))

    @property
    def student_needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for _, part in self.named_losses() for key in part.student_needs))

    @property
    def uses_teacher(self) -> bool:  # type: ignore[override]
        return any(part.uses_teacher for _, part in self.named_losses())

    @property
    def least_classes(self) -> int:
        return max((part.least_classes for _, part in self.named_losses()), default=1)

    @property
    def formula(self) -> str:
        parts = {name: f"({part.formula})" for name, part in self.named_losses()}
        return self.written(task=self.task_text, **parts)

    def attach(self, student: nn.Module, teacher: nn.Module | None, classifier: Classifier) -> None:
        for _, part in self.named_losses():
            part.attach(student, teacher, classifier)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        for _, part in self.named_losses():
            part.train_rows, part.epochs = self.train_rows, self.epochs
            part.setup(student, teacher)

    @property
    def needs_calibration(self) -> bool:
        return any(part.needs_calibration for _, part in self.named_losses())

    @property
    def least_calibration(self) -> int:
        return max((part.least_calibration for _, part in self.named_losses()), default=1)

    def calibrate(self, teacher_logits: Tensor, label: Tensor) -> Calibration:
        wanting = [(name, part) for name, part in self.named_losses() if part.needs_calibration]
        if len(wanting) > 1:
            names = [name for name, _ in wanting]
            raise UserError("parts", names, "such that one of them at most chooses coefficients before training")
        return wanting[0][1].calibrate(teacher_logits, label)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        found = {name: part(student, teacher, target) for name, part in self.named_losses()}
        terms = self.combine(
            task=self.task(student.logits, target.label), **{name: part.total for name, part in found.items()}
        )
        own = {f"{name}_{key}": value for name, part in found.items() for key, value in part.parts.items()}
        return terms._replace(parts={**terms.parts, **own})
