"""How close two networks are on the same images, beyond their answers: logits, margins, the size of features."""

from __future__ import annotations

import torch
from torch import Tensor


def fidelity(student: Tensor, teacher: Tensor, label: Tensor) -> dict[str, float]:
    """Means over images with logits [N, C] of both and labels [N] (Kim et al. 2021, section 4 and its supplement).

    logit_distance: the Euclidean distance of the logits; logit_shift: how far apart the means of an image's logits are
    (KL cannot see it); tld, teacher_tld: the logit of the true class less the largest other one (negative where the
    answer is wrong); teacher_top1.
    """
    values = {
        "logit_distance": (student - teacher).norm(dim=1).mean(),
        "logit_shift": (student.mean(1) - teacher.mean(1)).abs().mean(),
        "tld": top_logit_difference(student, label).mean(),
        "teacher_tld": top_logit_difference(teacher, label).mean(),
        "teacher_top1": (teacher.argmax(1) == label).float().mean(),
    }
    return {name: float(value) for name, value in values.items()}


def top_logit_difference(logits: Tensor, label: Tensor) -> Tensor:
    """[N]: the true class's logit less the largest other one; logits [N, C], label [N]."""
    own = logits.gather(1, label[:, None])[:, 0]
    others = logits.scatter(1, label[:, None], -torch.inf)
    return own - others.max(1).values
