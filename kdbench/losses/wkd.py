"""Wasserstein distillation of logits: moving probability between classes that are alike costs little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import NotNegative, Positive, Share, Text, within
from kdbench.errors import UserError, require
from kdbench.losses.adapters import classifier_of, last_stage
from kdbench.losses.base import DistillationLoss, Moderate, Seen, Smoothing, Steps, Weights, detached, number
from kdbench.losses.functional import class_index, log_probs, mean_over, real
from kdbench.types import LossTerms, Outputs, Parts, Target

SMALL = 1e-8  # the authors', in costs and divisors
HELD = 2**29  # numbers of the products between classes that are held at once for CKA: 2 GiB in float32
PASSES = 64  # of the teacher over the training set at most


def transport_rows(p: Tensor, q: Tensor, there: Tensor, cost: Tensor, blur: float, iterations: int) -> Tensor:
    """Cost [B] of the entropic optimal transport from p to q, both [B, C], after `iterations` of Sinkhorn's (Cuturi
    2013). cost [C, C]; there [B, C]: 1 for the classes that take part, 0 for the others, where p and q are 0."""
    kernel = (-cost / blur).exp()
    u = there / there.sum(-1, keepdim=True)
    v = torch.zeros_like(u)
    for _ in range(iterations):
        v = q / (u @ kernel + SMALL)
        u = p / (v @ kernel.mT + SMALL)
    return ((u @ (kernel * cost)) * v).sum(-1)


def finest(x: Tensor) -> Tensor:
    """float64, where the device has it: ten divisions by numbers near 1e-8 leave the range of float32 gradients."""
    return x if x.device.type == "mps" else x.double()


def cka_distances(passes: Callable[[], Iterable[Tensor]], classes: int, width: int) -> Tensor:
    """1 - linear CKA [C, C] (Kornblith et al. 2019, on centred features): 1 - |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms.
    1 for a class whose rows are all the same.

    `passes` gives the rows [B, C D], one of every class side by side, as often as it is called: for each of `blocks`.
    """
    shared = torch.zeros(classes, classes)
    for first, last in blocks(classes, width):
        products = centred_products(passes(), slice(first * width, last * width), slice(first * width, None))
        norms = torch.linalg.vector_norm(products.view(last - first, width, -1, width), dim=(1, 3))
        shared = shared.to(norms)
        shared[first:last, first:] = norms.square()
    shared = shared.triu() + shared.triu(1).mT
    norms = shared.diagonal().sqrt().clamp_min(1e-12)
    return 1 - shared / (norms[:, None] * norms)


def blocks(classes: int, width: int) -> list[tuple[int, int]]:
    """Classes [first, last) whose products with all from `first` on are summed in one pass: HELD numbers, or those of
    one class."""
    found, first = [], 0
    while first < classes:
        last = min(classes, first + max(1, HELD // ((classes - first) * width**2)))
        found.append((first, last))
        first = last
    return found


def centred_products(batches: Iterable[Tensor], own: slice, others: slice) -> Tensor:
    """X'Y of the columns `own` and `others` of all rows [B, D] together, less their means. These are known at the end:
    what is summed lies around the first batch's, so that little is taken off again. Raises UserError for no rows."""
    shift, gram, total, count = torch.empty(0), torch.empty(0), torch.empty(0), 0
    for rows in batches:
        if not count:
            shift, total = rows.mean(0), torch.zeros_like(rows[0])
            gram = rows.new_zeros(len(total[own]), len(total[others]))
        rows = rows - shift
        gram.addmm_(rows[:, own].mT, rows[:, others])
        total += rows.sum(0)
        count += len(rows)
    require(count > 0, "cost", "cka", "classifier or a file: a class has no training image to compare")
    return gram.addr_(total[own], total[others], alpha=-1 / count)


