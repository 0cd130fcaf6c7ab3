"""Randomness as a pure function of what it is for, so that a resumed run replays it; and the rows that are drawn by it.

Splits and subsets are seeded, stratified and nested: a larger share holds every smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdbench.errors import UserError, nearest, some

_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of splitmix64, as int64


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part: seed_of(seed, epoch, "order")."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by seed_of(*parts): CPU streams are the same on every machine."""
    return torch.Generator().manual_seed(seed_of(*parts))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    return np.random.default_rng(seed_of(*parts))


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # int64 >> keeps the sign; the mask takes it away


def mixed(seed: Tensor, salt: Tensor | int) -> Tensor:
    """A hash of int64 seeds: splitmix64 (Steele, Lea and Flood 2014), with tensor arithmetic on any device."""
    # A plain number is wrapped by hand, as int64 arithmetic wraps a tensor.
    step = (salt * _GOLDEN + 2**63) % 2**64 - 2**63 if isinstance(salt, int) else salt * _GOLDEN
    value = seed + step
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def uniforms(seed: Tensor, count: int) -> Tensor:
    """count independent numbers in [0, 1) for each seed. seed int64 [B]; returns float32 [B, count]."""
    salt = torch.arange(1, count + 1, device=seed.device)
    return _shifted(mixed(seed[:, None], salt), 40).to(torch.float32) * 2.0**-24


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
            allowed = f"a class: its name ({some(classes)}) or its number, up to {len(classes) - 1}"
            raise UserError(f"{key}[{place}]", item, allowed, nearest(str(item), classes))
        numbers.append(number)
    return sorted(set(numbers))


def rows_of(labels: Tensor, numbers: Sequence[int]) -> Tensor:
    """The rows whose label is one of `numbers`, ascending."""
    return torch.from_numpy(np.flatnonzero(np.isin(labels.numpy(), list(numbers))))
