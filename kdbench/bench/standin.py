"""Random images in the shapes of a dataset that is not on this machine: timing asks for shapes, not for pictures."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kdbench.arguments import keys
from kdbench.data.bundle import Source
from kdbench.data.load import Dataset

MOST = 256 << 20  # bytes of stand-in images: fewer than the real set has, where they are large

# By the reader's name: training images, test images, classes, channels, pixels a side.
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "mnist": (60_000, 10_000, 10, 1, 28),
    "fashion_mnist": (60_000, 10_000, 10, 1, 28),
    "cifar10": (50_000, 10_000, 10, 3, 32),
    "cifar100": (50_000, 10_000, 100, 3, 32),
    "svhn": (73_257, 26_032, 10, 3, 32),
    "stl10": (5_000, 8_000, 10, 3, 96),
    "tiny_imagenet": (100_000, 10_000, 200, 3, 64),
    "imagenet": (1_281_167, 50_000, 1000, 3, 224),
}


def stand_in(dataset: Mapping[str, object]) -> dict[str, object] | None:
    """The dataset node with its reader replaced by random images in memory; None if the shape is not known."""
    shape = SHAPES.get(str(dataset["reader"]).rpartition(".")[2])
    if shape is None:
        return None
    train, test, classes, channels, side = shape
    scale = min(1.0, MOST / ((train + test) * channels * side**2))
    known = keys(Dataset)
    kept = {key: value for key, value in dataset.items() if key in known or key == "_target_"}
    kept |= {"reader": f"{__name__}.random_source", "channels": None}
    kept |= {"mean": kept.get("mean") or 0.5, "std": kept.get("std") or 0.25}
    options = {"n": int(train * scale), "n_test": int(test * scale), "num_classes": classes, "side": side}
    return kept | options | {"depth": dataset.get("channels") or channels}


def random_source(n: int, n_test: int, num_classes: int, side: int, depth: int) -> Source:
    """Noise, with labels that come in turn."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n + n_test, depth, side, side), generator=random, dtype=torch.uint8)
    labels = torch.arange(n + n_test) % num_classes
    names = tuple(str(number) for number in range(num_classes))
    return Source(names, images[:n], labels[:n], images[n:], labels[n:], fingerprint="0" * 64)
