"""Several losses at once, each with its own settings and its own weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from kdbench.errors import UserError, require, under
from kdbench.losses.base import DistillationLoss, Extension, First, Seen, Smoothing, Weights
from kdbench.types import Calibration, LossTerms, Outputs, Parts, Target

T = TypeVar("T")


@contextmanager
def _placed(part: str) -> Iterator[None]:
    """What a part refuses is said of its place; what it says of itself as a `loss`, of the part."""
    place = f"parts.{part}"
    try:
        with under(place):
            yield
    except UserError as error:
        if error.key == f"{place}.loss":
            raise UserError(place, error.value, error.allowed, error.hint, error.said) from error
        raise


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
    def views(self) -> int:  # type: ignore[override]
        """What the parts that compare views need; the others see all views. Raises UserError where that differs."""
        found = {name: part.views for name, part in self.named_losses() if part.views > 1}
        require(len(set(found.values())) <= 1, "loss.parts", found, "such that all compare as many views of an image")
        return next(iter(found.values()), 1)

    @property
    def apart(self) -> bool:  # type: ignore[override]
        return all(part.apart for _, part in self.named_losses() if part.views > 1)

    @property
    def uses_teacher(self) -> bool:  # type: ignore[override]
        return any(part.uses_teacher for _, part in self.named_losses())

    @property
    def needs_one_class(self) -> bool:  # type: ignore[override]
        return any(part.needs_one_class for _, part in self.named_losses())

    @property
    def of_embeddings(self) -> bool:  # type: ignore[override]
        """Whether all parts are. Raises UserError if only some are."""
        found = {name: part.of_embeddings for name, part in self.named_losses()}
        alike = len(set(found.values())) <= 1
        require(alike, "loss.parts", list(found), "such that all are for classes, or all for embeddings")
        return any(found.values())

    @property
    def extends(self) -> bool:  # type: ignore[override]
        return any(part.extends for _, part in self.named_losses())

    @property
    def least_classes(self) -> int:
        return max((part.least_classes for _, part in self.named_losses()), default=1)

    @property
    def heavy(self) -> dict[str, float]:
        found = super().heavy
        for name, part in self.named_losses():
            found |= {f"parts.{name}.{key}": weight for key, weight in part.heavy.items()}
        return found

    @property
    def formula(self) -> str:
        parts = {name: f"({part.formula})" for name, part in self.named_losses()}
        return self.written(task=self.task_text, **parts)

    @property
    def first_training(self) -> First | None:
        found = {name: part.first_training for name, part in self.named_losses()}
        made = {name: one._replace(place=f"parts.{name}.{one.place}") for name, one in found.items() if one}
        return self._only(made, "has a training before the main one")

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        for name, part in self.named_losses():
            with _placed(name):
                part.attach(student, teacher)

    def extension(self, student: Outputs, teacher: Outputs) -> Extension | None:
        found: dict[str, Extension | None] = {}
        for name, part in self.named_losses():
            with _placed(name):
                found[name] = part.extension(student, teacher)
        return self._only({name: made for name, made in found.items() if made}, "extends the student")

    def _only(self, found: Mapping[str, T], does: str) -> T | None:
        """What one of the parts has. Raises UserError if several have it."""
        require(len(found) <= 1, "loss.parts", list(found), f"such that one of them at most {does}")
        return next(iter(found.values()), None)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        for name, part in self.named_losses():
            part.train_rows, part.epochs, part.batch_size = self.train_rows, self.epochs, self.batch_size
            with _placed(name):
                part.setup(student, teacher)

    @property
    def surveyed(self) -> str:
        wanting = {name: part for name, part in self.named_losses() if part.surveyed}
        one = self._only(wanting, "surveys the training set")
        return one.surveyed if one else ""

    def survey(self, seen: Seen) -> None:
        for _, part in self.named_losses():
            if part.surveyed:
                part.survey(seen)

    @property
    def needs_calibration(self) -> bool:
        return any(part.needs_calibration for _, part in self.named_losses())

    @property
    def least_calibration(self) -> int:
        return max((part.least_calibration for _, part in self.named_losses()), default=1)

    def calibrate(self, teacher_logits: Tensor, label: Tensor) -> Calibration:
        wanting = {name: part for name, part in self.named_losses() if part.needs_calibration}
        chosen = self._only(wanting, "chooses coefficients before training")
        assert chosen is not None
        return chosen.calibrate(teacher_logits, label)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        found = {name: part(student, teacher, target) for name, part in self.named_losses()}
        terms = self.combine(
            task=self.task(student.logits, target.label), **{name: part.total for name, part in found.items()}
        )
        own = {f"{name}_{key}": value for name, part in found.items() for key, value in part.parts.items()}
        return terms._replace(parts={**terms.parts, **own})
