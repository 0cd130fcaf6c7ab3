"""What several losses share: pure functions of tensors, in float32 (float64 stays), without a host sync.

Letters: B samples, C classes, s and t the student's and teacher's logits [B, C]. A function named `..._rows` returns
one value a sample [B]. Sums over classes of p (log p - log q) are written out: `F.kl_div` has no vmap rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.errors import UserError


def real(x: Tensor) -> Tensor:
    """float32, or float64 as it is: bf16 and fp16 logits have too few digits for a softmax's tail."""
    return x if x.dtype == torch.float64 else x.float()


def log_probs(logits: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """log softmax(logits / tau) [B, C], in nats; finite for every finite logit."""
    return F.log_softmax(real(logits) / tau, dim=-1)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) a sample [B], in nats, from log-probabilities [B, C]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def excess(x: Tensor) -> Tensor:
    """e^x - 1 - x for |x| <= 1, by its series: the difference itself has no digits left where x is small."""
    total = torch.zeros_like(x)
    for k in range(12, 1, -1):  # 1/12! is 2e-9
        total = (total * x + 1) / k
    return x * total * x


class Ratio(NamedTuple):
    """Two softmaxes whose logits are close, by the logarithm of their ratio, which is computed without cancellation.

    log q - log p of two log-probabilities near -log C has an error of 1e-7 log C in float32. The losses multiply by
    tau^2: at tau = 1e5 the KL of two networks came out as -68 where 8.7 is true. Here the logits are subtracted first,
    and KL(p || q) = sum p (e^r - 1 - r), which has no differences (both sides sum to 1).
    """

    p: Tensor  # the first softmax [B, C]
    log: Tensor  # r = log q - log p [B, C]; 0 in rows that are not near
    near: Tensor  # rows where the logits differ by less than 1 around their mean [B, 1] bool; the others need no help

    @staticmethod
    def of(q: Tensor, p: Tensor, tau: float | Tensor, kept: Tensor | None = None) -> Ratio:
        """From two sets of logits [B, C] at temperature tau, among the classes `kept` [B, C] bool (None: all)."""
        first, gap = real(p) / tau, (real(q) - real(p)) / tau
        if kept is not None:
            first, gap = first.masked_fill(~kept, float("-inf")), gap.masked_fill(~kept, 0.0)
        weight = first.softmax(-1)
        x = gap - (weight * gap).sum(-1, keepdim=True)
        x = x if kept is None else x.masked_fill(~kept, 0.0)
        near = x.abs().amax(-1, keepdim=True) < 1
        x = torch.where(near, x, 0.0)
        return Ratio(weight, x - (weight * excess(x)).sum(-1, keepdim=True).log1p(), near)

    def kl(self, otherwise: Tensor) -> Tensor:
        """KL(p || q) a sample [B], in nats; `otherwise` [B] in rows that are not near."""
        return torch.where(self.near.squeeze(-1), (self.p * excess(self.log)).sum(-1), otherwise)


def large(tau: float) -> bool:
    """Whether differences of log-probabilities at this temperature lose digits that tau^2 would bring to light.

    Below it they are the plain ones, 2e-7 tau^2 from exact: trainings keep their weights to the last bit.
    """
    return tau > 32


def tempered_kl_rows(student: Tensor, teacher: Tensor, tau: float | Tensor, highest: float | None = None) -> Tensor:
    """tau^2 KL(softmax(t/tau) || softmax(s/tau)) [B]: Hinton et al. 2015, section 2, with the factor that keeps the
    gradient's size as tau changes. `highest`: the most that a learned tau may become."""
    rows = kl_rows(log_probs(teacher, tau), log_probs(student, tau))
    if large(float(tau) if highest is None else highest):
        rows = Ratio.of(student, teacher, tau).kl(rows)
    return tau**2 * rows


def cross_entropy_rows(student: Tensor, teacher: Tensor, tau: float, kept: Tensor | None = None) -> Tensor:
    """CE(softmax(t/tau), softmax(s/tau)) [B] at a large temperature: the teacher's entropy and a KL, whose gradient
    keeps its digits; among the classes `kept` [B, C] bool (None: all)."""
    ratio = Ratio.of(student, teacher, tau, kept)
    rows = [real(logits) / tau for logits in (teacher, student)]
    if kept is not None:
        rows = [row.masked_fill(~kept, float("-inf")) for row in rows]
    log_p, log_q = (row.log_softmax(-1) for row in rows)
    if kept is not None:
        log_p, log_q = log_p.masked_fill(~kept, 0.0), log_q.masked_fill(~kept, 0.0)
    return ratio.kl((ratio.p * (log_p - log_q)).sum(-1)) - (ratio.p * log_p).sum(-1)


