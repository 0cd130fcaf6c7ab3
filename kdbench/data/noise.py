"""Label noise: wrong labels for the training set, exact for each class, a function of row, rate and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kdbench.arguments import call
from kdbench.arguments.ranges import Seed, Share
from kdbench.data.bundle import Split
from kdbench.data.sampling import numpy_generator, smallest
from kdbench.errors import UserError, require

# Patrini et al. 2017: mistakes that people make between CIFAR-10's classes. All others keep their labels.
CIFAR10_MISTAKES = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


def make_noise(labels: Tensor, classes: Sequence[str], options: Mapping[str, object]) -> tuple[Tensor, str]:
    """The noisy labels of the whole original training set, and whom they are for: both | teacher | student.

    `options` is what `dataset.noise` holds: kind, rate, seed, any_class, for. Raises UserError.
    """
    options = dict(options)
    whom = options.pop("for", "both")  # a word of Python's own, so no parameter can be called so
    require(whom in ("both", "teacher", "student"), "dataset.noise.for", whom, "one of both, teacher, student")
    assert isinstance(whom, str)
    given = {"labels": labels, "names": classes}
    return call(wrong_labels, options, "dataset.noise", given, beside=["for"]), whom


def wrong_labels(
    labels: Tensor,
    names: Sequence[str],
    kind: Literal["none", "symmetric", "asymmetric", "pairflip"] = "none",
    rate: Share = 0.0,
    seed: Seed = 0,
    any_class: bool = False,
) -> Tensor:
    if kind == "none" and rate > 0:
        raise UserError("dataset.noise.kind", kind, f"symmetric, asymmetric or pairflip where noise.rate is {rate}")
    if kind == "none" or rate == 0:
        return labels
    return flipped(labels, names, kind, rate, seed, any_class)


def flipped(labels: Tensor, names: Sequence[str], kind: str, rate: float, seed: int, any_class: bool = False) -> Tensor:
    """Labels [N] with label noise: a function of (row, rate, seed), exact for each class.

    In a class of n images, floor(rate * n + 1/2) get a new label: symmetric, a uniformly random other class (with
    any_class a uniformly random class, so that rate / C of them stay right by chance); pairflip, the next class;
    asymmetric, CIFAR-10's usual mistakes, or the next class where a dataset has other classes. A larger rate changes
    all that a smaller rate changes. Sources: Patrini et al. 2017; Han et al. 2018 (pairflip).
    """
    rng = numpy_generator(seed, "noise")
    keys = torch.from_numpy(rng.random(len(labels)))
    # Drawn for every row, changed or not: what a row is changed to depends on nothing but the seed and the row.
    if kind == "symmetric" and any_class:
        new = torch.from_numpy(rng.integers(len(names), size=len(labels)))
    elif kind == "symmetric":
        new = (labels + torch.from_numpy(rng.integers(1, len(names), size=len(labels)))) % len(names)
    else:
        new = _mistakes(names, kind)[labels]
    count = [int(rate * int((labels == label).sum()) + 0.5) for label in range(len(names))]
    rows = smallest(labels, range(len(names)), count, keys)
    noisy = labels.clone()
    noisy[rows] = new[rows]
    return noisy


def _mistakes(names: Sequence[str], kind: str) -> Tensor:
    """What each class is taken for [C]."""
    if kind == "asymmetric" and set(CIFAR10_MISTAKES) | set(CIFAR10_MISTAKES.values()) <= set(names):
        return torch.tensor([names.index(CIFAR10_MISTAKES.get(name, name)) for name in names])
    return (torch.arange(len(names)) + 1) % len(names)


def noisy(split: Split, labels: Tensor) -> Split:
    """The split with its labels taken from `labels` (of the whole original training set); the true ones in `clean`."""
    changed = labels[split.rows]
    return split if torch.equal(changed, split.labels) else replace(split, labels=changed, clean=split.labels)
