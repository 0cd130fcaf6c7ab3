"""Resizing and cutting images as torchvision does it, which is imported when the first one comes: it takes as long as
torch itself, and most data need none of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def functional() -> Any:
    """torchvision.transforms.v2.functional."""
    from torchvision.transforms.v2 import functional

    return functional


def resized(pixels: Tensor, size: list[int]) -> Tensor:
    """An image [C, H, W] with sides of `size`, or the shorter one of it, antialiased."""
    return functional().resize_image(pixels, size, antialias=True)


def shorter_side(pixels: Tensor, resize: int) -> Tensor:
    """An image [C, H, W] with `resize` pixels on its shorter side, antialiased; already so large: untouched."""
    return pixels if min(pixels.shape[-2:]) == resize else resized(pixels, [resize])


def centred(pixels: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to `resize` pixels (antialiased), then the middle `size` x `size`; already so large: untouched."""
    pixels = shorter_side(pixels, resize)
    return pixels if tuple(pixels.shape[-2:]) == (size, size) else functional().center_crop_image(pixels, [size, size])
