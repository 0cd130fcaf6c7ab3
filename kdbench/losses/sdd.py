"""Scale-decoupled distillation: the logits of parts of the image, made by each network's own classifier."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import NotNegative, Share, listed, within
from kdbench.errors import UserError
from kdbench.losses.adapters import classifier_of
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Steps, Weights, number
from kdbench.losses.dkd import decoupled_rows, warmup_text
from kdbench.losses.functional import class_index, real, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Parts, Target

Scale = Annotated[int, within(1, 64)]


def last_map(outputs: Outputs, who: str) -> str:
    """The name of the map [B, D, H, W] whose ReLU's mean is "pooled", the last one of those that have its width.

    Raises UserError for a network that pools another one: its parts have no logits.
    """
    pooled = outputs.features.get("pooled")
    names = [name for name, value in outputs.features.items() if value.dim() == 4 and name != "stem"]
    fitting = [name for name in names if pooled is not None and outputs.features[name].shape[1] == pooled.shape[1]]
    for name in sorted(fitting, key=lambda name: (name.removesuffix(".pre"), name), reverse=True):
        found = outputs.features[name].relu().mean((2, 3))
        if pooled is None or pooled.is_meta or torch.allclose(found.float(), pooled.float(), rtol=1e-2, atol=1e-3):
            return name
    raise UserError(f"loss=sdd needs a network whose last map is averaged for its classifier; the {who}'s is not")


def cells(feature: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Means over the parts of a map [B, D, H, W] at each scale (2: four quarters), one after the other: [B, N, D].

    Coarser scales are means of the finest one's parts, as in the authors' code: where H is no multiple of it they are
    not quite those of the map.
    """
    finest = F.adaptive_avg_pool2d(feature, max(scales))
    return torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(2) for scale in scales], -1).mT


class SDD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill r mean of w D(t, s) over all parts of all images (Luo 2024, SDD): the
    logits t and s of a part are what each network's classifier makes of the mean of its last map over that part.

    `scales`: [1, 2, 4] are the whole image, its quarters and its sixteenths; 1 comes first. w = 2 for parts of which
    the teacher's answer is right where that of the whole image is wrong, or the other way round; else 1. `base`: D is
    tau^2 KL (kl), or tau^2 (tckd TCKD + nckd NCKD) (dkd, see `DKD`). r rises from 0 to 1 over the first `warmup` of the
    training (the authors: 30 of 240 epochs with dkd, none with kl). Unlabelled images have w = 1 and need kl. Needs one
    class a sample, and networks that average their last map.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Luo 2024 (SDD)"

    def __init__(
        self,
        weights: Weights,
        scales: Annotated[list[Scale], listed(1, "a list of scales such as [1, 2, 4]", different=True)],
        base: Literal["kl", "dkd"] = "kl",
        tau: Moderate = 4.0,
        tckd: NotNegative = 1.0,
        nckd: NotNegative = 8.0,
        warmup: Share = 0.0,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        if scales[0] != 1:
            raise UserError("scales", list(scales), "a list that begins with 1, the whole image")
        self.steps = steps
        self.scales, self.base, self.tau = tuple(scales), base, tau
        self.tckd, self.nckd, self.warmup = tckd, nckd, warmup
        self.maps = ("last map", "last map")  # of student and teacher, from `setup` on
        self._heads: tuple[nn.Linear, ...] = ()  # of student and teacher; in a tuple: the loss does not own them

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.maps[1],)

    @property
    def student_needs(self) -> tuple[str, ...]:
        return (self.maps[0],)

    @property
    def formula(self) -> str:
        dkd = f"({number(self.tckd)} TCKD + {number(self.nckd)} NCKD)(t/tau, s/tau)"
        part = f"w tau^2 {'KL(t/tau || s/tau)' if self.base == 'kl' else dkd}"
        text = self.written(task=self.task_text, distill=f"{'r ' if self.warmup else ''}mean {part}")
        scales = f"over parts at the scales {', '.join(map(str, self.scales))}, w = 2 where part and whole disagree"
        return f"{text}, {scales}, tau = {number(self.tau)}{warmup_text(self.warmup)}"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        both = ((student, "student"), (teacher, "teacher"))
        self._heads = tuple(classifier_of(parts, "sdd", who) for parts, who in both if parts is not None)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        if teacher is not None:
            self.maps = last_map(student, "student"), last_map(teacher, "teacher")

    def parts(self, outputs: Outputs, name: str, head: nn.Linear) -> Tensor:
        """Logits of the parts [B, N, C]."""
        bias = None if head.bias is None else real(head.bias)
        return F.linear(cells(real(outputs.features[name]).relu(), self.scales), real(head.weight), bias)

    def weight(self, teacher: Tensor, index: Tensor, labelled: Tensor) -> Tensor:
        """1 or 2 for each part [B, N], from the teacher's logits [B, N, C]."""
        right = teacher.argmax(-1) == index.unsqueeze(-1)
        return 1.0 + ((right != right[:, :1]) & labelled.unsqueeze(-1)).to(teacher.dtype)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        if teacher is None:
            raise UserError("loss=sdd needs a teacher: choose one with teacher=<network>")
        index, labelled = class_index(target.label, "sdd")
        s = self.parts(student, self.maps[0], self._heads[0])
        t = self.parts(teacher, self.maps[1], self._heads[1]).detach()
        weight = self.weight(t, index, labelled)
        if self.base == "kl":
            distill = (weight * tempered_kl_rows(s, t, self.tau)).mean()
        else:
            tckd, nckd = decoupled_rows(s, t, index.unsqueeze(-1).expand(t.shape[:2]), self.tau)
            rows = labelled.unsqueeze(-1) * weight * (self.tckd * tckd + self.nckd * nckd)
            distill = rows.sum() / (labelled.sum().clamp_min(1) * rows.shape[1])
        risen = self.risen(target.progress, self.warmup)
        return self.combine(task=self.task(student.logits, target.label), distill=risen * distill)
