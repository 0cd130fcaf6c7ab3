"""Cross-view consistency: a weak and a strong view of each image, taught within each view and across the two."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdbench.arguments.ranges import Positive, Share
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import log_probs, real, tempered_kl_rows
from kdbench.losses.mlkd import views_of
from kdbench.types import LossTerms, Outputs, Target


def confident(logits: Tensor, least: float) -> Tensor:
    """Which samples [B] the teacher is at least so sure of, as 0 or 1."""
    confidence = log_probs(logits).exp().amax(-1)
    return (confidence >= least).to(confidence.dtype)


class CRLD(DistillationLoss):
    """weights.task (CE(y, s_w) + CE(y, s_s)) + weights.within m_w (D(t_w, s_w) + D(t_s, s_s)) + weights.cross m_s
    (D(t_w, s_s) + D(t_s, s_w)), D(t, s) = tau^2 KL(t/tau || s/tau), w and s a weak and a strong view of the same image
    (Zhang et al. 2024, CRLD).

    m = 1 for images of whose weak (strong) view the teacher is at least `sure` (`sure_strong`), else 0; means are over
    all images. Needs two views: dataset/augment=weak_strong.
    """

    views = 2
    terms: ClassVar[tuple[str, ...]] = ("task", "within", "cross")
    paper: ClassVar[str] = "Zhang et al. 2024 (CRLD)"

    def __init__(
        self,
        weights: Weights,
        tau: Positive = 4.0,
        sure: Share = 0.9,
        sure_strong: Share = 0.2,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.sure, self.sure_strong = tau, sure, sure_strong

    @property
    def formula(self) -> str:
        task = self.task_text
        within, cross = "m_w (D(t_w, s_w) + D(t_s, s_s))", "m_s (D(t_w, s_s) + D(t_s, s_w))"
        text = self.written(task=f"({task[:-2]}s_w) + {task[:-2]}s_s))", within=within, cross=cross)
        sure = f"m = 1 where max t_w >= {number(self.sure)}, max t_s >= {number(self.sure_strong)}"
        both = f"w, s: the weak and the strong view, tau = {number(self.tau)}"
        return f"{text}, D = tau^2 KL(t/tau || s/tau), {sure}, {both}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t_weak, t_strong = views_of(detached(teacher, "crld"), 2, "crld")
        s_weak, s_strong = views_of(real(student.logits), 2, "crld")
        label, again = views_of(target.label, 2, "crld")
        within = tempered_kl_rows(s_weak, t_weak, self.tau) + tempered_kl_rows(s_strong, t_strong, self.tau)
        cross = tempered_kl_rows(s_strong, t_weak, self.tau) + tempered_kl_rows(s_weak, t_strong, self.tau)
        return self.combine(
            task=self.task(s_weak, label) + self.task(s_strong, again),
            within=(confident(t_weak, self.sure) * within).mean(),
            cross=(confident(t_strong, self.sure_strong) * cross).mean(),
        )
