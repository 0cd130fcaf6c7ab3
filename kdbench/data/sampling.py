"""Which rows belong to a split or a subset: seeded, stratified, and nested (a larger share holds every smaller one)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdbench.data.seeds import numpy_generator
from kdbench.errors import UserError, nearest


def order_keys(n: int, *seed: int | str) -> Tensor:
    """A random number in [0, 1) for each of n rows, float64: splits take the largest, subsets the smallest."""
    return torch.from_numpy(numpy_generator(*seed).random(n))


def count_of(amount: float, total: int, key: str, whole: bool) -> int:
    """How many of `total` rows an amount means: up to 1 it is a share (rounded down), above 1 a count.

    whole: whether the share may be 1. Raises UserError naming `key`.
    """
    fine = abs(amount) < float("inf") and (amount <= 1 or amount == int(amount)) and (amount < 1 or whole or amount > 1)
    if not fine or amount < 0 or (whole and amount == 0):
        low, high = ("(0, 1]" if whole else "[0, 1)"), total if whole else total - 1
        raise UserError(key, amount, f"a share in {low} or a count from 2 to {high}")
    # 1e-9: 0.29 * 100 is 28.999999999999996.
    count = int(amount) if amount > 1 else int(amount * total + 1e-9)
    if count > total or (count == total and not whole):
        less = f"below {total}, to leave samples to train on"
        raise UserError(key, amount, f"at most {total}, all that there are" if whole else less)
    if amount > 0 and count == 0:
        raise UserError(key, amount, f"at least one of the {total} samples")
    return count


def stratified(labels: Tensor, count: int, keys: Tensor, leave: int = 0) -> Tensor:
    """`count` rows with the classes in the proportions of `labels` [N]: per class, those with the smallest keys [N].

    A class gets the whole part of its quota; what is left goes to the largest remainders (Hamilton), ties to the
    smaller class number. At least `leave` rows of each class stay; what such a class cannot give the others do, as far
    as they can. Returns rows in ascending order.
    """
    classes, sizes = torch.unique(labels, return_counts=True)
    quota = sizes.double() * count / len(labels)
    take = (quota + 1e-9).floor().long()
    by_remainder = torch.argsort(quota - take, descending=True, stable=True)
    take[by_remainder[: count - int(take.sum())]] += 1
    take = torch.minimum(take, (sizes - leave).clamp(min=0))
    while (missing := count - int(take.sum())) > 0:
        able = by_remainder[(take < sizes - leave)[by_remainder]][:missing]
        if not len(able):
            break
        take[able] += 1
    return smallest(labels, classes.tolist(), take.tolist(), keys)


def smallest(labels: Tensor, classes: Sequence[int], take: Sequence[int], keys: Tensor) -> Tensor:
    """For each class the `take` rows with the smallest keys; ascending."""
    order = torch.argsort(keys, stable=True)
    chosen = [order[labels[order] == label][:number] for label, number in zip(classes, take)]
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def class_numbers(wanted: Sequence[str | int], classes: Sequence[str], key: str) -> list[int]:
    """Class names or numbers as numbers, each once. Raises UserError that names `key` and what exists."""
    if not wanted:
        raise UserError(key, list(wanted), "a list of at least one class")
    numbers = []
    for place, item in enumerate(wanted):
        # A name wins over a number: the classes of digit sets are called "0" to "9", which is the same anyway.
        number = classes.index(str(item)) if str(item) in classes else int(item) if str(item).isdigit() else -1
        if isinstance(item, bool) or not 0 <= number < len(classes):
            some = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
            allowed = f"a class: its name ({some}) or its number, up to {len(classes) - 1}"
            raise UserError(f"{key}[{place}]", item, allowed, nearest(str(item), classes))
        numbers.append(number)
    return sorted(set(numbers))


def rows_of(labels: Tensor, numbers: Sequence[int]) -> Tensor:
    """The rows whose label is one of `numbers`, ascending."""
    return torch.from_numpy(np.flatnonzero(np.isin(labels.numpy(), list(numbers))))
