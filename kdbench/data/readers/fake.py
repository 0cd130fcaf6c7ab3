"""Made-up images that can be learnt: for tests, and for timing without data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data.bundle import Source
from kdbench.data.seeds import torch_generator
from kdbench.errors import UserError


def fake(
    channels: int | None,
    n: int = 512,
    n_test: int = 256,
    num_classes: int = 10,
    size: int = 16,
    contrast: float = 0.5,
    data_seed: int = 0,
) -> Source:
    """n + n_test images of num_classes classes: a smooth random pattern a class, under `contrast` times as much noise.

    Classes are equally frequent. contrast: the pattern's share of the deviation from gray, in (0, 1]; 1 is noise-free.
    """
    for name, value, least in (("n", n, 2), ("n_test", n_test, 1), ("num_classes", num_classes, 2), ("size", size, 4)):
        if value < least:
            raise UserError(f"dataset.{name} must be {least} or more, got {value}")
    if not 0 < contrast <= 1:
        raise UserError(f"dataset.contrast must be in (0, 1], got {contrast}")
    generator = torch_generator(data_seed, "fake")
    coarse = torch.randn((num_classes, channels or 3, 4, 4), generator=generator)
    pattern = F.interpolate(coarse, size=(size, size), mode="bilinear")

    def images(labels: Tensor) -> Tensor:
        parts = []
        for part in labels.split(4096):  # float noise of a large set would need four times its memory
            noise = torch.randn((len(part), *pattern.shape[1:]), generator=generator)
            pixels = 128 + 50 * (contrast * pattern[part] + (1 - contrast) * noise)
            parts.append(pixels.clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)

    train, test = torch.arange(n) % num_classes, torch.arange(n_test) % num_classes
    return Source(tuple(f"class {k}" for k in range(num_classes)), images(train), train, images(test), test)
