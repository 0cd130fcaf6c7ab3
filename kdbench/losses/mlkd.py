"""Multi-level logits: predictions at several temperatures, and how classes and samples of a batch resemble each
other."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from kdbench.arguments.ranges import listed
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, detached
from kdbench.losses.functional import log_probs, real, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Target

Views = Literal[1, 2]


def views_of(tensor: Tensor, views: int, loss: str) -> tuple[Tensor, ...]:
    """Its parts [B, ...] by view, of a batch that holds each image in so many views one after the other.

    Raises UserError for a batch that does not.
    """
    if len(tensor) % views:
        raise UserError(
            f"loss={loss} needs each image in {views} views, and this batch has {len(tensor)}: "
            "dataset/augment=weak_strong gives two"
        )
    return tensor.chunk(views)


def at_most_median(values: Tensor) -> Tensor:
    """Which of the values [N] are at most their median, as 0 or 1."""
    ordered, middle = values.sort().values, len(values) // 2
    low, high = ordered[(len(values) - 1) // 2], ordered[middle]
    return (values <= low + (high - low) * 0.5).to(values.dtype)


def alike(student: Tensor, teacher: Tensor) -> Tensor:
    """(P P^T - Q Q^T)^2 / N [N, N] of two matrices [N, M]: how differently their rows resemble each other."""
    return (teacher @ teacher.mT - student @ student.mT).square() / len(teacher)


class MLKD(DistillationLoss):
    """weights.task CE(y, s) + sum over `taus` of weights.distill D + weights.classes K + weights.batch G (Jin et al.
    2023, multi-level logit distillation), p and q the softmaxes of t and s at that tau.

    D: mean over samples of m_b tau^2 KL(p || q), m_b = 1 where the teacher's confidence is at most the batch's median.
    K: sum of m_k (p^T p - q^T q)^2 / C over pairs of classes, m_k = 1 where the batch's mass of class k is at most the
    classes' median. G: sum of m_b (p p^T - q q^T)^2 / B over pairs of samples.

    `views` 2: each image in a weak and a strong view (dataset/augment=weak_strong), as in the paper. Then D without the
    mask is added for the strong one; CE is the sum of both; K and G are of the weak one. `as_published`: as the
    authors' code computes it, whose figures are the published ones: it multiplies means by the masks, so that every
    sample counts half; and of the strong view's terms the last two temperatures are taken of the weak view.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "classes", "batch")
    paper: ClassVar[str] = "Jin et al. 2023 (MLKD)"

    def __init__(
        self,
        weights: Weights,
        taus: Annotated[list[Moderate], listed(1)],
        views: Views = 1,
        as_published: bool = False,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.taus, self.views, self.as_published = list(taus), views, as_published

    @property
    def formula(self) -> str:
        levels = {"distill": "D", "classes": "K", "batch": "G"}
        text = self.written(task=self.task_text, **levels)
        said = "D = m tau^2 KL(p || q), K = m |p^T p - q^T q|^2 / C, G = m |p p^T - q q^T|^2 / B"
        masks = "m = 1/2 for all" if self.as_published else "m = 1 up to the median confidence"
        views = ", D of the strong view too, CE of both" if self.views == 2 else ""
        return f"{text}, {said}, {masks}, summed over tau = {', '.join(f'{tau:g}' for tau in self.taus)}{views}"

    def distill(self, student: Tensor, teacher: Tensor, tau: float, mask: Tensor) -> Tensor:
        rows = tempered_kl_rows(student, teacher, tau)
        return rows.mean() * mask.mean() if self.as_published else (mask * rows).mean()

    def level(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """K or G from matrices [N, M] whose rows are classes or samples."""
        found = alike(student, teacher)
        return found.sum() * mask.mean() if self.as_published else (mask * found).sum()

    def strong(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """D of the strong view, without a mask; `as_published` of the weak one for the last two temperatures."""
        slips = {3, 4} if self.as_published else set()
        seen = [(tau, 0 if place in slips else 1) for place, tau in enumerate(self.taus)]
        return torch.stack([tempered_kl_rows(student[v], teacher[v], tau).mean() for tau, v in seen]).sum()

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = views_of(detached(teacher, "mlkd"), self.views, "mlkd")
        s = views_of(real(student.logits), self.views, "mlkd")
        label = views_of(target.label, self.views, "mlkd")
        sure = log_probs(t[0]).exp()
        sample, kind = at_most_median(sure.amax(-1)), at_most_median(sure.sum(0))
        distill, classes, samples = [], [], []
        for tau in self.taus:
            p, q = log_probs(t[0], tau).exp(), log_probs(s[0], tau).exp()
            distill.append(self.distill(s[0], t[0], tau, sample))
            classes.append(self.level(q.mT, p.mT, kind))
            samples.append(self.level(q, p, sample))
        both = torch.stack(distill).sum()
        return self.combine(
            task=torch.stack([self.task(z, y) for z, y in zip(s, label)]).sum(),
            distill=both + self.strong(s, t) if self.views == 2 else both,
            classes=torch.stack(classes).sum(),
            batch=torch.stack(samples).sum(),
        )
