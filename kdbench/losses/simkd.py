"""SimKD: the student answers with the teacher's classifier, and only learns the feature that it reads."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from kdbench.arguments.ranges import Count
from kdbench.errors import UserError
from kdbench.losses.adapters import classifier_of, pooled_map
from kdbench.losses.base import DistillationLoss, Extension, Smoothing, Weights
from kdbench.losses.features import same_size, student_maps, teacher_maps
from kdbench.types import LossTerms, Outputs, Parts, Target


class SimKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill mean (p(f_s) - f_t)^2, f_t the map whose mean the teacher's classifier
    reads, f_s the student's last stage, p three convolutions (Chen et al. 2022).

    The student becomes kdbench.models.extended.Reused: its logits s are the teacher's classifier, frozen, on the mean
    of p(f_s), so p and the classifier stay in it. The larger of the two maps is averaged down. `factor`: the middle of
    p is so many times narrower than f_t. As published weights.task is 0: no label is used.
    """

    extends: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Chen et al. 2022 (SimKD), reused classifier"

    def __init__(
        self,
        weights: Weights,
        factor: Count = 2,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.factor = factor
        self.needs = ("map",)  # or the last stage: known from `setup` on
        self._classifier: tuple[nn.Linear, ...] = ()

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ("projected",)

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean (p(f_s) - f_t)^2")
        kind = f"p learned, its middle {self.factor} times narrower"
        return f"{text}, s = the teacher's classifier of mean p(f_s), {kind}"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        self._classifier = (classifier_of(teacher, "simkd"),)

    def extension(self, student: Outputs, teacher: Outputs) -> Extension:
        (classifier,) = self._classifier
        stages = [name for name in student.features if name.startswith("stage") and not name.endswith(".pre")]
        layer = max(stages, key=lambda name: (len(name), name), default="")
        seen = student_maps(student, [layer or "stage1"])[0]
        wanted = teacher.features[pooled_map(teacher, "simkd")]
        if seen.dim() != 4:
            raise UserError("loss", "simkd", f"another here: the student's {layer} is no map")
        config = {
            "_target_": "kdbench.models.extended.reused", "layer": layer, "inputs": seen.shape[1],
            "outputs": wanted.shape[1], "size": wanted.shape[2], "factor": self.factor,
        }  # fmt: skip
        weights = {"classifier.weight": classifier.weight.detach()}
        zero = classifier.weight.new_zeros(len(classifier.weight))
        weights["classifier.bias"] = zero if classifier.bias is None else classifier.bias.detach()
        text = f"a projector and the teacher's classifier ({wanted.shape[1]} dimensions) in place of its own"
        return Extension(config, text, weights, ("classifier",))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        if teacher is not None:
            self.needs = (pooled_map(teacher, "simkd"),)
        if "projected" not in student.features:
            raise UserError("loss", "simkd", "another with this procedure, which does not extend its students")

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        (s,), (t,) = student_maps(student, self.student_needs), teacher_maps(teacher, self.needs, "simkd")
        s, t = same_size(s, t)
        return self.combine(task=self.task(student.logits, target.label), distill=torch.mean((s - t).square()))
