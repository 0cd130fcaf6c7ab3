"""The last steps of a batch, resident or streamed: normalise, and mix pairs of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdbench.data.augment.mix import CutMix, Mixup, mixed_labels
from kdbench.data.order import Order
from kdbench.data.seeds import numpy_generator, torch_generator


class Normalise:
    """uint8 images to (pixel / 255 - mean) / std, in float32 and then in `dtype` and memory layout."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        shift, scale = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        # pixel * scale + shift: two passes over the floats instead of three.
        self.scale = (1 / (255 * scale)).float().view(1, -1, 1, 1).to(device)
        self.shift = (-shift / scale).float().view(1, -1, 1, 1).to(device)
        self.dtype = dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mul_(self.scale).add_(self.shift).to(self.dtype, memory_format=self.layout)


class Mixer:
    """Mixes the batches of one epoch: who is mixed with whom, and how much, is a function of (seed, epoch)."""

    def __init__(self, mix: Mixup | CutMix, num_classes: int, order: Order, size: tuple[int, int]) -> None:
        self.mix, self.num_classes, self.order, self.size = mix, num_classes, order, size

    def start(self, epoch: int, device: torch.device) -> None:
        """Draw one epoch's mixtures and move them to the device once."""
        order = self.order
        share, recipe = self.mix.shares(order.steps, numpy_generator(order.seed, epoch, "mix"), self.size)
        generator = torch_generator(order.seed, epoch, "partner")
        partner = [torch.randperm(last - first, generator=generator) for first, last in order.bounds]
        self.share, self.recipe, self.partner = share.to(device), recipe.to(device), torch.cat(partner).to(device)

    def __call__(self, step: int, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self.order.bounds[step]
        partner = self.partner[first:last]
        mixed = self.mix(images, images.index_select(0, partner), self.recipe[step])
        return mixed, mixed_labels(label, label.index_select(0, partner), self.share[step], self.num_classes)
