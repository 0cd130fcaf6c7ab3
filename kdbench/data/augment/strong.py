"""Augmentations with too many views to enumerate: each image's view id is the seed of its own randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import equalize_image, rgb_to_grayscale_image

from kdbench.arguments import checked
from kdbench.arguments.ranges import above_to, within
from kdbench.data.augment.views import SEED
from kdbench.data.seeds import mixed, uniforms

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_BLENDS = tuple(OPERATIONS.index(name) for name in ("brightness", "color", "contrast", "sharpness"))


@checked
@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020): `operations` random ones of 14 for each image, all of one strength.

    `magnitude` counts from 0 to 30; operations, ranges and rounding are torchvision's. Every operation is computed for
    the whole batch and each image keeps its own: no host sync, about 0.2 ms an image of 32x32 on one CPU core.
    """

    operations: Annotated[int, within(1, 100)] = 2
    magnitude: Annotated[int, within(0, 30)] = 9

    views = None
    no_op = -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SEED, (n,), generator=generator)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        for step in range(self.operations):
            chance = uniforms(mixed(view, step), 2)
            operation = (chance[:, 0] * len(OPERATIONS)).long()
            sign = 1.0 - 2.0 * (chance[:, 1] < 0.5).float()
            images = self.apply(images, operation, sign)
        return images

    def apply(self, images: Tensor, operation: Tensor, sign: Tensor) -> Tensor:
        """One operation (its place in OPERATIONS, [B]) with its sign (+1 or -1, [B]) for each image [B, C, H, W]."""
        strength = self.magnitude / 30
        images = _affine(images, _matrix(operation, sign, strength, images.shape))
        pixel = images.float()
        chosen = operation[:, None, None, None]
        factor = (1 + 0.9 * strength * sign)[:, None, None, None]
        other = _blend_partner(images, pixel, chosen)
        blended = (pixel * factor + other * (1 - factor)).clamp(0, 255).to(torch.uint8)
        is_blend = (chosen >= _BLENDS[0]) & (chosen <= _BLENDS[-1])
        result = torch.where(is_blend, blended, images)
        bits = 8 - round(4 * strength)
        changed = {
            "posterize": images & (256 - 2 ** (8 - bits)),
            "solarize": torch.where(images >= 255 * (1 - strength), 255 - images, images),
            "autocontrast": _autocontrast(pixel),
            "equalize": equalize_image(images),
        }
        for name, variant in changed.items():
            result = torch.where(chosen == OPERATIONS.index(name), variant, result)
        return result


def _matrix(operation: Tensor, sign: Tensor, strength: float, shape: torch.Size) -> Tensor:
    """Where each output pixel comes from: affine matrices [B, 2, 3] in coordinates from -1 to 1."""
    height, width = shape[-2:]

    def amount(name: str, size: float) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), sign * size, 0.0)

    shear_x, shear_y = amount("shear_x", 0.3 * strength), amount("shear_y", 0.3 * strength)
    shift_x = amount("translate_x", 2 * int(150 / 331 * width * strength) / width)
    shift_y = amount("translate_y", 2 * int(150 / 331 * height * strength) / height)
    angle = amount("rotate", math.radians(30 * strength))
    # torchvision shears about the upper left corner, -1 in these coordinates: hence the shear in the offset too.
    ratio = height / width
    first = [angle.cos(), (shear_x - angle.sin()) * ratio, shear_x * ratio - shift_x]
    second = [(shear_y + angle.sin()) / ratio, angle.cos(), shear_y / ratio - shift_y]
    return torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)


def _affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Nearest pixel, black outside: exact where the matrix is the identity."""
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def _blend_partner(images: Tensor, pixel: Tensor, chosen: Tensor) -> Tensor:
    """What brightness, color, contrast and sharpness blend with: black, the grays, their mean, the image blurred."""
    gray = rgb_to_grayscale_image(images).float()
    mean = rgb_to_grayscale_image(pixel).floor().mean((1, 2, 3), keepdim=True)
    blurred = pixel.clone()
    inner = pixel[..., 1:-1, 1:-1]
    blurred[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(pixel, 3, stride=1) + 4 * inner) / 13).round()
    other = torch.where(chosen == _BLENDS[1], gray, torch.zeros_like(pixel))
    other = torch.where(chosen == _BLENDS[2], mean, other)
    return torch.where(chosen == _BLENDS[3], blurred, other)


def _autocontrast(pixel: Tensor) -> Tensor:
    """Stretch each channel to the full range; a channel of one value stays. pixel float32 [B, C, H, W] -> uint8."""
    low, high = pixel.amin((-2, -1), keepdim=True), pixel.amax((-2, -1), keepdim=True)
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    low = torch.where(high > low, low, 0.0)
    return ((pixel - low) / scale).clamp(0, 255).to(torch.uint8)


@checked
@dataclass(frozen=True)
class Cutout:
    """One square hole of `size` pixels a side, its centre anywhere (so it may reach over the border).

    DeVries and Taylor 2017: size 16 for CIFAR-10, 8 for CIFAR-100. They blank after normalisation, with zero: the mean
    pixel. `fill` is the same in raw pixels, 0 to 255; mid-gray is close to it for natural images.
    """

    size: Annotated[int, within(1, 10_000)] = 16
    fill: Annotated[int, within(0, 255)] = 128

    views = None
    no_op = -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SEED, (n,), generator=generator)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        chance = uniforms(view, 2)
        hole = torch.ones((len(view), 1, 1, 1), dtype=torch.bool, device=images.device)
        for axis, share in ((2, chance[:, 0]), (3, chance[:, 1])):
            length = images.shape[axis]
            first = (share * length).long() - self.size // 2
            place = torch.arange(length, device=images.device)
            inside = (place >= first[:, None]) & (place < first[:, None] + self.size)
            hole = hole & (inside[:, None, :, None] if axis == 2 else inside[:, None, None, :])
        return images.masked_fill(hole, self.fill)


@checked
@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, resized to the full size, mirrored half of the time.

    Szegedy et al. 2015's crop for ImageNet: area in [smallest, 1] of the image, width / height in [3/4, 4/3]
    (log-uniform), cut to what fits. Streamed files are cropped at decoding, from the full resolution (`box`); images in
    memory are resampled bilinearly.
    """

    smallest: Annotated[float, above_to(0, 1)] = 0.08  # share of the image's area
    flip: bool = True

    views = None
    no_op = -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SEED, (n,), generator=generator)

    def box(self, view: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Left, top, width, height [B] as shares of the image, and flip [B] bool. ratio: the image's width / height."""
        chance = uniforms(view, 5)
        area = self.smallest + (1 - self.smallest) * chance[:, 0]
        aspect = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3)) / ratio
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        flips = (chance[:, 4] < 0.5) & self.flip
        return chance[:, 2] * (1 - width), chance[:, 3] * (1 - height), width, height, flips

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        left, top, width, height, flips = self.box(view, images.shape[-1] / images.shape[-2])
        sign, none = 1 - 2 * flips.float(), torch.zeros_like(width)
        first = torch.stack([width * sign, none, 2 * left + width - 1], 1)
        second = torch.stack([none, height, 2 * top + height - 1], 1)
        grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
        resampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return resampled.round().clamp(0, 255).to(torch.uint8)
