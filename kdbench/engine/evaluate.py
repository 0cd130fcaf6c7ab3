"""A network over a whole validation or test set, without a DataLoader and with one host sync."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from kdbench.engine.metrics import report
from kdbench.types import Batch


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


def evaluate(network: nn.Module, batches: Iterable[Batch], teacher: Tensor | None = None) -> dict[str, float]:
    """`metrics.report` of a network; `teacher` [N, C] are the teacher's logits on the same set, in the same order."""
    logits, labels = all_logits(network, batches)
    return report(logits, labels, teacher)
