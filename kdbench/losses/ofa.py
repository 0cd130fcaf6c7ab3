"""One for all: every stage of the student answers by a branch of its own, and learns from the teacher's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Positive
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.features import Names, needs_maps, student_maps
from kdbench.losses.functional import largest_class, log_probs, mean_over, one_hot
from kdbench.types import LossTerms, Outputs, Target


def enhanced_rows(student: Tensor, teacher: Tensor, index: Tensor, tau: float, power: float) -> Tensor:
    """-sum_c ((p_c + 1_y)^power - 1_y) log q_c a sample [B], p and q the softmaxes of teacher and student at tau, 1_y
    the labelled class (Hao et al. 2023, adaptive target): a cross-entropy, not 0 where both agree."""
    hot = one_hot(index, teacher.shape[-1], log_probs(teacher).dtype)
    aim = (log_probs(teacher, tau).exp() + hot) ** power - hot
    return -(aim * log_probs(student, tau)).sum(-1)


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Two depth-wise separable 3x3 convolutions, the first one of stride 2, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width, stride in ((inputs, 2), (outputs, 1)):
        layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)]
        layers += [nn.Conv2d(inputs, inputs if stride == 2 else width, 1, bias=False)]
        layers += [BatchNorm(inputs if stride == 2 else width), nn.ReLU()]
    return nn.Sequential(*layers)


def branch(inputs: int, width: int, steps: int, classes: int) -> nn.Sequential:
    """From a map with `inputs` channels to logits: `steps` halvings that double the channels, the last one to `width`,
    or a 1x1 convolution where there are none; then the mean over places and a linear layer."""
    made: list[nn.Module] = [nn.Conv2d(inputs, width, 1)] if not steps else []
    for step in range(steps):
        made.append(separable(inputs, width if step == steps - 1 else 2 * inputs))
        inputs *= 2
    whole = nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for layer in whole.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return whole


class TokenBranch(nn.Module):
    """From a map of tokens [B, inputs, grid, grid] to logits, as the authors have it for students without class token:
    2x2 tokens are merged until 7x7 are left, then `blocks` transformer blocks of 4 heads, the mean and a linear layer.
    """

    def __init__(self, inputs: int, grid: int, blocks: int, classes: int) -> None:
        from timm.models.swin_transformer import PatchMerging  # imported when used: timm takes a second
        from timm.models.vision_transformer import Block

        super().__init__()
        merges = max(int(math.log2(grid / 7)), 0)
        merging = [(PatchMerging(inputs, inputs), nn.GELU()) for _ in range(merges)]
        layers = [layer for pair in merging for layer in pair]
        self.merge = nn.Sequential(*(layers[:-1] if merges > 1 else layers))  # as theirs: none after the last of many
        self.blocks = nn.Sequential(*(Block(inputs, 4 if inputs % 4 == 0 else 1) for _ in range(blocks)))
        self.head = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = self.merge(maps.permute(0, 2, 3, 1)).flatten(1, 2)
        logits: Tensor = self.head(self.blocks(tokens).mean(1))
        return logits


class OFA(DistillationLoss):
    """weights.task CE(y, s) + weights.distill E(s, t) + weights.branches sum_l E(b_l(f_s,l), t), E = -sum_c ((p_c +
    1_y)^g - 1_y) log q_c with the softmaxes p and q of teacher and student at tau, b_l a branch from a stage of the
    student to logits, which trains with it and is left out afterwards (Hao et al. 2023, OFA-KD, adaptive target).

    `layers`: the student's stages with branches; null: all. Of the teacher only logits are read, so the networks may be
    of any two kinds, and a table serves. The branches are those of the authors: convolutions for students whose maps
    shrink from stage to stage (networks of three stages have a halving fewer), and transformer blocks where all maps
    are equally large (ViT, MLP). Theirs read the class token of a ViT, these the mean of its patches. All weights are
    1 as published, g is tuned for each pair, 1 to 1.5. Mean over labelled samples; of a mixed label the class with the
    larger share counts, as in their code.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "branches")
    paper: ClassVar[str] = "Hao et al. 2023 (OFA-KD), adaptive target"

    def __init__(
        self,
        weights: Weights,
        layers: Names | None = None,
        power: Positive = 1.0,
        tau: Positive = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.power, self.tau = power, tau
        self.layers: tuple[str, ...] = tuple(layers or ())  # none: known from `setup` on
        self.branches = nn.ModuleList()

    @property
    def student_needs(self) -> tuple[str, ...]:
        return self.layers

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="E(s, t)", branches="sum_l E(b_l(f_s,l), t)")
        kind = f"E = -sum_c ((p_c + 1_y)^{number(self.power)} - 1_y) log q_c at tau = {number(self.tau)}, b learned"
        return f"{text}, {kind}, l in {', '.join(self.layers) or 'all stages'}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for a student without maps."""
        stages = [name for name in student.features if name.startswith("stage") and not name.endswith(".pre")]
        self.layers = self.layers or tuple(stages)
        maps = student_maps(student, self.layers)
        needs_maps(self.layers, maps, "ofa")
        self._branch(student, teacher, stages, maps)

    def _branch(
        self, student: Outputs, teacher: Outputs | None, stages: Sequence[str], maps: Sequence[Tensor]
    ) -> None:
        pooled = [out.features["pooled"].shape[1] for out in (student, teacher) if out and "pooled" in out.features]
        width, classes = max(pooled, default=maps[-1].shape[1]), student.logits.shape[-1]
        steps = [len(stages) - 1 - stages.index(name) if name in stages else 0 for name in self.layers]
        sizes = [student.features[name].shape[-1] for name in stages]
        made: list[nn.Module] = [branch(x.shape[1], width, step, classes) for x, step in zip(maps, steps)]
        if len(stages) > 1 and sizes[0] == sizes[-1]:
            made = [TokenBranch(x.shape[1], x.shape[-1], max(step, 1), classes) for x, step in zip(maps, steps)]
        self.branches = nn.ModuleList(made).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "ofa")
        index, labelled = largest_class(target.label)

        def said(logits: Tensor) -> Tensor:
            return mean_over(enhanced_rows(logits, t, index, self.tau, self.power), labelled)

        answers = [made(x) for made, x in zip(self.branches, student_maps(student, self.layers))]
        return self.combine(
            task=self.task(student.logits, target.label),
            distill=said(student.logits),
            branches=torch.stack([said(logits) for logits in answers]).sum(),
        )
