"""Gaussian classes in many dimensions: vectors whose class probabilities are known exactly (Ren et al. 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, Positive, Seed, within
from kdbench.data.bundle import Source
from kdbench.data.sampling import torch_generator
from kdbench.errors import require


def gaussian_posterior(means: Tensor, variance: float) -> nn.Linear:
    """log p*(class | input) up to a constant, for equally frequent Gaussian classes with one variance.

    means [C, D]; p* = softmax(-|x - mean|^2 / (2 variance)), of which |x|^2 is left out: all classes share it.
    """
    classes, dimensions = means.shape
    layer = nn.utils.skip_init(nn.Linear, dimensions, classes).requires_grad_(False)
    layer.weight.copy_(means / variance)
    layer.bias.copy_(-means.square().sum(1) / (2 * variance))
    return layer


def gaussian(
    n: Annotated[int, within(2, 10**9)] = 5000,
    n_val: Annotated[int, within(0, 10**9)] = 5000,
    n_test: Count = 10_000,
    num_classes: Annotated[int, within(2, 10**6)] = 3,
    dimensions: Annotated[int, within(1, 2**16)] = 30,
    variance: Positive = 6.0,
    data_seed: Seed = 0,
) -> Source:
    """`num_classes` classes, equally frequent, around means drawn from {-1, 0, 1}^dimensions, with one variance.

    Ren, Guo and Sutherland (2022, "Better supervisory signals by observing learning paths", their notebook): 3 classes,
    30 dimensions, variance 6, 5 % of 100,000 to train, 5 % to validate, 90 % to test. Each part has random numbers of
    its own, so the size of one changes no other. Raises UserError where there are not as many means as classes.
    """
    enough = dimensions > 12 or num_classes <= 3**dimensions  # 3^13 is above a million
    require(enough, "dataset.num_classes", num_classes, f"at most 3^dimensions = {3 ** min(dimensions, 12)}")
    means = _means(num_classes, dimensions, data_seed)

    def part(name: str, size: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(size) % num_classes
        noise = torch.randn((size, dimensions), generator=torch_generator(data_seed, "gaussian", name))
        return noise.mul_(variance**0.5).add_(means[labels]), labels

    names = tuple(f"class {number}" for number in range(num_classes))
    val = part("val", n_val) if n_val else None
    known = gaussian_posterior(means, variance)
    return Source(names, *part("train", n), *part("test", n_test), val=val, posterior=known)


def _means(classes: int, dimensions: int, seed: int) -> Tensor:
    """[C, D] of -1, 0 and 1, no two alike."""
    generator = torch_generator(seed, "gaussian means")
    found: dict[tuple[int, ...], None] = {}
    while len(found) < classes:
        drawn = torch.randint(-1, 2, (classes, dimensions), generator=generator)
        found |= dict.fromkeys(map(tuple, drawn.tolist()))
    return torch.tensor(list(found)[:classes], dtype=torch.float32)
