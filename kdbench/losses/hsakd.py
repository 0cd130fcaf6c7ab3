"""Hierarchical self-supervision: at every stage a classifier of class and turn at once, the teacher's trained first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, Positive, Share
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import First, Smoothing, Weights, detached, number
from kdbench.losses.features import FeatureLoss, Layers
from kdbench.losses.functional import class_index, real, tempered_kl_rows
from kdbench.losses.mlkd import views_of
from kdbench.losses.sskd import TURNS
from kdbench.types import LossTerms, Outputs, Target


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), BatchNorm(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), BatchNorm(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        change = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(change, BatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def auxiliary(maps: Sequence[Tensor], blocks: int, outputs: int) -> nn.Sequential:
    """From the first of a network's stages [B, D, H, W] to `outputs` logits: residual blocks as wide and as small as
    the stages after it, `blocks` each (after the last stage as many of its own width), the mean and a linear layer."""
    made: list[nn.Module] = []
    for before, after in zip(maps, maps[1:] or maps):
        step = max(1, before.shape[2] // after.shape[2])
        made += [Residual(before.shape[1] if i == 0 else after.shape[1], after.shape[1], step if i == 0 else 1)
                 for i in range(blocks)]  # fmt: skip
    whole = nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps[-1].shape[1], outputs))
    for layer in whole.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return whole.to(maps[0].device)


def auxiliaries(outputs: Outputs, layers: Sequence[str], blocks: int) -> nn.ModuleList:
    """One for each of a network's layers, to TURNS logits a class."""
    classes = TURNS * outputs.logits.shape[1]
    maps = [outputs.features[name] for name in layers]
    return nn.ModuleList(auxiliary(maps[i:], blocks, classes) for i in range(len(layers)))


class Joint(FeatureLoss):
    """sum_l CE(class and turn, a_l(f_t,l)) by the teacher's auxiliary classifiers, which are learned; the student
    learns nothing (Yang et al. 2021, HSAKD)."""

    views = TURNS
    apart: ClassVar[bool] = False
    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("joint",)
    paper: ClassVar[str] = "Yang et al. 2021 (HSAKD)"

    def __init__(self, layers: Layers, blocks: int) -> None:
        super().__init__({"joint": 1.0}, layers, 0.0)
        self.blocks = blocks
        self.theirs = nn.ModuleList()

    @property
    def formula(self) -> str:
        return f"sum_l CE(class and turn, a_l(f_t,l)), a learned, {self.blocks} blocks a stage, l in {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        if teacher is not None:
            self.theirs = auxiliaries(teacher, self.needs, self.blocks)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = self.maps(student, teacher)[1]
        index, labelled = class_index(target.label, "hsakd")
        turn = torch.arange(TURNS, device=index.device).repeat_interleave(len(index) // TURNS)
        joint = torch.where(labelled, TURNS * index + turn, -1)
        answers = [self.task(classify(f), joint) for classify, f in zip(self.theirs, t)]
        return self.combine(joint=torch.stack(answers).sum())


class HSAKD(FeatureLoss):
    """weights.task CE(y, s_0) + weights.distill D(t, s) + weights.joint sum_l D(a_l(f_t,l), b_l(f_s,l)), D(t, s) =
    tau^2 KL(t/tau || s/tau) over all four views, 0 the upright one, the others turned by 90, 180 and 270 degrees, a and
    b classifiers of class and turn at once at every stage (Yang et al. 2021, HSAKD).

    The teacher's a_l are trained first, for `epochs` at the rate `lr` (Joint), which falls to a tenth after the
    shares `falls` of them, on the teacher as it is: the authors' `--freezed`, 100 epochs with falls after 30, 60 and
    90, which their figures called HSAKD are of; for HSAKD* they train together with the teacher. The student's b_l
    train with it and are left out afterwards. Both are residual blocks in place of the stages that follow, `blocks`
    for each, and one stage more after the last: the authors' for ResNets, with as many blocks as the network's stages
    have (their other networks have blocks of their own kind). All four views go through the student in one batch, as
    in the authors' code. Needs four views: dataset/augment=rotations.
    """

    views = TURNS
    apart: ClassVar[bool] = False
    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "joint")
    needs_one_class = True
    paper: ClassVar[str] = "Yang et al. 2021 (HSAKD)"

    def __init__(
        self,
        weights: Weights,
        layers: Layers = "all",
        tau: Positive = 3.0,
        blocks: Count = 1,
        epochs: Count = 60,
        lr: NotNegative | None = None,
        falls: list[Share] | None = None,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.tau, self.blocks = tau, blocks
        self.first_epochs, self.first_lr, self.first_falls = epochs, lr, falls or ()
        self.own = nn.ModuleList()
        self.theirs = nn.ModuleList()

    @property
    def formula(self) -> str:
        task, joint = f"{self.task_text[:-2]}s_0)", "sum_l D(a_l(f_t,l), b_l(f_s,l))"
        text = self.written(task=task, distill="D(t, s)", joint=joint)
        kind = f"a trained before, b learned, {self.blocks} blocks a stage, l in {self.layers_text}"
        return f"{text}, D = tau^2 KL(t/tau || s/tau) of four turns, tau = {number(self.tau)}, {kind}"

    @property
    def first_training(self) -> First:
        return First(Joint(self.layers, self.blocks), self.first_epochs, self.first_lr, False, falls=self.first_falls)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        if teacher is not None:
            self.own = auxiliaries(student, self.student_needs, self.blocks)
            self.theirs = auxiliaries(teacher, self.needs, self.blocks).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> HSAKD:
        """The teacher's classifiers stay as they were trained, their batch norms too."""
        super().train(mode)
        self.theirs.eval()
        return self

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t, s = detached(teacher, "hsakd"), real(student.logits)
        upright, label = (views_of(x, TURNS, "hsakd")[0] for x in (s, target.label))
        maps = zip(self.own, self.theirs, *self.maps(student, teacher))
        joint = [tempered_kl_rows(b(f_s), a(f_t), self.tau).mean() for b, a, f_s, f_t in maps]
        return self.combine(
            task=self.task(upright, label),
            distill=tempered_kl_rows(s, t, self.tau).mean(),
            joint=torch.stack(joint).sum(),
        )