def side_by_side(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Iterator[Tensor]:
    """Rows [B, C D], the places of one image of every class, from (maps [B, D, H, W], label) in turn (`Seen`)."""
    held = torch.empty(0)
    for values, _ in batches:
        maps = real(values).flatten(2)
        held = torch.cat([held, maps]) if len(held) else maps
        whole = len(held) // classes
        if whole:
            rounds = held[: whole * classes].unflatten(0, (whole, classes))
            yield rounds.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
            held = held[whole * classes :]


def cosine_distances(rows: Tensor) -> Tensor:
    """1 - cos [C, C] of the rows [C, D]."""
    rows = F.normalize(real(rows.detach()), dim=-1)
    return 1 - rows @ rows.mT


class WKD(DistillationLoss):
    """weights.task CE(y, s) + weights.target (-p_y log q_y) + weights.distill d W(N(s/tau), N(t/tau)), p and q the
    softmaxes of t and s, N the softmax over all classes but y (Lv et al. 2024, WKD-L).

    W: the cost of transport at `iterations` of Sinkhorn's with the regularisation `blur`, where moving from class i to
    j costs 1 - exp(-sharpen c_ij). `cost`: classifier, c = 1 - cos of the rows of the teacher's last layer; cka, c = 1
    less linear CKA of two classes' training images in the teacher's last stage (of a wide ResNet before its last batch
    norm and ReLU), image beside image and place beside place, as many of each class as the smallest has: the authors'
    on CIFAR-100, where classes are of one size; or a file (.pt, .npy) with a matrix [C, C], such as the authors' for
    ImageNet, which are of logits. cka costs passes of the teacher over the training set and 2 GiB at most: 1 pass for
    100 classes and 128 channels, 2 for 256, 56 for 2048. d falls from 1 to 0 along half a cosine after the share
    `decay` of the training (the authors: after 150 of 240 epochs). Needs one class a sample; averaged over labelled
    samples.
    """

    costs: Tensor
    terms: ClassVar[tuple[str, ...]] = ("task", "target", "distill")
    needs_one_class = True
    paper: ClassVar[str] = "Lv et al. 2024 (WKD-L)"

    def __init__(
        self,
        weights: Weights,
        tau: Moderate = 8.0,
        cost: Text = "classifier",
        sharpen: NotNegative = 1.0,
        blur: Positive = 0.05,
        iterations: Annotated[int, within(1, 1000)] = 10,
        decay: Share = 150 / 240,
        steps: Steps = "batch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.steps = steps
        self.tau, self.cost, self.sharpen = tau, cost, sharpen
        self.blur, self.iterations, self.decay = blur, iterations, decay
        self.register_buffer("costs", torch.empty(0))
        self.place = "stage3" if cost == "cka" else ""  # or another last stage: known from `setup` on
        self.channels = 0  # its

    @property
    def least_classes(self) -> int:
        return 3  # of two classes, one is all the others

    @property
    def formula(self) -> str:
        distill = f"{'d ' if self.decay < 1 else ''}W(N(s/tau), N(t/tau))"
        text = self.written(task=self.task_text, target="(-p_y log q_y)", distill=distill)
        own = {"classifier": "c = 1 - cos of t's classifier", "cka": "c = 1 - linear CKA of t's maps by class"}
        cost = own.get(self.cost, f"c of {Path(self.cost).name}")
        sinkhorn = f"{self.iterations} iterations at blur {number(self.blur)}"
        falls = f", d falls from 1 to 0 after {number(self.decay)} of the training" if self.decay < 1 else ""
        moved = f"W: transport at cost 1 - exp(-{number(self.sharpen)} c), {cost}, {sinkhorn}"
        return f"{text}, N: softmax over all classes but y, {moved}, tau = {number(self.tau)}{falls}"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        if self.cost == "classifier" and teacher is not None:
            self._set(cosine_distances(classifier_of(teacher, "wkd").weight))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for costs that are not one a pair of classes."""
        classes = student.logits.shape[-1]
        if self.cost == "cka":
            self._compared(teacher, classes)
            self._set(torch.zeros(classes, classes, device=student.logits.device))  # until `survey`, or a checkpoint
        elif self.cost != "classifier":
            self._set(read_costs(self.cost).to(student.logits.device))
        allowed = f"a matrix of {classes} x {classes} numbers of at least 0"
        own = "classifier: the teacher's last layer has no row for each class; name a file"
        fits = tuple(self.costs.shape) == (classes, classes)
        require(fits, "cost", self.cost, own if self.cost == "classifier" else allowed)

    @property
    def surveyed(self) -> str:
        return self.place

    def _compared(self, teacher: Outputs | None, classes: int) -> None:
        if teacher is None:
            return
        self.place = last_stage(teacher)
        values = teacher.features.get(self.place, teacher.logits)
        require(values.dim() == 4, "cost", self.cost, "classifier or a file: the teacher has no stage that gives a map")
        self.channels = values.shape[1]
        passes = len(blocks(classes, self.channels))
        what = f"{passes} passes of the teacher for {classes} classes and {self.channels} channels"
        require(passes <= PASSES, "cost", self.cost, f"classifier or a file: it would take {what}")

    def survey(self, seen: Seen) -> None:
        """Raises UserError for a class without images."""
        classes = len(self.costs)
        self._set(cka_distances(lambda: side_by_side(seen.in_turn(classes), classes), classes, self.channels))

    def _set(self, distances: Tensor) -> None:
        sharpened = 1 - (-self.sharpen * distances).exp() if self.sharpen else distances
        self.costs = sharpened.relu() + SMALL

    def falling(self, progress: Tensor) -> Tensor:
        """d (0-dim)."""
        if self.decay >= 1:
            return torch.ones_like(progress)
        done = ((self.reached(progress) - self.decay) / (1 - self.decay)).clamp(0, 1)
        return (1 + torch.cos(math.pi * done)) / 2

    def moved(self, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        """W a sample [B]."""
        own = torch.zeros_like(student, dtype=torch.bool).scatter(-1, index.unsqueeze(-1), True)
        q, p = (finest(z / self.tau).masked_fill(own, float("-inf")).softmax(-1) for z in (student, teacher))
        rows = transport_rows(q, p, (~own).to(p.dtype), self.costs.to(p.dtype), self.blur, self.iterations)
        return rows.to(student.dtype)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = detached(teacher, "wkd")
        index, labelled = class_index(target.label, "wkd")
        own = index.unsqueeze(-1)
        log_q = log_probs(student.logits)
        goal = -(log_probs(t).gather(-1, own).exp() * log_q.gather(-1, own)).squeeze(-1)
        moved = mean_over(self.moved(student.logits.to(log_q.dtype), t, index), labelled)
        return self.combine(
            task=self.task(student.logits, target.label),
            target=mean_over(goal, labelled),
            distill=self.falling(target.progress) * moved,
        )


def read_costs(name: str) -> Tensor:
    """A matrix [C, C] float32 from a .pt or .npy file. Raises UserError for a file that holds none."""
    import numpy

    readers = {
        ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True),
        ".pth": lambda path: torch.load(path, map_location="cpu", weights_only=True),
        ".npy": lambda path: torch.from_numpy(numpy.load(path, allow_pickle=False)),
    }
    path = Path(name)
    require(path.suffix in readers, "cost", name, "classifier, cka, or a file .pt or .npy")
    try:
        found = readers[path.suffix](path)
    except Exception as error:  # an unpickler raises whatever it meets
        raise UserError("cost", name, f"a readable file: {type(error).__name__}") from error
    square = isinstance(found, Tensor) and found.dim() == 2 and found.shape[0] == found.shape[1]
    require(square and bool(found.isfinite().all()), "cost", name, "a file with one square matrix of finite numbers")
    return found.float()
