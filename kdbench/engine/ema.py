"""A moving average of a network's weights, without the host sync a step of torch's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """average <- d average + (1 - d) network, of weights and floating buffers, from a copy of the network as it is.

    In update t (from 0) d is min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage: without this
    warm-up the random weights of the start weigh decay^t, which is half of the average after 700 updates at 0.999.
    Batch norm's statistics are averaged like the weights that they belong to (timm's ModelEmaV3); counters are copied.
    `network` is what is evaluated. torch's AveragedModel reads a counter from the device in every update, which no CUDA
    graph can record; here the count stays on the device, and an update is a few kernels for all tensors together.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._averaged = [pair for pair in pairs if pair[1].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[1].is_floating_point()]
        self._decay = decay
        self._updates = torch.zeros((), device=pairs[0][0].device)

    @torch.no_grad()
    def update(self) -> None:
        share = 9 / (10 + self._updates)  # 1 - (1 + t) / (10 + t)
        share.clamp_min_(1 - self._decay)
        ours, theirs = [pair[0] for pair in self._averaged], [pair[1] for pair in self._averaged]
        steps = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(ours, steps)
        if self._copied:
            torch._foreach_copy_([pair[0] for pair in self._copied], [pair[1] for pair in self._copied])
        self._updates += 1

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a checkpoint's average after so many updates."""
        self.network.load_state_dict(state)
        self._updates.fill_(updates)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
