"""A network over a whole validation or test set, without a DataLoader and with one host sync."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdbench.data.batches import EvaluationBatches
from kdbench.engine.device import allows_tf32
from kdbench.engine.fidelity import fidelity
from kdbench.engine.metrics import Figures, combined, of_task, piece_figures, task_figures
from kdbench.results.metrics import CLASSIFICATION, EMBEDDING, Task
from kdbench.results.predictions import MOST, Predictions, predictions
from kdbench.types import Batch, Outputs, counted

log = logging.getLogger(__name__)

PIECE = 2**21  # logits that are measured at once: 8 MB, and what is computed of them about ten times as much
KEPT = 2**26  # logits of a teacher on a set that are kept: 256 MB; of more it is asked again after every epoch

Reference = Tensor | nn.Module  # a teacher's logits on a set [N, C]; or, where these are too many, the teacher


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and the mode that was there before after it."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


@contextmanager
def in_float32() -> Iterator[None]:
    """A block whose convolutions and matrix products are float32's own on every device: no TF32.

    Not torch.backends.cudnn.flags: what it is not told it sets to its defaults, and one of them is no cuDNN at all.
    """
    backends: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [allows_tf32(backend) for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def all_logits(network: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and labels [N] of a whole set, in its own order, on the device.

    In float32 whatever a training computes in: bfloat16 rounds one image in 400 to a tie or to another answer.
    """
    logits, labels = [], []
    with evaluating(network), in_float32():
        for batch in batches:
            logits.append(counted(network(batch.input), batch.target).logits.float())
            labels.append(batch.target.label)
    return torch.cat(logits), torch.cat(labels)


def logits_kept(batches: EvaluationBatches, classes: int) -> bool:
    """Whether a network's logits on a set are few enough to be kept in memory."""
    return batches.size * batches.predictions * classes <= KEPT


@dataclass(frozen=True)
class Evaluator:
    """The sets that a student in training is measured on, every so many epochs."""

    sets: Mapping[str, Iterable[Batch]]  # "val" (if any) and "test"
    reference: Mapping[str, Reference]  # the teacher's on each of them; empty without a teacher
    every: int = 1

    def after(self, epoch: int, network: nn.Module, always: bool = False) -> dict[str, float]:
        """`evaluate` on each set, "test/top1", ..., where that is due after this epoch (counted from 0) or `always`."""
        if not always and (epoch + 1) % self.every:
            return {}
        found = {name: evaluate(network, batches, self.reference.get(name)) for name, batches in self.sets.items()}
        return {f"{name}/{key}": value for name, values in found.items() for key, value in values.items()}

    def predictions(self, network: nn.Module) -> Predictions | None:
        """Of a finished student on the test set; None of a set of more than a million images, and of a text, whose
        tokens are no sample of separate things. Costs a pass over it."""
        if _task(self.sets["test"]) is not CLASSIFICATION:
            return None
        logits, labels = all_logits(network, self.sets["test"])
        teacher = self.reference.get("test")
        return keepable(logits, labels, teacher if isinstance(teacher, Tensor) else None)


def keepable(logits: Tensor, label: Tensor, teacher: Tensor | None = None) -> Predictions | None:
    """Logits [N, C] of a network, and of its teacher, with labels [N], as a run keeps them; None of too many images."""
    if len(label) > MOST:
        log.info("predictions of %d test samples are not kept: a run keeps those of up to %d", len(label), MOST)
        return None
    answer, probability = logits.argmax(1), logits.float().softmax(1).amax(1)
    theirs = None if teacher is None else teacher.argmax(1).cpu().numpy()
    return predictions(label.cpu().numpy(), answer.cpu().numpy(), probability.cpu().numpy(), theirs)


