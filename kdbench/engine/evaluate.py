"""A network over a whole validation or test set, without a DataLoader and with one host sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdbench.engine.device import Placement
from kdbench.engine.metrics import report
from kdbench.types import EvalBatches


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


def all_logits(network: nn.Module, batches: EvalBatches, placement: Placement) -> tuple[Tensor, Tensor]:
    """Logits [N, C] float32 and labels [N] of a whole set, in its own order, on the device."""
    logits, labels = [], []
    with evaluating(network), placement.autocast():
        for batch in batches:
            logits.append(network(batch.input).logits.float())
            labels.append(batch.target.label)
    return torch.cat(logits), torch.cat(labels)


def evaluate(
    network: nn.Module, batches: EvalBatches, placement: Placement, teacher: Tensor | None = None
) -> dict[str, float]:
    """`metrics.report` of a network; `teacher` [N, C] are the teacher's logits on the same set, in the same order."""
    logits, labels = all_logits(network, batches, placement)
    return report(logits, labels, teacher)
