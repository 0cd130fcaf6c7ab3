"""What is measured: running sums during training, and the report of a network on a labelled set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.types import Outputs, StepOutput, Target


class Meters:
    """Sums over one epoch, kept on the device and read once, at its end: no host sync in a step.

    Everything that a step counts is counted on the device and in place, so that a CUDA graph may hold the step.
    `truth` int64 [rows of the training set] are the true labels where the training labels are noisy, -1 where unknown.
    """

    def __init__(self, device: torch.device, steps: int, truth: Tensor | None = None) -> None:
        self._totals = torch.zeros(steps, device=device)  # the loss at every step, to find the first that is not finite
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._one = torch.ones((), device=device)
        self._truth = truth.to(device) if truth is not None else None
        self._sums: Tensor | None = None  # [2, names]: of the values, and of the images that they are means of
        self._names: list[str] = []

    def reset(self) -> None:
        """Begin an epoch."""
        self._step.zero_()
        if self._sums is not None:
            self._sums.zero_()

    def add(self, output: StepOutput, teacher: Outputs | None, target: Target) -> None:
        """Count one step: the loss and its terms, right answers, and answers equal to the teacher's.

        Images without a label, or without a true one, have no part in the accuracies.
        """
        answer, images = output.logits.argmax(1), self._one * len(output.logits)
        total = output.terms.total.detach().float()
        means = {"loss": total, **{f"loss_{k}": v for k, v in output.terms.parts.items()}}
        found = {name: (value.float() * images, images) for name, value in means.items()}
        found["top1"] = _right(answer, _labels(target.label))
        if self._truth is not None:
            found["clean_top1"] = _right(answer, self._truth[target.row])
        if teacher is not None:
            found["agreement"] = _right(answer, teacher.logits.argmax(1))
        row = torch.stack([torch.stack(pair) for pair in found.values()], 1)
        if self._sums is None:
            self._sums, self._names = torch.zeros_like(row), list(found)
        self._sums += row
        self._totals.index_copy_(0, self._step, total.view(1))
        self._step += 1

    def read(self) -> tuple[dict[str, float], int | None]:
        """Means by name (those of any image at all), and the first step (from 0) whose loss was not finite, or None.

        The epoch's only sync.
        """
        assert self._sums is not None, "read() before the first step"
        sums, counts = self._sums.tolist()
        bad = (~torch.isfinite(self._totals[: int(self._step)])).nonzero()
        means = {name: s / n for name, s, n in zip(self._names, sums, counts, strict=True) if n}
        return means, int(bad[0]) if len(bad) else None


def _labels(label: Tensor) -> Tensor:
    """The label of each image, -1 where it has none; of a mixture the label that weighs most."""
    if label.ndim == 1:
        return label
    weight, largest = label.max(1)
    return largest.masked_fill(weight <= 0, -1)


def _right(answer: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """How many answers are right, of how many that have a label."""
    return (answer == label).float().sum(), (label >= 0).float().sum()


def report(logits: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Accuracy, calibration and fidelity of `logits` [N, C] against `label` [N] and, if given, `teacher` logits [N, C].

    top1, top5 and agreement are fractions; nll and teacher_kl (KL from teacher to student at temperature 1, the
    fidelity of Stanton et al. 2021) are in nats; ece is the expected calibration error with 15 equal bins (Guo et al.
    2017).
    """
    logp = F.log_softmax(logits.float(), 1)
    # One answer an image, for every figure: topk breaks ties in another way than argmax does.
    answer = logits.argmax(1)
    right = answer == label
    among = (logp.topk(min(5, logp.shape[1]), 1).indices == label[:, None]).any(1)
    values = {
        "top1": right.float().mean(),
        "top5": (among | right).float().mean(),
        "nll": F.nll_loss(logp, label),
        "ece": expected_calibration_error(logp.exp(), right),
    }
    if teacher is not None:
        logq = F.log_softmax(teacher.float(), 1)
        values["agreement"] = (answer == teacher.argmax(1)).float().mean()
        values["teacher_kl"] = (logq.exp() * (logq - logp)).sum(1).mean()
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def expected_calibration_error(probs: Tensor, right: Tensor, bins: int = 15) -> Tensor:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, eq. 3); probs [N, C], right [N]
    bool: whether each answer is."""
    confidence = probs.amax(1)
    slot = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = right.float() - confidence
    return torch.zeros(bins, device=probs.device).index_add_(0, slot, gap).abs().sum() / len(right)
