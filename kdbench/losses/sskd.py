"""Self-supervision: how the teacher compares an image with turned ones is taught, besides what it says of them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, Positive, Share
from kdbench.losses.base import First, Smoothing, Weights, detached, number
from kdbench.losses.features import FeatureLoss
from kdbench.losses.functional import class_index, mean_over, real, tempered_kl_rows
from kdbench.losses.mlkd import views_of
from kdbench.types import LossTerms, Outputs, Target

TURNS = 4  # upright, and by 90, 180 and 270 degrees


def projection(feature: Tensor) -> nn.Sequential:
    """Two linear layers with a ReLU between them, as wide as the feature [B, D]."""
    width = feature.shape[1]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(feature.device)


def similarities(embedding: Tensor) -> Tensor:
    """Cosines [3 B, B] of every turned image, image by image, with every upright one, from embeddings [4 B, D] that
    hold one turn after the other."""
    upright, *turned = views_of(embedding, TURNS, "sskd")
    return F.normalize(by_image(turned)) @ F.normalize(upright).mT


def by_image(turned: list[Tensor]) -> Tensor:
    """Rows [3 B, ...] image by image, from three times [B, ...]."""
    return torch.stack(turned, 1).flatten(0, 1)


def rank_of(scores: Tensor, index: Tensor) -> Tensor:
    """How many entries of a row [N, M] are above the one at index [N]: 0 where it is the largest."""
    return (scores > scores.gather(1, index.unsqueeze(1))).sum(1)


def least_wrong(rank: Tensor, ratio: float) -> Tensor:
    """Which rows [N] bool count: all of rank 0, and of the others the share `ratio` with the lowest ranks; of equal
    ones those that come first."""
    wrong = (rank > 0).sum()
    kept = len(rank) - wrong + (wrong * ratio).floor()
    return rank.argsort(stable=True).argsort() < kept


class Contrast(FeatureLoss):
    """CE of the cosines of a turned image with all upright ones, the image's own being the class, by the teacher's
    projection, which is learned; the student learns nothing (Xu et al. 2020, SSKD)."""

    views = TURNS
    apart: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("contrast",)
    paper: ClassVar[str] = "Xu et al. 2020 (SSKD)"

    def __init__(self) -> None:
        super().__init__({"contrast": 1.0}, ["pooled"], 0.0)
        self.theirs: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        return "CE(image, cos(h(f_t of a turned image), h(f_t of all upright ones))), f = pooled, h learned"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        self.theirs = projection(self.map(student, teacher)[1])

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        cosines = similarities(self.theirs(self.map(student, teacher)[1]))
        own = torch.arange(cosines.shape[1], device=cosines.device).repeat_interleave(TURNS - 1)
        return self.combine(contrast=self.task(cosines, own))


class SSKD(FeatureLoss):
    """weights.task CE(y, s_0) + weights.distill D(t_0, s_0) + weights.turned D(t_r, s_r) + weights.contrast D at
    `tau_contrast` of the cosines cos(h(f_r), h(f_0)), D(t, s) = tau^2 KL(t/tau || s/tau), 0 the upright views and r
    those turned by 90, 180 and 270 degrees, f the features "pooled", h two linear layers of each network (Xu et al.
    2020, SSKD).

    Cosines are a softmax over the batch's upright images. The teacher's h is trained first, for `epochs` at the rate
    `lr` (Contrast), which falls to a tenth after the shares `falls` of them (the authors: after 30 and 45 of 60), and
    does not change after that; the student's trains with it and is left out afterwards. Of the turned images that the
    teacher gets wrong only the share `keep` counts in the third term, of those that it takes for another image the
    share `keep_contrast` in the fourth: those whose answer is nearest to right. One without a label counts as right.
    All four views go through the student in one batch, as in the authors' code. Needs four views:
    dataset/augment=rotations, and as published dataset.augment.alike=flip.
    """

    views = TURNS
    apart: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "turned", "contrast")
    needs_one_class = True
    paper: ClassVar[str] = "Xu et al. 2020 (SSKD)"

    def __init__(
        self,
        weights: Weights,
        tau: Positive = 4.0,
        tau_contrast: Positive = 0.5,
        keep: Share = 1.0,
        keep_contrast: Share = 0.75,
        epochs: Count = 60,
        lr: NotNegative | None = None,
        falls: list[Share] | None = None,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, ["pooled"], label_smoothing)
        self.tau, self.tau_contrast, self.keep, self.keep_contrast = tau, tau_contrast, keep, keep_contrast
        self.first_epochs, self.first_lr, self.first_falls = epochs, lr, falls or ()
        self.own: nn.Module = nn.Identity()
        self.theirs: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        cosine = f"D(cos(h(f_t,r), h(f_t,0)), cos(h(f_s,r), h(f_s,0))) at tau = {number(self.tau_contrast)}"
        task = f"{self.task_text[:-2]}s_0)"
        text = self.written(task=task, distill="D(t_0, s_0)", turned="D(t_r, s_r)", contrast=cosine)
        kept = f"{number(self.keep)} and {number(self.keep_contrast)} of the wrong r"
        views = f"0: upright, r: turned, {kept}, h learned, the teacher's before"
        return f"{text}, D = tau^2 KL(t/tau || s/tau), tau = {number(self.tau)}, {views}, f = pooled"

    @property
    def first_training(self) -> First:
        return First(Contrast(), self.first_epochs, self.first_lr, False, falls=self.first_falls)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        self.own, self.theirs = projection(s), projection(t).requires_grad_(False)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        label, *_ = views_of(target.label, TURNS, "sskd")
        index, labelled = class_index(label, "sskd")
        s, *s_turned = views_of(real(student.logits), TURNS, "sskd")
        t, *t_turned = views_of(detached(teacher, "sskd"), TURNS, "sskd")
        s_r, t_r = by_image(s_turned), by_image(t_turned)
        index, labelled = (x.repeat_interleave(TURNS - 1) for x in (index, labelled))
        right = rank_of(t_r, index) * labelled
        f_s, f_t = self.map(student, teacher)
        ours, theirs = similarities(self.own(f_s)), similarities(self.theirs(f_t))
        self_rank = rank_of(theirs, torch.arange(len(s), device=s.device).repeat_interleave(TURNS - 1))
        contrast = tempered_kl_rows(ours, theirs, self.tau_contrast)
        return self.combine(
            task=self.task(s, label),
            distill=tempered_kl_rows(s, t, self.tau).mean(),
            turned=mean_over(tempered_kl_rows(s_r, t_r, self.tau), least_wrong(right, self.keep)),
            contrast=mean_over(contrast, least_wrong(self_rank, self.keep_contrast)),
        )
