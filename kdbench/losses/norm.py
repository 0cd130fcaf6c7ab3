"""NORM: the student's last map, made N times as wide as the teacher's, must be N copies of it."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Count
from kdbench.errors import UserError
from kdbench.losses.adapters import last_stage, pooled_map
from kdbench.losses.base import DistillationLoss, Extension, Smoothing, Weights
from kdbench.losses.features import student_maps, teacher_maps
from kdbench.types import LossTerms, Outputs, Parts, Target


def copies_distance(student: Tensor, teacher: Tensor, copies: int) -> Tensor:
    """sum over the copies of the mean squared error of `copies` times D channels of the student and the D of the
    teacher, the larger map max-pooled: 0-dim (Liu et al. 2023, N-to-one matching)."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    s, t = (x if x.shape[2:] == size else F.adaptive_max_pool2d(x, size) for x in (student, teacher))
    return (s.unflatten(1, (copies, -1)) - t.unsqueeze(1)).square().mean() * copies


class NORM(DistillationLoss):
    """weights.task CE(y, s) + weights.distill sum_n mean (e_n(f_s) - f_t)^2, f the maps whose means the classifiers
    read (a wide ResNet's before its last batch norm and ReLU, as in the authors' code), e_n the n-th part of a linear
    expansion of f_s to `copies` times the channels of f_t (Liu et al. 2023, N-to-one matching).

    The student becomes kdbench.models.extended.Expanded: f_s + c(e(f_s)) takes the place of f_s, so e and c stay in it.
    The larger map is max-pooled. As published weights.task is chosen for each pair, 1/16 to 1/2, and 8 copies; the
    authors' code also normalises all logits and changes the weight in five steps, which the paper does not say, and its
    ShuffleNets leave f_s out of the sum.
    """

    extends: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Liu et al. 2023 (NORM), N-to-one matching"

    def __init__(self, weights: Weights, copies: Count = 8, label_smoothing: Smoothing = 0.0) -> None:
        super().__init__(weights, label_smoothing)
        self.copies = copies
        self.needs = ("map",)  # or the last stage: known from `setup` on
        self.sums = {"student": False, "teacher": False}  # whose last stage is raw sums; known from `attach` on

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ("projected",)

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_n mean (e_n(f_s) - f_t)^2")
        return f"{text}, f_s + c(e(f_s)) in its place, e and c linear and learned, {self.copies} copies"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        """A wide ResNet's last joint is what its batch norm makes of the last stage."""
        for who, parts in (("student", student), ("teacher", teacher)):
            joints: tuple[str, ...] = getattr(parts.network, "joints", ()) if parts else ()
            self.sums[who] = "".join(joints[-1:]).endswith(".pre")

    def last_map(self, outputs: Outputs, who: str) -> str:
        """The name of f."""
        name = pooled_map(outputs, "norm", who)
        return last_stage(outputs) if self.sums[who] else name

    def extension(self, student: Outputs, teacher: Outputs) -> Extension:
        layer, theirs = self.last_map(student, "student"), self.last_map(teacher, "teacher")
        width = teacher.features[theirs].shape[1]
        config = {
            "_target_": "kdbench.models.extended.expanded", "layer": layer, "copies": self.copies,
            "inputs": student.features[layer].shape[1], "outputs": width,
        }  # fmt: skip
        return Extension(config, f"a linear expansion of its last map to {self.copies} x {width} channels and back")

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        if teacher is not None:
            self.needs = (self.last_map(teacher, "teacher"),)
        if "projected" not in student.features:
            raise UserError("loss", "norm", "another with this procedure, which does not extend its students")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        (s,), (t,) = student_maps(student, self.student_needs), teacher_maps(teacher, self.needs, "norm")
        return self.combine(
            task=self.task(student.logits, target.label), distill=copies_distance(s, t, self.copies)
        )
