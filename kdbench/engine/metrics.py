"""What is measured: running sums during training, and what a network's logits on a labelled set come to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.engine.embeddings import measure_embeddings
from kdbench.results.metrics import CLASSIFICATION, EMBEDDING, LANGUAGE_MODELLING, Task
from kdbench.types import ANSWER, Outputs, StepOutput, Target


class Meters:
    """What happened in each step of an epoch, kept on the device and read once, at its end: no host sync in a step.

    A step only puts its loss terms and its answers down, in place and at a place that is counted on the device, so that
    a CUDA graph may hold it: three small kernels, the largest logits, one row of it all, the row's copy (and the count,
    and the teacher's largest logits where nobody has looked for them yet). Answers are compared and terms added up once
    an epoch. `truth` int64 [rows of the training set] are the true labels where the training labels are noisy, -1 where
    unknown. `task`: whose primary metric is measured too.
    """

    def __init__(
        self, device: torch.device, steps: int, truth: Tensor | None = None, task: Task = CLASSIFICATION
    ) -> None:
        self.steps, self._task = steps, task
        self.step = torch.zeros(1, dtype=torch.int64, device=device)  # of the epoch
        self._truth = truth.to(device) if truth is not None else None
        # [steps, words] int32: the bits of the answers [columns, B] int64, -1: none known, and of the terms float32.
        self._rows: Tensor | None = None
        self._names: list[str] = []  # of the loss and its terms
        self._columns: list[str] = []  # the student's answer, and what it is compared with
        self._predictions = 0  # B

    def reset(self) -> None:
        """Begin an epoch."""
        self.step.zero_()

    @torch.no_grad()
    def add(self, output: StepOutput, teacher: Outputs | None, target: Target) -> None:
        """One step: the loss and its terms, and the answers of the student, the labels and the teacher.

        Images without a label, or without a true one, have no part in the accuracies.
        """
        terms = {"loss": output.terms.total, **{f"loss_{k}": v for k, v in output.terms.parts.items()}}
        if self._task is LANGUAGE_MODELLING:
            terms["nll"] = F.cross_entropy(output.logits.float(), target.label, ignore_index=-1)
        answers = {"student": output.logits.argmax(1), "top1": _labels(target.label)}
        if self._truth is not None:
            answers["clean_top1"] = self._truth[target.row]
        if teacher is not None:
            answers["agreement"] = teacher.features[ANSWER] if ANSWER in teacher.features else teacher.logits.argmax(1)
        missing = self._predictions - len(answers["student"])
        if self._rows is None:
            self._names, self._columns, self._predictions, missing = list(terms), list(answers), -missing, 0
        elif missing > 0:  # in an epoch's last, smaller batch
            answers = {name: F.pad(said, (0, missing), value=-2) for name, said in answers.items()}
        elif missing < 0:  # of a text with padding: more of it counts than in the batches before
            self._widen(-missing)
        found = [value.float().reshape(1) for value in terms.values()]
        row = torch.cat([part.view(torch.int32) for part in (*answers.values(), *found)])
        if self._rows is None:
            self._rows = row.new_zeros(self.steps, len(row))
        self._rows.index_copy_(0, self.step, row[None])
        self.step.add_(1)

    def _found(self, steps: int) -> tuple[Tensor, Tensor]:
        """Of the first steps the terms [steps, names] float32 and the answers [steps, columns, B] int64."""
        assert self._rows is not None, "read() before the first step"
        answers, terms = self._rows[:steps].split([self._rows.shape[1] - len(self._names), len(self._names)], 1)
        said = answers.flatten().view(torch.int64).view(steps, len(self._columns), self._predictions)
        return terms.flatten().view(torch.float32).view(steps, len(self._names)), said

    def _widen(self, more: int) -> None:
        terms, answers = self._found(self.steps)
        wide = F.pad(answers, (0, more), value=-2).flatten(1)
        self._rows = torch.cat([wide.view(torch.int32), terms.view(torch.int32)], 1)
        self._predictions += more

    def read(self) -> tuple[dict[str, float], int | None]:
        """Means by name (those of any image at all), and the first step (from 0) whose loss was not finite, or None.

        The epoch's only sync. A step's terms are means of its images, and count for as many.
        """
        found = self._found(int(self.step))
        terms, answers = found[0].cpu().double(), found[1].cpu()
        images = (answers[:, 0] >= 0).sum(1).double()
        means = dict(zip(self._names, ((terms * images[:, None]).sum(0) / images.sum()).tolist(), strict=True))
        for number, name in enumerate(self._columns[1:], start=1):
            known = answers[:, number] >= 0
            if known.any():
                means[name] = float((answers[:, 0] == answers[:, number])[known].double().mean())
        bad = (~torch.isfinite(terms[:, 0])).nonzero()
        means = of_task(means, self._task)
        return means, int(bad[0]) if len(bad) else None


def _labels(label: Tensor) -> Tensor:
    """The label of each image, -1 where it has none; of a mixture the label that weighs most."""
    if label.ndim == 1:
        return label
    weight, largest = label.max(1)
    return largest.masked_fill(weight <= 0, -1)


def measure_logits(
    logits: Tensor, label: Tensor, teacher: Tensor | None = None, posterior: Tensor | None = None
) -> dict[str, float]:
    """Accuracy, calibration and fidelity of `logits` [N, C] against `label` [N] and, if given, `teacher` logits [N, C]
    and the true probabilities `posterior` [N, C].

    top1, top5 and agreement are fractions; nll and teacher_kl (KL from teacher to student at temperature 1, the
    fidelity of Stanton et al. 2021) are in nats; ece is the expected calibration error with 15 equal bins (Guo et al.
    2017); f1 and mcc are of two classes alone; posterior_l2 the mean of |p - p*|_2, the error that bounds a student's
    risk (Zhang et al. 2024, section 4.1).
    """
    return combined([piece_figures(logits, label, teacher, posterior)])


def of_task(values: Mapping[str, float], task: Task) -> dict[str, float]:
    """Figures with the one that the task is judged by: of a language model the perplexity, exp of the nll."""
    if task is not LANGUAGE_MODELLING or not math.isfinite(values["nll"]):
        return dict(values)
    return {"ppl": math.exp(min(values["nll"], 700.0)), **values}


def task_figures(
    task: Task, logits: Tensor, label: Tensor, teacher: Tensor | None = None, posterior: Tensor | None = None
) -> dict[str, float]:
    """What a network's answers on a whole labelled set come to, by its task; arguments as those of `measure_logits`."""
    if task is EMBEDDING:
        return measure_embeddings(logits, label, teacher)
    return of_task(measure_logits(logits, label, teacher, posterior), task)