def evaluate(network: nn.Module, batches: Iterable[Batch], teacher: Reference | None = None) -> dict[str, float]:
    """`measure_logits` of a network, and what its task is judged by; `teacher`: its logits [N, C] on the same set, in
    the same order, or the network that is asked for them.

    The set goes through in pieces of `PIECE` logits: those of a whole text (82,430 tokens of Penn Treebank, 10,000
    words) would be 3.3 GB. A set that is one piece has the figures of `measure_logits` to the last bit. Embeddings are
    measured as a whole: neighbours may be anywhere.
    """
    if _task(batches) is EMBEDDING:
        embeddings, label = all_logits(network, batches)
        return task_figures(EMBEDDING, embeddings, label, teacher if isinstance(teacher, Tensor) else None)
    with evaluating(network), asked(teacher), in_float32():
        found = combined(piece_figures(*piece[:4]) for piece in _pieces(network, batches, teacher))
    return of_task(found, _task(batches))


def compare_networks(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`evaluate` of the student against the teacher, and `fidelity` (Kim et al. 2021) of the two, with the mean
    Euclidean norms of what their last layers read."""
    with evaluating(student), asked(teacher), in_float32():
        found = combined(_compared(piece) for piece in _pieces(student, batches, teacher))
    return of_task(found, _task(batches))


class _Piece(NamedTuple):
    """Predictions of a set that follow each other."""

    logits: Tensor  # [n, C]
    label: Tensor  # [n]
    teacher: Tensor | None  # [n, C]
    posterior: Tensor | None  # [n, C]
    norms: dict[str, Tensor]  # "feature_norm" and "teacher_feature_norm" [n], where the networks have such features


_Answer = tuple[Outputs, Tensor, Outputs | None]  # to a batch: the network's, the labels, the teacher's


def _pieces(network: nn.Module, batches: Iterable[Batch], teacher: Reference | None) -> Iterator[_Piece]:
    """Whole batches together, at least PIECE logits (but the last)."""
    known = batches.posterior if isinstance(batches, EvaluationBatches) else None
    first = last = 0
    part: list[_Answer] = []
    for batch in batches:
        own = counted(network(batch.input), batch.target)
        theirs = counted(teacher(batch.input), batch.target) if isinstance(teacher, nn.Module) else None
        part.append((own, batch.target.label, theirs))
        last += len(own.logits)
        if (last - first) * own.logits.shape[1] >= PIECE:
            piece = _joined(part, teacher, known, slice(first, last))
            part, first = [], last  # not held while it is measured
            yield piece
    if part:
        yield _joined(part, teacher, known, slice(first, last))


def _joined(part: Sequence[_Answer], teacher: Reference | None, known: Tensor | None, here: slice) -> _Piece:
    own, theirs = [one[0] for one in part], [one[2] for one in part if one[2] is not None]
    said = teacher[here] if isinstance(teacher, Tensor) else _logits(theirs) if theirs else None
    norms = {}
    for name, outputs in (("feature_norm", own), ("teacher_feature_norm", theirs)):
        if outputs and "pooled" in outputs[0].features:
            norms[name] = torch.cat([one.features["pooled"].float().norm(dim=1) for one in outputs])
    posterior = None if known is None else known[here]
    return _Piece(_logits(own), torch.cat([one[1] for one in part]), said, posterior, norms)


def _logits(outputs: Sequence[Outputs]) -> Tensor:
    return torch.cat([one.logits.float() for one in outputs])


def _compared(piece: _Piece) -> Figures:
    figures = piece_figures(*piece[:4])
    assert piece.teacher is not None
    distances = fidelity(piece.logits, piece.teacher, piece.label)
    more = {name: piece.logits.new_tensor(value) for name, value in distances.items()}
    return figures._replace(means=figures.means | more | {name: norm.mean() for name, norm in piece.norms.items()})


def asked(teacher: Reference | None) -> AbstractContextManager[object]:
    """A block in which a teacher that is a network is in evaluation mode."""
    return evaluating(teacher) if isinstance(teacher, nn.Module) else nullcontext()


def _task(batches: Iterable[Batch]) -> Task:
    return batches.task if isinstance(batches, EvaluationBatches) else CLASSIFICATION
