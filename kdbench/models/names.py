"""Parameter names under which other projects publish the same networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product

from torch import Tensor

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
    these inside a wrapper (`model.`, `net.`, `student.`).
    """
    if comparable(state) == (wanted := comparable(expected)):
        return dict(state)
    return namings(state).get(wanted, dict(state))


def namings(state: Mapping[str, Tensor]) -> dict[frozenset[str], dict[str, Tensor]]:
    """The state under every naming that the rules lead to, its own first, by the set of comparable names."""
    found: dict[frozenset[str], dict[str, Tensor]] = {}
    kinds = [(_NONE, *rules) for rules in (_PREFIXES, _OTHERS, _SHORTCUTS, _HEADS)]
    for rules in product(*kinds):
        renamed = {_rename(name, rules): value for name, value in state.items()}
        if len(renamed) == len(state):  # no two parameters may end up under one name
            found.setdefault(comparable(renamed), renamed)
    return found


def comparable(names: Iterable[str]) -> frozenset[str]:
    """The names that must agree: all but batch norm's counters."""
    return frozenset(name for name in names if not name.endswith("num_batches_tracked"))


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