def one_hot(label: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B] int64 -> [B, C]; a label of -1 gives a row of zeros (`F.one_hot` would fail on it, after a host sync)."""
    return (label.unsqueeze(-1) == torch.arange(classes, device=label.device)).to(dtype)


def distribution(label: Tensor, logits: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The labels as distributions [B, C], smoothed, and which rows have one [B] bool.

    label [B] int64 (-1: none) or [B, C] float (no positive entry: none); logits [B, C] give classes and precision. A
    row without a label holds arbitrary numbers.
    """
    classes, dtype = logits.shape[-1], real(logits).dtype
    soft = label.to(dtype).clamp_min(0.0) if label.dtype.is_floating_point else one_hot(label, classes, dtype)
    return (1 - smoothing) * soft + smoothing / classes, soft.sum(-1) > 0


def class_index(label: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """One class a sample [B] (0 where there is none) and which rows have one [B] bool.

    Raises UserError for mixed labels [B, C]: the loss separates the one labelled class from the others.
    """
    if label.dtype.is_floating_point:
        raise UserError(
            f"loss={loss} needs one class a sample; it cannot be used with mixed or soft labels (mixup, cutmix)"
        )
    return label.clamp_min(0), label >= 0


def largest_class(label: Tensor) -> tuple[Tensor, Tensor]:
    """As `class_index`; of mixed labels [B, C] the class with the largest share."""
    if not label.dtype.is_floating_point:
        return label.clamp_min(0), label >= 0
    share, index = label.max(-1)
    return index, share > 0


def mean_over(rows: Tensor, counted: Tensor) -> Tensor:
    """Mean of rows [B] over those counted [B] bool; 0 if there are none."""
    return torch.where(counted, rows, 0.0).sum() / counted.sum().clamp_min(1)


def split_at(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities seen from one class: (of the class [B], of all others together [B], within the others [B, C]).

    By log-sum-exp over the others, so that nothing becomes log 0 however confident the network is (`log(1 - p)` is
    infinite in float32 from p = 1 - 6e-8 on). In the third the class itself holds 0 and is to be masked. C >= 2.
    """
    chosen = index.unsqueeze(-1)
    others = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    rest = logits.masked_fill(others, float("-inf")).logsumexp(-1)
    total = logits.logsumexp(-1)
    within = (logits - rest.unsqueeze(-1)).masked_fill(others, 0.0)
    return logits.gather(-1, chosen).squeeze(-1) - total, rest - total, within


def without(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, C] with a 0 at each sample's own class."""
    return rows.scatter(-1, index.unsqueeze(-1), 0.0)


def among_rows(student: Tensor, teacher: Tensor, kept: Tensor, tau: float) -> Tensor:
    """tau^2 KL(t || s) of the softmaxes at tau over the classes `kept` [B, C] bool alone [B]; 0 where there are none.

    In differences of log-probabilities: for temperatures up to 32.
    """
    some = kept | ~kept.any(-1, keepdim=True)  # a row without classes would be 0 / 0
    log_t, log_s = (
        (real(z) / tau).masked_fill(~some, float("-inf")).log_softmax(-1).masked_fill(~kept, 0.0)
        for z in (teacher, student)
    )
    return tau**2 * (log_t.exp() * (log_t - log_s)).masked_fill(~kept, 0.0).sum(-1)


def standardize(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) a sample, std over classes with the C - 1 denominator (Sun et al. 2024, Z-score).

    A sample whose logits are all equal (a last layer that starts at zero) has no spread: it is only centred, where the
    formula's gradient would be 1e7.
    """
    logits = real(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(logits.shape[-1] - 1, 1)
    flat = variance <= 1e-12
    return centred / torch.where(flat, 1.0, torch.where(flat, 1.0, variance).sqrt() + 1e-7)


def correlation_rows(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of a and b [N, M] along M: [N] in [-1, 1]; 0, without gradient, where a row is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size_a, size_b = a.square().sum(-1), b.square().sum(-1)
    varies = (size_a > 1e-14) & (size_b > 1e-14)
    size = torch.where(varies, size_a, 1.0).sqrt() * torch.where(varies, size_b, 1.0).sqrt()
    return torch.where(varies, (a * b).sum(-1) / (size + 1e-8), 0.0)


def unlike_rows(a: Tensor, b: Tensor) -> Tensor:
    """1 - Pearson's correlation [N] as |a' - b'|^2 / 2 of centred rows at length 1, which keeps its digits near 0; 1,
    without gradient, where a row is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size_a, size_b = a.square().sum(-1, keepdim=True), b.square().sum(-1, keepdim=True)
    varies = (size_a > 1e-14) & (size_b > 1e-14)
    gap = a / torch.where(varies, size_a, 1.0).sqrt() - b / torch.where(varies, size_b, 1.0).sqrt()
    return torch.where(varies.squeeze(-1), gap.square().sum(-1) / 2, 1.0)


def ramp(progress: Tensor, share: float) -> Tensor:
    """0 -> 1 linearly over the first `share` of the training (0-dim); 1 throughout if share is 0."""
    return (progress / share).clamp(0.0, 1.0) if share > 0 else torch.ones_like(progress)
