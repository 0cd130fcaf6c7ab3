"""CIFAR-10 and CIFAR-100, through torchvision."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.datasets as tv
from torch import Tensor

from kdbench.data.bundle import Source
from kdbench.data.download import Files, obtain


def cifar10(root: str, download: bool) -> Source:
    """50,000 + 10,000 colour 32x32 images, ten classes (Krizhevsky 2009)."""
    return _read(tv.CIFAR10, "CIFAR-10", root, download)


def cifar100(root: str, download: bool) -> Source:
    """50,000 + 10,000 colour 32x32 images, a hundred classes (Krizhevsky 2009); fine labels."""
    return _read(tv.CIFAR100, "CIFAR-100", root, download)


def _read(kind: type[tv.CIFAR10], name: str, root: str, download: bool) -> Source:
    home = "https://www.cs.toronto.edu/~kriz/cifar.html"
    files = Files(name, home, (kind.url,), ((kind.filename, kind.tgz_md5),))

    def load(fetch: bool) -> Source:
        train = kind(root, train=True, download=fetch)
        test = kind(root, train=False)  # of the same archive
        return Source(tuple(train.classes), *_tensors(train), *_tensors(test), published=(50_000, 10_000))

    return obtain(load, files, root, download)


def _tensors(part: tv.CIFAR10) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)))
    return images, torch.tensor(part.targets)
