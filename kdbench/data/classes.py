"""Classes of labels as a file holds them: whole numbers or names become the places of the sorted names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kdbench.errors import UserError, require, some


def numbered(parts: Mapping[str, np.ndarray], key: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Class names in order, and the labels [N] of "train" and the other parts as their numbers: int64 [N].

    Raises UserError naming `key` for labels that name no class, one class alone, and classes that nothing trains on.
    """
    values = as_names(np.concatenate(list(parts.values())), key)
    ends = np.cumsum([len(part) for part in parts.values()])
    own = dict(zip(parts, np.split(values, ends[:-1]), strict=True))
    names = np.unique(own["train"])
    require(len(names) > 1, key, str(names[0]), "two classes or more in the training set")
    for name, found in own.items():
        strange = np.setdiff1d(found, names)
        if len(strange):
            shown = some(strange, 5)
            raise UserError(f"{len(strange)} classes of the {name} set ({shown}) are not in the training set")
    return tuple(map(str, names)), {
        name: torch.from_numpy(np.searchsorted(names, found)).long() for name, found in own.items()
    }


def refuse_measurements(classes: Tensor, key: str) -> None:
    """Raise UserError where most samples have a label that no other has: numbers that were measured, or identifiers.

    classes: [N] the numbers of the samples' classes.
    """
    count, rows = len(torch.unique(classes)), len(classes)
    many = f"{count:,} values in {rows:,} rows"
    require(2 * count <= rows or rows < 10, key, many, "classes, of which each has several samples")


def as_names(values: np.ndarray, key: str) -> np.ndarray:
    """Labels as int64 where all are whole numbers, else as text. Raises UserError for what names no class."""
    allowed = "one class a sample: a whole number or a name"
    if values.dtype.kind == "f":
        wrong = values[~(np.isfinite(values) & (values == np.round(values)))]
        require(not len(wrong), key, str(wrong[:1].tolist()), allowed)
    if values.dtype.kind in "biuf":
        return values.astype(np.int64)
    missing = [value is None or str(value).strip() in ("", "nan", "None") for value in values.tolist()]
    require(not any(missing), key, f"nothing in {sum(missing):,} rows", allowed)
    text = values.astype(str)
    whole = all(value.lstrip("-").isdecimal() and str(int(value)) == value for value in np.unique(text).tolist())
    return text.astype(np.int64) if whole else text