class Figures(NamedTuple):
    """What a piece of a set comes to, on the device."""

    means: dict[str, Tensor]  # over the piece's predictions, 0-dim
    gaps: Tensor  # [bins] confidence less accuracy, summed: bins of the expected calibration error
    predictions: int
    outcomes: Tensor | None = None  # [4] of two classes: how often each was answered, by label


def piece_figures(
    logits: Tensor, label: Tensor, teacher: Tensor | None = None, posterior: Tensor | None = None
) -> Figures:
    """As `measure_logits`, of a piece."""
    logp = F.log_softmax(logits.float(), 1)
    # One answer an image, for every figure: topk breaks ties in another way than argmax does.
    answer = logits.argmax(1)
    right = answer == label
    among = (logp.topk(min(5, logp.shape[1]), 1).indices == label[:, None]).any(1)
    values = {
        "top1": right.float().mean(),
        "top5": (among | right).float().mean(),
        "nll": F.nll_loss(logp, label),
    }
    gaps = confidence_gaps(logp.exp(), right)
    outcomes = torch.bincount(2 * label + answer, minlength=4) if logp.shape[1] == 2 else None
    if outcomes is not None:
        values |= of_outcomes(outcomes)
    if teacher is not None:
        logq = F.log_softmax(teacher.float(), 1)
        values["agreement"] = (answer == teacher.argmax(1)).float().mean()
        values["teacher_kl"] = (logq.exp() * (logq - logp)).sum(1).mean()
    if posterior is not None:
        values["posterior_l2"] = (logp.exp() - posterior).norm(dim=1).mean()
    return Figures(values, gaps, len(label), outcomes)


def of_outcomes(outcomes: Tensor) -> dict[str, Tensor]:
    """F1 of the second class and the Matthews correlation (GLUE's figures for MRPC and CoLA), of counts [4]: how often
    0 was answered rightly, 1 wrongly, 0 wrongly, 1 rightly; 0 where a denominator is 0, as scikit-learn has it."""
    counts = outcomes.cpu().double()  # MPS has no float64
    true_no, false_yes, false_no, true_yes = counts.unbind()
    beside = (true_yes + false_yes) * (true_yes + false_no) * (true_no + false_yes) * (true_no + false_no)
    f1 = 2 * true_yes / (2 * true_yes + false_yes + false_no).clamp_min(1)
    # A correlation of integers whose product is 0 where one of the four sums is.
    mcc = (true_yes * true_no - false_yes * false_no) / beside.sqrt().clamp_min(1)
    return {"f1": f1.float().to(outcomes.device), "mcc": mcc.float().to(outcomes.device)}


def combined(pieces: Iterable[Figures]) -> dict[str, float]:
    """The figures of a whole set by its pieces: means over all predictions. One host sync for each piece, whose small
    tensors are not kept: they would lie between the large ones of the next, whose memory could not be used again."""
    names: list[str] = []
    listed, counts, outcomes = [], [], []
    for piece in pieces:
        names = list(piece.means)
        listed.append(torch.cat([torch.stack([*piece.means.values()]), piece.gaps]).tolist())
        counts.append(piece.predictions)
        outcomes += [] if piece.outcomes is None else [piece.outcomes.tolist()]
    whole = sum(counts)
    shares = [count / whole for count in counts]
    gaps = torch.tensor([row[len(names) :] for row in listed]).sum(0)
    values = [row[: len(names)] for row in listed]
    found: dict[str, float] = {}
    for name, column in zip(names, zip(*values, strict=True), strict=True):
        found[name] = column[0] if len(counts) == 1 else math.fsum(share * v for share, v in zip(shares, column))
        if name == "nll":
            found["ece"] = float(gaps.abs().sum() / whole)
    if len(outcomes) > 1:  # no means over predictions
        found |= {name: float(value) for name, value in of_outcomes(torch.tensor(outcomes).sum(0)).items()}
    return found


def confidence_gaps(probs: Tensor, right: Tensor, bins: int = 15) -> Tensor:
    """[bins] by how much accuracy exceeds confidence in equal-width bins of confidence, summed over predictions; the
    sum of their sizes, divided by N, is the expected calibration error as Guo et al. 2017 estimate it. probs [N, C],
    right [N] bool: whether each answer is."""
    confidence = probs.amax(1)
    slot = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = right.float() - confidence
    return torch.zeros(bins, device=probs.device).index_add_(0, slot, gap)
