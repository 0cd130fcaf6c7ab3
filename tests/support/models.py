"""What the tests of the networks share: every student configuration by globbing, and weights by a rule."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from kdbench.arguments import accepted, locate
from kdbench.models.base import taken_kinds
from kdbench.types import CorpusInfo, ImageInfo, Info, TokenInfo

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "student"
LIBRARIES = ("timm", "torchvision", "transformers")  # kdbench.models.<name>: other libraries' networks


def _taking(kind: type[Info]) -> list[str]:
    """Every student configuration whose network takes data of this kind."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        target = yaml.safe_load(path.read_text(encoding="utf-8"))["_target_"]
        found += [path.stem] if kind in taken_kinds(locate(target, "student._target_")) else []
    return found


ALL = _taking(ImageInfo)


def _library(name: str) -> str:
    """The module that a student's `_target_` lies in."""
    target = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"]
    return str(target).split(".")[-2]


OWN = [name for name in ALL if _library(name) not in LIBRARIES]
SIZED = [
    name for name in ALL if _library(name) in LIBRARIES and name not in LIBRARIES
]  # of a library, in a size of ours
LANGUAGE = [name for name in _taking(CorpusInfo) if _library(name) not in LIBRARIES]
TOKENS = [name for name in _taking(TokenInfo) if name not in LIBRARIES]


@functools.cache
def header(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").split("\n")[0]


def build(name: str, /, classes: int = 100, channels: int = 3, size: int = 32, **changes: Any) -> nn.Module:
    """The network of configs/student/<name>.yaml, with some of its keys changed."""
    return build_for(name, ImageInfo(classes, channels, size), **changes)


def build_for(name: str, info: Info, /, **changes: Any) -> nn.Module:
    """The same for any kind of data."""
    arguments = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    module, _, attribute = arguments.pop("_target_").rpartition(".")
    factory = getattr(importlib.import_module(module), attribute)
    return factory(**{**arguments, **changes}, **accepted(factory, info._asdict()))


def on_meta(name: str, /, classes: int = 100, channels: int = 3, size: int = 32, **changes: Any) -> nn.Module:
    """The same without memory or arithmetic: for counting. Made once a worker, so not to be changed."""
    key = (name, classes, channels, size, repr(changes))
    if key not in _MADE:
        with torch.device("meta"):
            _MADE[key] = build(name, classes, channels, size, **changes)
    return _MADE[key]


def filled(name: str, /, **changes: Any) -> nn.Module:
    """The network in memory with the weights of `fill`, without paying for random ones first."""
    network = copy.deepcopy(on_meta(name, **changes)).to_empty(device="cpu")
    fill(network.state_dict())
    return network


_MADE: dict[tuple[object, ...], nn.Module] = {}


def fill(state: Mapping[str, Tensor]) -> None:
    """Set weights by a rule that needs no file and no random generator: exact integers, the same on every machine.

    The k-th tensor by sorted name gets u = noise(k, i) at flat index i, scaled to the deviation sqrt(2 / fan_in) for
    weights of more than one dimension; batch-norm weights and variances 1 + u / 2; everything else u / 5.
    """
    for k, name in enumerate(sorted(state)):
        value = state[name]
        if not value.is_floating_point():
            value.zero_()
            continue
        u = noise(k, value.numel())
        if value.dim() > 1:
            u = u * (24 / value[0].numel()) ** 0.5
        elif name.endswith((".weight", "running_var")):
            u = 1 + u / 2
        else:
            u = u / 5
        value.copy_(u.reshape(value.shape))


def images(count: int, channels: int = 3, size: int = 32) -> Tensor:
    """The same images everywhere, by the same rule: uniform in [-1.7, 1.7]."""
    return (3.4 * noise(10_007, count * channels * size * size)).reshape(count, channels, size, size)


def noise(stream: int, count: int) -> Tensor:
    """Float32 numbers in [-1/2, 1/2] that look independent: entries stream * 7919, ... of a table that repeats."""
    table = _table()
    start = stream * 7919 % len(table)
    repeats = -(-(start + count) // len(table))
    return (table.repeat(repeats) if repeats > 1 else table)[start : start + count]


@functools.cache
def _table() -> Tensor:
    """MurmurHash3's 32-bit finaliser of 0, 1, ..., over 2^32; a prime number of them, lest a layer's rows repeat."""
    h = torch.arange(1_000_003, dtype=torch.int64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * factor % 2**32  # int64 may wrap; the low 32 bits are right all the same
    return ((h ^ (h >> 16)).double() / 2**32 - 0.5).float()
