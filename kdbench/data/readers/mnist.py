"""MNIST and Fashion-MNIST, through torchvision."""

from __future__ import annotations

import torchvision.datasets as tv

from kdbench.data.bundle import Source
from kdbench.data.download import Files, md5_pairs, obtain


def mnist(root: str, download: bool) -> Source:
    """60,000 + 10,000 gray 28x28 handwritten digits (LeCun et al. 1998)."""
    names = tuple(str(number) for number in range(10))
    return _read(tv.MNIST, "MNIST", "http://yann.lecun.com/exdb/mnist", names, root, download)


def fashion_mnist(root: str, download: bool) -> Source:
    """60,000 + 10,000 gray 28x28 pictures of clothes (Xiao et al. 2017)."""
    home = "https://github.com/zalandoresearch/fashion-mnist"
    return _read(tv.FashionMNIST, "Fashion-MNIST", home, tuple(tv.FashionMNIST.classes), root, download)


def _read(kind: type[tv.MNIST], name: str, home: str, classes: tuple[str, ...], root: str, download: bool) -> Source:
    urls = tuple(mirror + kind.resources[0][0] for mirror in kind.mirrors)
    files = Files(name, home, urls, md5_pairs(kind.resources), f"{kind.__name__}/raw")

    def load(fetch: bool) -> Source:
        train, test = (kind(root, train=part, download=fetch) for part in (True, False))
        if len(train.data) != len(train.targets) or len(test.data) != len(test.targets):
            raise RuntimeError("images and labels differ in number")
        parts = (train.data[:, None], train.targets.long(), test.data[:, None], test.targets.long())
        return Source(classes, *parts, published=(60_000, 10_000))

    return obtain(load, files, root, download)
