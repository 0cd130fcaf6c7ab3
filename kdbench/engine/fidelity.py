"""How close two networks are on the same images, beyond their answers: logits, margins, the size of features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdbench.engine.evaluate import evaluating, in_float32
from kdbench.engine.metrics import report
from kdbench.types import Batch


def compare_networks(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`metrics.report` of the student against the teacher's logits, and `fidelity` (Kim et al. 2021) of the two."""
    logits, norm, labels = _answers(student, batches)
    guide, guide_norm, _ = _answers(teacher, batches)
    norms = {"feature_norm": norm, "teacher_feature_norm": guide_norm}
    known = {name: value for name, value in norms.items() if value is not None}
    return report(logits, labels, guide) | fidelity(logits, guide, labels) | known


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


def _answers(network: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, float | None, Tensor]:
    """Logits [N, C], the mean Euclidean norm of the last linear layer's input, and labels [N]."""
    logits, norms, labels = [], [], []
    with evaluating(network), in_float32():
        for batch in batches:
            outputs = network(batch.input)
            logits.append(outputs.logits.float())
            norms += [outputs.features["pooled"].float().norm(dim=1)] if "pooled" in outputs.features else []
            labels.append(batch.target.label)
    norm = float(torch.cat(norms).mean()) if norms else None
    return torch.cat(logits), norm, torch.cat(labels)
