"""Parameter names under which other projects publish the same networks, and the wrappers around them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product

from torch import Tensor

# Parts of a name that wrap a module wherever it stands: torch.compile, activation checkpointing, FSDP.
_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPERS = ("module", "model", "net", "network", "student", "backbone", "encoder")  # attributes that hold a network
_STRAY = ("n_averaged", "criterion", "loss", "loss_fn", "loss_func", "loss_function")  # beside a network, none of it

# Each rule is (pattern, replacement) on a parameter's name. Networks of the same shapes differ in these words only.
_PREFIXES = ((r"^(model|net|network|student|backbone|encoder)\.", ""),)
_SHORTCUTS = ((r"\.shortcut\.", ".downsample."), (r"\.downsample\.", ".shortcut."))
_HEADS = (
    (r"^(compressible_)?linear\.", "fc."),  # akamaster/pytorch_resnet_cifar10
    (r"^fc\.", "linear."),  # torchvision's names for ResNets with a stem for small images
    (r"^classifier\.", "classifier.0."),
    (r"^classifier\.(\d+\.)?", "linear."),
    (r"^(fc|linear)\.", "classifier."),
)
_OTHERS = ((r"(^|\.)compressible_", r"\1"), (r"\.(norm|conv)\.(\d)\.", r".\1\2."))  # the latter: early DenseNets
_NONE = (r"(?!)", "")  # matches nothing


def published_names(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`state` under the names in `expected`, if a known renaming makes the two sets of names the same; else unchanged.

    Never guesses: a renaming counts only if every name fits afterwards (batch norm's num_batches_tracked, which old
    files lack, aside). Covers among others akamaster/pytorch_resnet_cifar10, torchvision-style ResNets, and any of
    these inside wrappers of any order and depth (DataParallel, torch.compile of the whole or of a part, AveragedModel,
    a Lightning module with the tensors of its loss beside the network).
    """
    if comparable(state) == (wanted := comparable(expected)):
        return dict(state)
    return namings(state).get(wanted, dict(state))


def namings(state: Mapping[str, Tensor]) -> dict[frozenset[str], dict[str, Tensor]]:
    """The state under every naming that the rules lead to, its own first, by the set of comparable names."""
    found: dict[frozenset[str], dict[str, Tensor]] = {}
    kinds = [(_NONE, *rules) for rules in (_PREFIXES, _OTHERS, _SHORTCUTS, _HEADS)]
    for unwrapped in peelings(state):
        for rules in product(*kinds):
            renamed = {_rename(name, rules): value for name, value in unwrapped.items()}
            if len(renamed) == len(unwrapped):  # no two parameters may end up under one name
                found.setdefault(comparable(renamed), renamed)
    return found


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what is never a part of a network's own names: DataParallel's and torch.compile's wrappers around the
    whole, AveragedModel's counter; of a distiller's weights ("student.", "teacher.", adapters) only the student's."""
    plain = {_drop(name, _TRANSPARENT): value for name, value in state.items() if name != "n_averaged"}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    students = {name.removeprefix("student."): value for name, value in plain.items() if name.startswith("student.")}
    return students or plain


def peelings(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state as it is, then with one wrapper less each time, the outermost first."""
    left: dict[str, Tensor] | None = dict(state)
    while left:
        yield left
        left = _peel(left)


def _peel(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """None where nothing is left to peel."""
    through = {_drop(name, _TRANSPARENT): value for name, value in state.items()}
    if through.keys() != state.keys():
        return through if len(through) == len(state) else None
    roots = {name.partition(".")[0] for name in state} - set(_STRAY)
    if roots and any(name.partition(".")[0] in _STRAY for name in state):
        return {name: value for name, value in state.items() if name.partition(".")[0] in roots}
    word = next(iter(roots), "")
    if len(roots) == 1 and word in _WRAPPERS and word not in state:
        return {name.partition(".")[2]: value for name, value in state.items()}
    inner = {_drop(name, ("module",)): value for name, value in state.items()}  # one stage in DataParallel
    return inner if inner.keys() != state.keys() and len(inner) == len(state) else None


def _drop(name: str, words: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in words)


def comparable(names: Iterable[str]) -> frozenset[str]:
    """The names that must agree: all but batch norm's counters."""
    return frozenset(name for name in names if not name.endswith("num_batches_tracked"))


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
