"""Street View House Numbers, cropped digits, through torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision.datasets as tv

from kdbench.data.bundle import Source
from kdbench.data.download import Files, obtain


def svhn(root: str, download: bool) -> Source:
    """73,257 + 26,032 colour 32x32 house-number digits (Netzer et al. 2011), without the 531,131 easy extra ones."""
    listed = [tv.SVHN.split_list[part] for part in ("train", "test")]  # (url, file, md5)
    wanted = tuple((name, md5) for _, name, md5 in listed)
    files = Files("SVHN", "http://ufldl.stanford.edu/housenumbers", (listed[0][0],), wanted, "svhn")
    folder = str(Path(root) / "svhn")

    def load(fetch: bool) -> Source:
        train, test = (tv.SVHN(folder, split=part, download=fetch) for part in ("train", "test"))
        names = tuple(str(number) for number in range(10))
        return Source(
            names,
            torch.from_numpy(train.data).contiguous(),
            torch.from_numpy(train.labels).long(),
            torch.from_numpy(test.data).contiguous(),
            torch.from_numpy(test.labels).long(),
            published=(73_257, 26_032),
        )

    return obtain(load, files, root, download)
