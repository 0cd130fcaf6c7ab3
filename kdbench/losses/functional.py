"""What several losses share: pure functions of tensors, in float32 (float64 stays), without a host sync.

Letters: B samples, C classes, s and t the student's and teacher's logits [B, C]. A function named `..._rows` returns
one value a sample [B]. Sums over classes of p (log p - log q) are written out: `F.kl_div` has no vmap rule.
"""

from __future__ import annotations

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


def tempered_kl_rows(student: Tensor, teacher: Tensor, tau: float | Tensor) -> Tensor:
    """tau^2 KL(softmax(t/tau) || softmax(s/tau)) [B]: Hinton et al. 2015, section 2, with the factor that keeps the
    gradient's size as tau changes."""
    return tau**2 * kl_rows(log_probs(teacher, tau), log_probs(student, tau))


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


def ramp(progress: Tensor, share: float) -> Tensor:
    """0 -> 1 linearly over the first `share` of the training (0-dim); 1 throughout if share is 0."""
    return (progress / share).clamp(0.0, 1.0) if share > 0 else torch.ones_like(progress)
