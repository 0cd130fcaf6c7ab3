"""Randomness as a pure function of what it is for, so that a resumed run replays it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

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
