"""STL-10, through torchvision."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.datasets as tv
from torch import Tensor

from kdbench.data.bundle import Source
from kdbench.data.download import Files, obtain

NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def stl10(root: str, download: bool) -> Source:
    """5,000 + 8,000 colour 96x96 images, ten classes (Coates et al. 2011); its unlabelled images are not read.

    torchvision checks the md5 of the whole set at every start, unlabelled images included: several seconds.
    """
    home, kind = "https://cs.stanford.edu/~acoates/stl10", tv.STL10
    files = Files("STL-10", home, (kind.url,), ((kind.filename, kind.tgz_md5),))

    def load(fetch: bool) -> Source:
        train, test = kind(root, split="train", download=fetch), kind(root, split="test")
        return Source(NAMES, *_tensors(train), *_tensors(test), published=(5_000, 8_000))

    return obtain(load, files, root, download)


def _tensors(part: tv.STL10) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels.astype(np.int64))
