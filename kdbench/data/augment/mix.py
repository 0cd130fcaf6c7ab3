"""Mixing pairs of images of one batch, and their labels; a teacher sees the same mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.arguments import call
from kdbench.arguments.ranges import Positive
from kdbench.data.order import Order
from kdbench.data.seeds import numpy_generator, torch_generator


@dataclass(frozen=True)
class Mixup:
    """Mixup (Zhang et al. 2018): share * image + (1 - share) * partner, share ~ Beta(alpha, alpha), one a batch.

    Beyer et al. 2022 ("patient and consistent teaching") mix with a uniform share: alpha 1.
    """

    alpha: float = 1.0

    def shares(self, steps: int, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For each step the share of the first image [steps], and what the mixing needs: the share again [steps]."""
        share = torch.from_numpy(rng.beta(self.alpha, self.alpha, steps)).float()
        return share, share

    def __call__(self, images: Tensor, partner: Tensor, recipe: Tensor) -> Tensor:
        """images, partner float [B, C, H, W]; recipe 0-dim."""
        return torch.lerp(partner, images, recipe.to(images.dtype))


@dataclass(frozen=True)
class CutMix:
    """CutMix (Yun et al. 2019): a rectangle of (1 - share) of the area comes from the partner.

    share ~ Beta(alpha, alpha), one a batch. The rectangle's centre is uniform; it is cut at the border, and labels
    follow the area that is left.
    """

    alpha: float = 1.0

    def shares(self, steps: int, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For each step the share of the first image [steps]; the rectangle: top, bottom, left, right [steps, 4]."""
        side = np.sqrt(1 - rng.beta(self.alpha, self.alpha, steps))[:, None]
        size = np.array(shape)
        half, centre = side * size / 2, rng.random((steps, 2)) * size
        first = np.clip(np.rint(centre - half), 0, size).astype(np.int64)
        last = np.clip(np.rint(centre + half), 0, size).astype(np.int64)
        share = 1 - (last - first).prod(1) / size.prod()
        box = np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], 1)
        return torch.from_numpy(share).float(), torch.from_numpy(box)

    def __call__(self, images: Tensor, partner: Tensor, recipe: Tensor) -> Tensor:
        """images, partner float [B, C, H, W]; recipe [4]."""
        row = torch.arange(images.shape[-2], device=images.device)[:, None]
        column = torch.arange(images.shape[-1], device=images.device)
        inside = (row >= recipe[0]) & (row < recipe[1]) & (column >= recipe[2]) & (column < recipe[3])
        return torch.where(inside, partner, images)


def make_mix(options: Mapping[str, Any]) -> Mixup | CutMix | None:
    """What `dataset.mix` names: {kind: none | mixup | cutmix, alpha}. Raises UserError."""
    return call(mixing, options, "dataset.mix")


def mixing(kind: Literal["none", "mixup", "cutmix"] = "none", alpha: Positive = 1.0) -> Mixup | CutMix | None:
    return {"none": None, "mixup": Mixup(alpha), "cutmix": CutMix(alpha)}[kind]


def mixed_labels(label: Tensor, partner: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """share * one-hot + (1 - share) * one-hot of the partner: float32 [B, C]; an unlabelled row adds nothing."""
    return share * _one_hot(label, num_classes) + (1 - share) * _one_hot(partner, num_classes)


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    return (label[:, None] == torch.arange(num_classes, device=label.device)).float()


class Mixer:
    """Mixes the batches of one epoch: who is mixed with whom, and how much, is a function of (seed, epoch)."""

    def __init__(self, mix: Mixup | CutMix, num_classes: int, order: Order, size: tuple[int, ...]) -> None:
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
