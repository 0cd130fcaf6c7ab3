"""Several teachers, weighted in each batch such that the student moves in a direction that all of them agree to."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kdbench.arguments.ranges import above_to
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss, Moderate, Smoothing, Weights, number
from kdbench.losses.camkd import member_rows
from kdbench.losses.features import teacher_maps
from kdbench.losses.functional import log_probs, real
from kdbench.types import MEMBERS, LossTerms, Outputs, Target

MOST = 7  # teachers: every set of those at a bound is tried, 3^7 linear systems of 8 unknowns


def shortest(gram: Tensor, bound: float) -> Tensor:
    """The weights a [K] in [0, max(bound, 1/K)], summing to 1, of the shortest mean of K vectors with the inner
    products `gram` [K, K]: min a^T G a, by trying every set of weights that are at a bound. Without gradient or host
    sync."""
    count, device = len(gram), gram.device
    gram = gram.detach().to(torch.float32 if device.type == "mps" else torch.float64)
    gram = gram + 1e-12 * (gram.diagonal().sum() + 1e-30) * torch.eye(count, dtype=gram.dtype, device=device)
    bound = max(bound, 1 / count)
    # Each weight is 0, at the bound, or free (the ternary digits 0, 1 and 2): made on the device.
    place = 3 ** torch.arange(count, device=device)
    states = torch.arange(3**count, device=device).unsqueeze(-1) // place % 3
    free, fixed = (states == 2).to(gram.dtype), (states == 1).to(gram.dtype) * bound
    system = torch.zeros(len(states), count + 1, count + 1, dtype=gram.dtype, device=device)
    scaled = gram / gram.diagonal().mean()
    system[:, :count, :count] = free[:, :, None] * scaled + torch.diag_embed(1 - free)
    system[:, :count, count] = free
    system[:, count, :count].fill_(1.0)
    system[:, count, count].fill_(1e-14)
    wanted = torch.cat([fixed, torch.ones_like(fixed[:, :1])], -1)
    found = torch.linalg.solve_ex(system, wanted.unsqueeze(-1))[0].squeeze(-1)[:, :count]
    found = torch.cat([found, torch.full_like(found[:1], 1 / count)])
    slack = 1e-9
    within = (found >= -slack).all(-1) & (found <= bound + slack).all(-1) & ((found.sum(-1) - 1).abs() < slack)
    length = torch.where(within, ((found @ scaled) * found).sum(-1), torch.inf).nan_to_num(torch.inf)
    chosen = found.index_select(0, length.argmin().unsqueeze(0)).squeeze(0).clamp(0, bound)
    return chosen / chosen.sum()


class AEKD(DistillationLoss):
    """weights.task CE(y, s) + weights.distill sum_k a_k tau^2 KL(t_k/tau || s/tau), one weight for each teacher and
    batch (Du et al. 2020, AE-KD, the logits' part).

    a: the weights in [0, `tolerance`], summing to 1, that make the mean gradient of the sum with respect to the
    student's logits shortest (the multiple-gradient descent direction; their C is `tolerance`, their solver a one-class
    support vector machine). Needs teacher=ensemble, of at most 7 teachers.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    needs = (MEMBERS,)
    paper: ClassVar[str] = "Du et al. 2020 (AE-KD), weighting of gradients"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 4.0,
        tolerance: Annotated[float, above_to(0, 1)] = 0.6,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.tau, self.tolerance = tau, tolerance

    @property
    def student_needs(self) -> tuple[str, ...]:
        return ()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="sum_k a_k tau^2 KL(t_k/tau || s/tau)")
        least = f"a in [0, {number(self.tolerance)}]^K with the shortest mean gradient"
        return f"{text}, {least}, tau = {number(self.tau)}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for too many teachers."""
        (members,) = teacher_maps(teacher, self.needs, "aekd")
        if members.shape[1] > MOST:
            raise UserError(f"loss=aekd weighs at most {MOST} teachers, and teacher.members names {members.shape[1]}")

    def agreed(self, student: Tensor, members: Tensor) -> Tensor:
        """a [K], from the gradients of the K terms with respect to the student's logits."""
        q, p = log_probs(student.detach(), self.tau).exp(), log_probs(members, self.tau).exp()
        gradients = self.tau * (q.unsqueeze(1) - p).mean(0)
        return shortest(gradients @ gradients.mT, self.tolerance)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        (members,) = teacher_maps(teacher, self.needs, "aekd")
        s = real(student.logits)
        rows = member_rows(s, members, self.tau).mean(0)
        distill = (self.agreed(s, members).to(rows.dtype) * rows).sum()
        return self.combine(task=self.task(s, target.label), distill=distill)
