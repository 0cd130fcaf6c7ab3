"""scikit-learn's handwritten digits: embedded data, so that the first run needs no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from kdbench.data.bundle import Source
from kdbench.data.sampling import order_keys, stratified

TEST_IMAGES = 360  # one fifth


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Pixels float64 [n, 8, 8] and labels [n], from scikit-learn's file: importing the package takes a second."""
    package = importlib.util.find_spec("sklearn")
    file = Path(*(package.submodule_search_locations or ()) if package else (), "datasets", "data", "digits.csv.gz")
    if not file.is_file():  # of another release, or not installed
        from sklearn.datasets import load_digits

        data = load_digits()
        return data.images, data.target
    rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


def digits() -> Source:
    """1,797 gray 8x8 images of the digits (Alpaydin and Kaynak 1998): 1,437 to train, 360 to test, always the same.

    The set has no test set of its own; ours is stratified and depends on no seed. Pixels 0..16 are scaled to 0..255.
    """
    pixels, digit = _table()
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digit).long()
    test = stratified(labels, TEST_IMAGES, order_keys(len(labels), 0, "digits test"))
    train = torch.ones(len(labels), dtype=torch.bool)
    train[test] = False
    names = tuple(str(number) for number in range(10))
    return Source(names, images[train], labels[train], images[test], labels[test])
