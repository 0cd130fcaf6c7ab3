"""Made-up images that can be learnt: for tests, and for timing without data."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments import checked
from kdbench.arguments.ranges import Count, Seed, above_to, within
from kdbench.data.bundle import Source
from kdbench.data.sampling import torch_generator


@checked
def fake(
    channels: int | None,
    n: Annotated[int, within(2, 10**9)] = 512,
    n_test: Count = 256,
    num_classes: Annotated[int, within(2, 10**6)] = 10,
    size: Annotated[int, within(4, 4096)] = 16,
    contrast: Annotated[float, above_to(0, 1)] = 0.5,
    data_seed: Seed = 0,
) -> Source:
    """n + n_test images of num_classes classes: a smooth random pattern a class, under `contrast` times as much noise.

    Classes are equally frequent. contrast: the pattern's share of the deviation from gray, in (0, 1]; 1 is noise-free.
    """
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
