"""Mixing pairs of images of one batch, and their labels; a teacher sees the same mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.arguments import call
from kdbench.arguments.ranges import Positive, Share, above_to
from kdbench.data.order import Order
from kdbench.data.sampling import numpy_generator, torch_generator
from kdbench.errors import require


@dataclass(frozen=True)
class Mixup:
    """Mixup (Zhang et al. 2018): share * image + (1 - share) * partner, share ~ Beta(alpha, alpha), one a batch.

    Beyer et al. 2022 ("patient and consistent teaching") mix with a uniform share: alpha 1.
    """

    alpha: float = 1.0

    kind: ClassVar[str] = "mixup"

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

    kind: ClassVar[str] = "cutmix"

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


@dataclass(frozen=True)
class Switch:
    """Mixup in some batches, CutMix in others, and some left as they are.

    Touvron et al. 2021 (DeiT) mix every batch, with CutMix half of the time (`switch` 0.5), Mixup alpha 0.8 and CutMix
    alpha 1. `probability` is the share of the batches that are mixed, `switch` that of CutMix among them: timm's
    mixup_prob and mixup_switch_prob.
    """

    parts: tuple[Mixup | None, CutMix | None]
    switch: float = 0.5
    probability: float = 1.0

    @property
    def kind(self) -> str:
        return "both" if None not in self.parts else next(part.kind for part in self.parts if part)

    def shares(self, steps: int, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For each step the share of the first image [steps]; Mixup's share of it and CutMix's rectangle [steps, 5]."""
        share, recipe = torch.ones(steps), torch.zeros(steps, 5)
        recipe[:, 0] = 1
        drawn = torch.from_numpy(rng.random((steps, 2)))
        cut = drawn[:, 1] < self.switch if self.parts[0] is not None else torch.ones(steps, dtype=torch.bool)
        for part, mine in zip(self.parts, (~cut, cut)):
            if part is None:
                continue
            mine = mine & (drawn[:, 0] < self.probability)
            own, how = part.shares(steps, rng, shape)
            columns = slice(1, 5) if isinstance(part, CutMix) else slice(0, 1)
            share = torch.where(mine, own, share)
            recipe[:, columns] = torch.where(mine[:, None], how.view(steps, -1).float(), recipe[:, columns])
        return share, recipe

    def __call__(self, images: Tensor, partner: Tensor, recipe: Tensor) -> Tensor:
        """images, partner float [B, C, H, W]; recipe [5]. Both ways, one of which changes nothing: no host sync."""
        mixed = Mixup()(images, partner, recipe[0])
        return CutMix()(mixed, partner, recipe[1:])


Mix = Mixup | CutMix | Switch


def make_mix(options: Mapping[str, object]) -> Mix | None:
    """What `dataset.mix` names: {kind, alpha, ...}. Raises UserError."""
    return call(mixing, options, "dataset.mix")


def mixing(
    kind: Literal["none", "mixup", "cutmix", "both"] = "none",
    alpha: Positive = 1.0,
    cutmix_alpha: Positive = 1.0,
    switch: Share = 0.5,
    probability: Annotated[float, above_to(0, 1)] = 1.0,
) -> Mix | None:
    """`alpha` is that of the kind; with kind both it is Mixup's, and CutMix has `cutmix_alpha`.

    Raises UserError for a value that the kind does not use.
    """
    require(kind != "none" or probability == 1.0, "probability", probability, "1.0 with kind=none")
    for key, value, usual in (("cutmix_alpha", cutmix_alpha, 1.0), ("switch", switch, 0.5)):
        require(kind == "both" or value == usual, key, value, f"{usual} without kind=both")
    if kind == "both":
        return Switch((Mixup(alpha), CutMix(cutmix_alpha)), switch, probability)
    chosen = {"none": None, "mixup": Mixup(alpha), "cutmix": CutMix(alpha)}[kind]
    if chosen is None or probability == 1.0:
        return chosen
    return Switch((chosen, None) if isinstance(chosen, Mixup) else (None, chosen), float(kind == "cutmix"), probability)


def mixed_labels(label: Tensor, partner: Tensor, share: Tensor, num_classes: int) -> Tensor:
    """share * one-hot + (1 - share) * one-hot of the partner: float32 [B, C]; an unlabelled row adds nothing."""
    return share * _one_hot(label, num_classes) + (1 - share) * _one_hot(partner, num_classes)


def _one_hot(label: Tensor, num_classes: int) -> Tensor:
    return (label[:, None] == torch.arange(num_classes, device=label.device)).float()


class Mixer:
    """Mixes the batches of one epoch: who is mixed with whom, and how much, is a function of (seed, epoch)."""

    def __init__(self, mix: Mix, num_classes: int, order: Order, size: tuple[int, ...]) -> None:
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
