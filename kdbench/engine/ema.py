"""A moving average of a network's weights, without the host sync a step of torch's own."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """average <- decay average + (1 - decay) network, from a copy of the network as it is now; buffers are copied.

    `network` is what is evaluated. torch's AveragedModel reads a counter from the device in every update, which no CUDA
    graph can record.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay
        self._pairs = list(zip(self.network.parameters(), network.parameters(), strict=True))
        self._buffers = list(zip(self.network.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_([ours for ours, _ in self._pairs], [theirs for _, theirs in self._pairs], 1 - self._decay)
        for ours, theirs in self._buffers:
            ours.copy_(theirs)
