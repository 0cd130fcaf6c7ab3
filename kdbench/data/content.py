"""Content of a dataset: what tells one from another in a few short texts, and what differs between two in words.

Kept beside results, so that one is believed only for the data that it is a result of. A bundle makes its own
(`Bundle.content`); loads no torch, so that a finished run is shown again at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """Samples of a part of a dataset, in order. Digests are 32 hex digits of sha256."""

    count: int
    samples: str  # the rows of the original training set, or, for a part that is not of it, the samples' fingerprint
    labels: str


@dataclass(frozen=True)
class Content:
    """What a bundle holds; plain values all through, so `dataclasses.asdict` of it is JSON and `read` the way back."""

    name: str
    inputs: str  # fingerprint of the original training inputs, unlabelled extras included
    rows: int  # how many these are
    class_count: int
    classes: str  # digest of the names in order
    train: Part
    transfer: Part
    test: Part
    val: Part | None

    @classmethod
    def read(cls, known: dict[str, Any]) -> Content:
        """From what was JSON. Raises TypeError or AttributeError for anything else."""
        parts = {key: Part(**value) for key, value in known.items() if isinstance(value, Mapping)}
        return cls(**{**known, **parts})


def differences(a: Content, b: Content) -> list[str]:
    """What differs from `a` to `b` in words ("photos: 24 -> 48 training images", "labels changed"); empty if equal."""
    said = [f"dataset {a.name} -> {b.name}"] if a.name != b.name else []
    if a.class_count != b.class_count:
        said.append(f"{b.name}: {a.class_count} -> {b.class_count} classes")
    elif a.classes != b.classes:
        said.append(f"{b.name}: other class names or another order of them")
    if a.rows != b.rows:
        # That parts of it count others and have other labels follows.
        said.append(f"{b.name}: {a.rows:,} -> {b.rows:,} training images")
    else:
        said += [f"{b.name}: training images changed"] if a.inputs != b.inputs else []
        said += _changes(a.train, b.train, "training")
        if (a.transfer, b.transfer) != (a.train, b.train):
            said += _changes(a.transfer, b.transfer, "transfer")
    return said + _changes(a.val, b.val, "validation") + _changes(a.test, b.test, "test")


def _changes(a: Part | None, b: Part | None, part: str) -> list[str]:
    if a is None or b is None:
        return [] if a == b else [f"a {part} set is there now" if a is None else f"the {part} set is gone"]
    if a.count != b.count:
        return [f"{part}: {a.count:,} -> {b.count:,} images"]
    other = [f"other {part} images"] if a.samples != b.samples else []
    return other + ([f"labels changed ({part})"] if a.labels != b.labels else [])
