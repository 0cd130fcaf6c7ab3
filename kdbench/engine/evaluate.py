"""A network over a whole validation or test set, without a DataLoader and with one host sync."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdbench.data.batches import EvaluationBatches
from kdbench.engine.fidelity import fidelity
from kdbench.engine.metrics import measure_logits
from kdbench.results.predictions import MOST, Predictions, predictions
from kdbench.types import Batch

log = logging.getLogger(__name__)


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


def in_float32() -> AbstractContextManager[object]:
    """A block whose convolutions and matrix products are float32's own on every device: no TF32."""
    return torch.backends.cudnn.flags(allow_tf32=False) if torch.cuda.is_available() else nullcontext()


def all_logits(network: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and labels [N] of a whole set, in its own order, on the device.

    In float32 whatever a training computes in: bfloat16 rounds one image in 400 to a tie or to another answer.
    """
    logits, labels = [], []
    with evaluating(network), in_float32():
        for batch in batches:
            logits.append(network(batch.input).logits.float())
            labels.append(batch.target.label)
    return torch.cat(logits), torch.cat(labels)


@dataclass(frozen=True)
class Evaluator:
    """The sets that a student in training is measured on, every so many epochs."""

    sets: Mapping[str, Iterable[Batch]]  # "val" (if any) and "test"
    reference: Mapping[str, Tensor]  # the teacher's logits on each of them; empty without a teacher
    every: int = 1

    def after(self, epoch: int, network: nn.Module, always: bool = False) -> dict[str, float]:
        """`evaluate` on each set, "test/top1", ..., where that is due after this epoch (counted from 0) or `always`."""
        if not always and (epoch + 1) % self.every:
            return {}
        found = {name: evaluate(network, batches, self.reference.get(name)) for name, batches in self.sets.items()}
        return {f"{name}/{key}": value for name, values in found.items() for key, value in values.items()}

    def predictions(self, network: nn.Module) -> Predictions | None:
        """Of a finished student on the test set; None of a set of more than a million images. Costs a pass over it."""
        logits, labels = all_logits(network, self.sets["test"])
        return keepable(logits, labels, self.reference.get("test"))


def keepable(logits: Tensor, label: Tensor, teacher: Tensor | None = None) -> Predictions | None:
    """Logits [N, C] of a network, and of its teacher, with labels [N], as a run keeps them; None of too many images."""
    if len(label) > MOST:
        log.info("predictions of %d test samples are not kept: a run keeps those of up to %d", len(label), MOST)
        return None
    answer, probability = logits.argmax(1), logits.float().softmax(1).amax(1)
    theirs = None if teacher is None else teacher.argmax(1).cpu().numpy()
    return predictions(label.cpu().numpy(), answer.cpu().numpy(), probability.cpu().numpy(), theirs)


def evaluate(network: nn.Module, batches: Iterable[Batch], teacher: Tensor | None = None) -> dict[str, float]:
    """`measure_logits` of a network; `teacher` [N, C] are the teacher's logits on the same set, in the same order."""
    logits, labels = all_logits(network, batches)
    return measure_logits(logits, labels, teacher, _posterior(batches))


def _posterior(batches: Iterable[Batch]) -> Tensor | None:
    return batches.posterior if isinstance(batches, EvaluationBatches) else None


def compare_networks(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`measure_logits` of the student against the teacher's logits, and `fidelity` (Kim et al. 2021) of the two."""
    logits, norm, labels = _answers(student, batches)
    said, teacher_norm, _ = _answers(teacher, batches)
    norms = {"feature_norm": norm, "teacher_feature_norm": teacher_norm}
    known = {name: value for name, value in norms.items() if value is not None}
    return measure_logits(logits, labels, said, _posterior(batches)) | fidelity(logits, said, labels) | known


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
