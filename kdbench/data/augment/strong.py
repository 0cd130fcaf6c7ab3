"""Augmentations with too many views to enumerate: each image's view id is the seed of its own randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments import checked
from kdbench.arguments.ranges import Share, above_to, listed, within
from kdbench.data.augment.views import SEED
from kdbench.data.resize import functional
from kdbench.data.sampling import mixed, uniforms
from kdbench.errors import require

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_TRIES = 10  # to find a rectangle that fits
_NOISE = 10**6  # a salt that no draw of a rectangle uses
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
            "equalize": functional().equalize_image(images),
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
    gray = functional().rgb_to_grayscale_image(images).float()
    mean = functional().rgb_to_grayscale_image(pixel).floor().mean((1, 2, 3), keepdim=True)
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
class RandomErasing:
    """A rectangle of some images replaced by noise (Zhong et al. 2020), as timm's --reprob and --remode do.

    An image is changed with `probability`; its rectangle has a share of the area in `area` and height / width in
    [`ratio`, 1 / ratio], log-uniform; ten tries to find one that fits, as timm. `fill`: "pixel" draws each pixel,
    "colour" one colour, "gray" is the mean. timm draws from N(0, 1) after normalisation; here it is N(mean, std) in
    pixels before it, cut to [0, 255] as pixels are. Own code, since timm's draws from the global generators and knows
    no views.
    """

    probability: Share = 0.25
    area: Annotated[list[Share], listed(2, "two shares of the area, the smaller first", most=2)] = field(
        default_factory=lambda: [0.02, 1 / 3]
    )
    ratio: Annotated[float, above_to(0, 1)] = 0.3
    fill: Literal["pixel", "colour", "gray"] = "pixel"
    mean: Share = 0.45  # of the noise, and of "gray": about that of photographs
    std: Share = 0.225

    views = None
    no_op = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", tuple(self.area))
        require(self.area[0] <= self.area[1], "area", self.area, "two shares of the area, the smaller first")

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SEED, (n,), generator=generator)

    def box(self, view: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height, width [B] int64 in pixels; a height of 0 where nothing is erased."""
        rows, columns = shape[-2:]
        chance = uniforms(view, 1 + 4 * _TRIES)
        tries = chance[:, 1:].view(len(view), 4, _TRIES)
        area = (self.area[0] + (self.area[1] - self.area[0]) * tries[:, 0]) * rows * columns
        aspect = torch.exp((2 * tries[:, 1] - 1) * -math.log(self.ratio))
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (height < rows) & (width < columns)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)  # of the tries that fit

        def chosen(values: Tensor) -> Tensor:
            return values.gather(1, first)[:, 0]

        height, width = chosen(height), chosen(width)
        top = (chosen(tries[:, 2]) * (rows - height + 1)).floor()
        left = (chosen(tries[:, 3]) * (columns - width + 1)).floor()
        erased = (chance[:, 0] < self.probability) & fits.any(1)
        return top.long(), left.long(), torch.where(erased, height, 0.0).long(), width.long()

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        top, left, height, width = (part[:, None] for part in self.box(view, images.shape))
        row = torch.arange(images.shape[-2], device=images.device)
        column = torch.arange(images.shape[-1], device=images.device)
        down, across = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
        hole = (down[:, :, None] & across[:, None, :])[:, None]
        return torch.where(hole, self._noise(images.shape, view), images)

    def _noise(self, shape: torch.Size, view: Tensor) -> Tensor:
        """uint8, as large as the images or to be spread over them; a hash a pixel, 0.2 ms an image of 32x32x3."""
        if self.fill == "gray":
            return torch.full((1, 1, 1, 1), round(255 * self.mean), dtype=torch.uint8, device=view.device)
        size = shape[1:] if self.fill == "pixel" else torch.Size((shape[1], 1, 1))
        salted = mixed(view, _NOISE)
        # Box and Muller 1958: two uniform numbers make one normal one. 1 - u lies in (0, 1].
        first, second = (uniforms(mixed(salted, part), size.numel()) for part in (1, 2))
        normal = (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
        pixel = 255 * (self.mean + self.std * normal)
        return pixel.round().clamp(0, 255).to(torch.uint8).view(len(view), *size)


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

    def drawn(self, view: Tensor) -> Tensor:
        """What is random of crops [B], float32 [B, 5]: a share of the image's area, width / height, where it lies from
        left to right and from top to bottom, and what mirrors it below 0.5."""
        chance = uniforms(view, 5)
        area = self.smallest + (1 - self.smallest) * chance[:, 0]
        aspect = torch.exp((2 * chance[:, 1] - 1) * math.log(4 / 3))
        return torch.cat([area[:, None], aspect[:, None], chance[:, 2:]], 1)

    def box(self, view: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Left, top, width, height [B] as shares of the image, and flip [B] bool. ratio: the image's width / height."""
        area, aspect, left, top, mirrored = self.drawn(view).unbind(1)
        aspect = aspect / ratio
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        return left * (1 - width), top * (1 - height), width, height, (mirrored < 0.5) & self.flip

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        left, top, width, height, flips = self.box(view, images.shape[-1] / images.shape[-2])
        sign, none = 1 - 2 * flips.float(), torch.zeros_like(width)
        first = torch.stack([width * sign, none, 2 * left + width - 1], 1)
        second = torch.stack([none, height, 2 * top + height - 1], 1)
        grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
        resampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return resampled.round().clamp(0, 255).to(torch.uint8)
