"""A frozen network that is asked anew for every batch."""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kdbench.types import Batch, Outputs, Teacher

Context = Callable[[], AbstractContextManager[object]]


def freeze(network: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: what every teacher is."""
    return network.eval().requires_grad_(False)


class LiveTeacher(Teacher):
    """Outputs of a frozen network for the inputs of a batch.

    They go through in chunks of one fixed size (`chunk`; the last one padded), because the last bit of a logit may
    depend on the shape of the batch that it was computed in. So a table filled in chunks of the same size holds exactly
    these numbers. `context` makes the precision context, `torch.autocast` or nothing.
    `own`: what the network reads of every row of the original training set, where that is not what its students read.
    """

    def __init__(self, network: nn.Module, chunk: int, context: Context, own: Tensor | None = None) -> None:
        self.network = freeze(network)
        self.chunk = chunk
        self.context = context
        self.own = own

    def __call__(self, batch: Batch) -> Outputs:
        return self.outputs(self.inputs(batch))

    def inputs(self, batch: Batch) -> Tensor:
        """What it reads of a batch [B, ...]."""
        if self.own is None:
            return batch.input
        # Held-out samples (row -1) are asked for when a loss wants to know shapes: the first row has them, too.
        return self.own.index_select(0, batch.target.row.clamp_min(0))

    def outputs(self, inputs: Tensor, needs: Set[str] | None = None) -> Outputs:
        """inputs [B, ...] normalised, any B; logits and features in the precision of the network.

        `needs`: the features that are kept of every chunk; None: all.
        """
        size = len(inputs)
        with torch.no_grad(), self.context():
            parts = [_of(self._whole(piece), needs) for piece in inputs.split(self.chunk)]
        padded = self.chunk * len(parts)
        if len(parts) == 1:
            return _first(parts[0], size, padded)
        features = {key: torch.cat([p.features[key] for p in parts]) for key in parts[0].features}
        return _first(Outputs(torch.cat([p.logits for p in parts]), features), size, padded)

    def _whole(self, inputs: Tensor) -> Outputs:
        missing = self.chunk - len(inputs)
        if missing:
            # With the strides of a whole chunk: they may decide how a library computes. Filled up with what the network
            # has seen anyway: a text of padding alone would stop some of them.
            shape = (self.chunk, *inputs.shape[1:])
            whole = torch.empty_strided(shape, inputs.stride(), dtype=inputs.dtype, device=inputs.device)
            whole[len(inputs) :] = inputs[:1]
            whole[: len(inputs)] = inputs
            inputs = whole
        return self.network(inputs)


def chunk_for(device: torch.device, batch_size: int) -> int:
    """How many images a teacher computes at once.

    On a CPU always 32, so that runs of any batch size give the same numbers and share a table; measured, nothing is
    slower than with whole batches of 128 (the caches like it), but batches that are no multiple of 32 pay for the
    padding. On a GPU small chunks cost kernel launches: there it is the largest power of two within the batch, between
    64 and 512, and runs share a table if that is the same.
    """
    if device.type == "cpu":
        return 32
    return min(512, max(64, 1 << (batch_size.bit_length() - 1)))


def _of(outputs: Outputs, needs: Set[str] | None) -> Outputs:
    if needs is None:
        return outputs
    return outputs._replace(features={key: value for key, value in outputs.features.items() if key in needs})


def _first(outputs: Outputs, size: int, padded: int) -> Outputs:
    """What belongs to the first `size` of `padded` inputs; an input may have several rows, as a text's blocks do."""
    if size == padded:
        return outputs
    features = {key: value[: len(value) // padded * size] for key, value in outputs.features.items()}
    return Outputs(outputs.logits[: len(outputs.logits) // padded * size], features)
