"""scikit-learn's handwritten digits: embedded data, so that the first run needs no download."""

from __future__ import annotations

import torch

from kdbench.data.bundle import Source
from kdbench.data.sampling import order_keys, stratified

TEST_IMAGES = 360  # one fifth


def digits() -> Source:
    """1,797 gray 8x8 images of the digits (Alpaydin and Kaynak 1998): 1,437 to train, 360 to test, always the same.

    The set has no test set of its own; ours is stratified and depends on no seed. Pixels 0..16 are scaled to 0..255.
    """
    from sklearn.datasets import load_digits  # costs half a second; only this dataset needs it

    data = load_digits()
    images = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(data.target).long()
    test = stratified(labels, TEST_IMAGES, order_keys(len(labels), 0, "digits test"))
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    names = tuple(str(number) for number in range(10))
    return Source(names, images[train], labels[train], images[test], labels[test])
