"""Born-Again Networks' second control: the teacher's probabilities with the wrong classes shuffled."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive, Seed
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.functional import Ratio, kl_rows, large, log_probs
from kdbench.types import LossTerms, Outputs, Target


def permuted_log_probs(log_p: Tensor, keys: Tensor) -> Tensor:
    """Every sample's log-probabilities [B, C] with all but its largest put in the order of `keys` [B, C] (any numbers).

    The largest keeps its class; the others are the same values at other classes. Random keys: every order is as likely.
    """
    top = log_p.argmax(-1, keepdim=True)
    classes = torch.arange(log_p.shape[-1], device=log_p.device).expand_as(log_p)
    places = classes.scatter(-1, top, -1).argsort(-1)  # the top class, then the others as they stand
    lowest = torch.finfo(keys.dtype).min if keys.dtype.is_floating_point else torch.iinfo(keys.dtype).min
    order = keys.scatter(-1, top, lowest).argsort(-1)  # the top class, then the others by key
    return torch.zeros_like(log_p).scatter(-1, places, log_p.gather(-1, order))


def hashed_keys(row: Tensor, classes: int, seed: int) -> Tensor:
    """Scrambled int64 keys [B, C], a function of (row [B], class, seed) alone: a permutation kept without storage.

    Two rounds of multiply and shift modulo 2^64, each one-to-one: no two classes of a sample share a key.
    """
    start = (seed * 0x2545F4914F6CDD1D + 2**63) % 2**64 - 2**63  # wrapped by hand, as int64 arithmetic wraps a tensor
    x = row.long().unsqueeze(-1) * classes + torch.arange(classes, device=row.device) + start
    for multiplier in (0x5851F42D4C957F2D, 0x369DEA0F31A53F85):
        x = x * multiplier
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
    return x


class DKPP(DistillationLoss):
    """weights.task CE(y, s) + weights.distill KL(p' || softmax(s)), where p' is p = softmax(t) with the probabilities
    of all classes but the most likely one permuted in each sample (Furlanello et al. 2018, "dark knowledge with
    permuted predictions"; its CE(p', s) differs by a constant).

    `permutation`: fresh draws a new one at every visit from torch's global generator. The gradient is linear in p', so
    on average this is the same as spreading 1 - max p evenly. fixed gives each sample (`target.row`) one permutation
    for the whole training, a function of `seed`. The paper does not say which it used. `tau` > 0, 1 in the paper.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Furlanello et al. 2018 (BAN), DKPP"

    def __init__(
        self,
        weights: Weights,
        permutation: Literal["fresh", "fixed"] = "fresh",
        seed: Seed = 0,
        tau: Positive = 1.0,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.permutation = permutation
        self.seed = seed
        self.tau = tau

    @property
    def formula(self) -> str:
        how = "anew at every visit" if self.permutation == "fresh" else f"once a sample (seed {self.seed})"
        text = self.written(task=self.task_text, distill="tau^2 KL(p' || s/tau)")
        return f"{text}, tau = {number(self.tau)}, p' = softmax(t/tau) with all but its maximum permuted {how}"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        log_p = log_probs(detached(teacher, "dkpp"), self.tau)
        fresh = self.permutation == "fresh"
        keys = torch.rand_like(log_p) if fresh else hashed_keys(target.row, log_p.shape[-1], self.seed)
        rows = kl_rows(permuted_log_probs(log_p, keys), log_probs(student.logits, self.tau))
        if large(self.tau):
            permuted = permuted_log_probs(detached(teacher, "dkpp"), keys)
            rows = Ratio.of(student.logits, permuted, self.tau).kl(rows)
        return self.combine(task=self.task(student.logits, target.label), distill=self.tau**2 * rows.mean())
