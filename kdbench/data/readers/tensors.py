"""Your own numbers: vectors, frames with their neighbours, or tables, from one file or from one file a part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch

from kdbench.arguments import call
from kdbench.arguments.ranges import within
from kdbench.data.arrays import ENDINGS, File, known, read_arrays
from kdbench.data.bundle import Source
from kdbench.data.classes import numbered, refuse_measurements
from kdbench.data.readers.folders import part_of
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError, require, some

log = logging.getLogger("kdbench")
# What arrays are called where no key says so, in any case.
_USUAL = {
    "inputs": ("inputs", "x", "x_train", "train_inputs", "data"),
    "labels": ("labels", "label", "y", "y_train", "train_labels", "target", "class"),
    "test_inputs": ("test_inputs", "x_test"),
    "test_labels": ("test_labels", "y_test"),
    "val_inputs": ("val_inputs", "x_val", "x_valid"),
    "val_labels": ("val_labels", "y_val", "y_valid"),
}
Frames = Annotated[int, within(0, 1000)]
# Its square is well inside of float32; beside one of 1e37 the others would have no digit left. Of numpy's own kind:
# beside float16 a Python number would be one, too, which makes it infinite.
_LARGEST = np.float32(1e15)


@dataclass(frozen=True)
class Keys:
    """`dataset.keys`: which array of the file, or column of the table, is which; null: by its usual name."""

    inputs: str | list[str] | None = None
    labels: str | None = None
    groups: str | None = None
    test_inputs: str | None = None
    test_labels: str | None = None
    val_inputs: str | None = None
    val_labels: str | None = None


class Part(NamedTuple):
    inputs: np.ndarray  # float32 [N, D]
    labels: np.ndarray  # [N] numbers or text
    groups: np.ndarray | None  # [N] what belongs together: the utterance of a frame, the patient of a measurement
    columns: tuple[str, ...] = ()  # of a table, those of its inputs in order

    def select(self, rows: np.ndarray) -> Part:
        groups = None if self.groups is None else self.groups[rows]
        return self._replace(inputs=self.inputs[rows], labels=self.labels[rows], groups=groups)


def tensors(
    root: str | None,
    keys: Mapping[str, object] | None = None,
    test: float = 0.2,
    val: float = 0.0,
    context: tuple[Frames, Frames] = (0, 0),
) -> Source:
    """One file of arrays or columns, or a folder with train.*, test.* and perhaps val.* in any usual spelling; columns
    of tables are those of the training file by name, in whatever order another file has them.

    Inputs become float32; labels are class names, or whole numbers that stand for them, in order. A part that is not
    there is set aside from the training set, always the same: a stratified share (or number) of the samples, `test`
    and `val`, or whole groups where there are groups. context: how many rows before and after each are joined to it,
    [N, D] -> [N, (before + 1 + after) D], never across groups; at an edge its last row stands for those that are
    missing. Raises UserError naming the key, or the file and what in it cannot be.
    """
    wanted = call(Keys, keys or {}, "dataset.keys")
    parts = {name: _joined(part, context) for name, part in _parts(root, wanted).items()}
    for name, amount in (("test", test), ("val", val)):
        if name not in parts and (amount or name == "test"):
            parts["train"], parts[name] = _set_aside(parts["train"], amount, name, context != (0, 0))
    names, labels = numbered({name: part.labels for name, part in parts.items()}, "dataset.keys.labels")
    if "-1" in names and len(names) > 2:
        log.warning("label -1 is a class like any other; rows that have no label are to be left out of the file")
    made = {name: (torch.from_numpy(parts[name].inputs), labels[name]) for name in parts}
    return Source(names, *made["train"], *made["test"], val=made.get("val"), columns=parts["train"].columns)


def vectors_in(
    path: Path,
    keys: Mapping[str, object] | None = None,
    context: tuple[int, int] = (0, 0),
    columns: Sequence[str] | None = None,
) -> np.ndarray:
    """The inputs of a file alone, float32 [N, D], read as `tensors` reads them; labels may be there, and are left out.

    columns: those of the table that a network was trained on, in order; of a table they are found by name. Raises
    UserError naming the file and what in it cannot be.
    """
    wanted, file = call(Keys, keys or {}, "dataset.keys"), read_arrays(path)
    wanted = _by_name(file, wanted, columns or ())
    given = {name for name in (wanted.labels, wanted.groups) if name in file.names}
    label = None if wanted.labels else _called(file, wanted, "labels")
    names = _input_names(file, wanted, "", given | ({label} if label else set()))
    groups = file.words(wanted.groups) if wanted.groups in file.names and wanted.groups else None
    inputs = _finite(file.numbers(names), names, file)
    return _joined(Part(inputs, np.zeros(len(inputs)), groups), context).inputs


def _parts(root: str | None, wanted: Keys) -> dict[str, Part]:
    """ "train", and "test" and "val" where the file or folder has them."""
    place = Path(root or "")
    allowed = f"a file ({', '.join(ENDINGS)}), or a folder with train and test files"
    require(bool(root) and place.exists(), "dataset.root", root, allowed)
    if not place.is_dir():
        return _of_file(read_arrays(place), wanted)
    files = [path for path in sorted(place.iterdir()) if path.suffix.lower() in ENDINGS]
    found: dict[str, Path] = {}
    for path in files:
        part = part_of(path.stem)
        if part in found:
            both = f"{found[part].name} and {path.name}"
            raise UserError(f"dataset.root: {both} in {place} would both be the {part} set: move one")
        found |= {part: path} if part else {}
    require("train" in found, "dataset.root", root, f"{allowed}; it holds no train file")
    parts = {"train": _part(read_arrays(found.pop("train")), wanted, "")}
    for name, path in found.items():
        file = read_arrays(path)
        parts[name] = _part(file, _by_name(file, wanted, parts["train"].columns), "")
        _refuse_other_width(parts[name], parts["train"], str(path))
    return parts


def _by_name(file: File, wanted: Keys, columns: Sequence[str]) -> Keys:
    """The keys with which a table gives the inputs `columns`, in their order. Raises UserError for what it lacks."""
    if not file.table or not columns:
        return wanted
    lacking = [name for name in columns if name not in file.names]
    if lacking:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        said = f"there is no column {lacking[0]}{others}, which the network is trained on; it has {some(file.names)}"
        raise UserError(f"{file.path}: {said}")
    return replace(wanted, inputs=list(columns))


def _of_file(file: File, wanted: Keys) -> dict[str, Part]:
    parts = {"train": _part(file, wanted, "")}
    for name in ("test", "val"):
        if _called(file, wanted, f"{name}_inputs") is None:
            unused = getattr(wanted, f"{name}_labels")
            require(unused is None, f"dataset.keys.{name}_labels", unused, f"null without {name}_inputs")
            continue
        parts[name] = _part(file, wanted, f"{name}_")
        _refuse_other_width(parts[name], parts["train"], f"{file.path}, {name}")
    return parts


def _refuse_other_width(part: Part, train: Part, where: str) -> None:
    if part.inputs.shape[1] != train.inputs.shape[1]:
        wide = f"{part.inputs.shape[1]} dimensions, the training set {train.inputs.shape[1]}"
        raise UserError(f"{where}: the inputs have {wide}")


def _part(file: File, wanted: Keys, prefix: str) -> Part:
    """Inputs, labels and groups of one part. Raises UserError for what is not there, or of another length."""
    label = _called(file, wanted, f"{prefix}labels")
    if label is None:
        usual = f"one of {', '.join(_USUAL[f'{prefix}labels'])} in {file.path}"
        raise UserError(f"dataset.keys.{prefix}labels", None, f"a name; there is none of the usual ones ({usual})")
    group = None if wanted.groups is None or prefix else known(file, wanted.groups, "dataset.keys.groups")
    names = _input_names(file, wanted, prefix, {label, group or label})
    inputs, labels = file.numbers(names), file.words(label)
    groups = None if group is None else file.words(group)
    for name, column in ((label, labels), (group, groups)):
        if column is not None and len(column) != len(inputs):
            raise UserError(f"{file.path}: {', '.join(names[:3])} has {len(inputs)} rows, {name} has {len(column)}")
    return Part(_finite(inputs, names, file), labels, groups, tuple(names) if file.table else ())


def _input_names(file: File, wanted: Keys, prefix: str, taken: set[str]) -> list[str]:
    key = f"{prefix}inputs"
    typed = getattr(wanted, key)
    if isinstance(typed, list):
        require(bool(typed), f"dataset.keys.{key}", typed, "one or more names")
        names = [known(file, name, f"dataset.keys.{key}") for name in typed]
        apart = len({*names}) == len(names) and not taken & {*names}
        said = f"names that differ, and none of what is no input ({', '.join(sorted(taken))})"
        require(apart, f"dataset.keys.{key}", typed, said)
        return names
    name = _called(file, wanted, key)
    if name is None and file.table:
        names = [name for name in file.names if name not in taken]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        log.info("%s: inputs %s; not %s (dataset.keys)", file.path, shown, ", ".join(sorted(taken)))
        return names
    if name is None:
        usual = f"one of {', '.join(_USUAL[key])} in {file.path}, which has {some(file.names)}"
        raise UserError(f"dataset.keys.{key}", None, f"a name; there is none of the usual ones ({usual})")
    return [name]


def _called(file: File, wanted: Keys, key: str) -> str | None:
    """What an array or column is called: as it was typed, or by a usual name that the file has."""
    typed = getattr(wanted, key)
    if isinstance(typed, str):
        return known(file, typed, f"dataset.keys.{key}")
    if file.table and key not in ("labels",):
        return None  # a column may be called x; the inputs of a table are all columns
    return next((name for usual in _USUAL[key] for name in file.names if name.lower() == usual), None)


def _finite(inputs: np.ndarray, names: Sequence[str], file: File) -> np.ndarray:
    """Inputs as float32. Raises UserError naming the first number that is none, or too large to be squared."""
    wrong = ~(np.abs(inputs) <= _LARGEST) if inputs.dtype.kind == "f" else np.zeros((1, 1), bool)
    if wrong.any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        where = names[column] if len(names) == inputs.shape[1] else f"{names[0]}, dimension {column}"
        raise UserError(
            f"{file.path}: {int(wrong.sum()):,} of {inputs.size:,} inputs are no number up to {_LARGEST:g}, the first "
            f"({inputs[row, column]}) in row {row} of {where}; mend or remove them"
        )
    return np.ascontiguousarray(inputs, dtype=np.float32)


def _joined(part: Part, context: tuple[int, int]) -> Part:
    before, after = context
    if not before and not after:
        return part
    rows = np.arange(len(part.inputs))
    begins = np.ones(len(rows), bool)
    begins[1:] = part.groups[1:] != part.groups[:-1] if part.groups is not None else False
    first = np.maximum.accumulate(np.where(begins, rows, 0))
    ends = np.append(begins[1:], True)
    last = np.minimum.accumulate(np.where(ends, rows, len(rows))[::-1])[::-1]
    seen = (rows[:, None] + np.arange(-before, after + 1)).clip(first[:, None], last[:, None])
    return part._replace(inputs=part.inputs[seen].reshape(len(rows), -1))


def _set_aside(part: Part, amount: float, name: str, joined: bool) -> tuple[Part, Part]:
    """The rest, and a share or number of the samples: stratified by class, or whole groups."""
    count = count_of(amount, len(part.labels), f"dataset.{name}", whole=False)
    require(count > 0, f"dataset.{name}", amount, f"above 0 where the data has no {name} set")
    if part.groups is not None:
        numbers = np.unique(part.groups, return_inverse=True)[1]
        shuffled = torch.argsort(order_keys(int(numbers.max()) + 1, 0, f"tensors {name}")).numpy()
        sizes = np.bincount(numbers)[shuffled].cumsum()
        taken = int(np.searchsorted(sizes, count)) + 1
        require(taken < len(sizes), f"dataset.{name}", amount, f"less: {len(sizes)} groups must not all be set aside")
        held, how = np.isin(numbers, shuffled[:taken]), f"{taken} of {len(sizes)} groups"
    else:
        classes = torch.from_numpy(np.unique(part.labels, return_inverse=True)[1])
        refuse_measurements(classes, "dataset.keys.labels")
        rows = stratified(classes, count, order_keys(len(classes), 0, f"tensors {name}"), leave=1)
        require(len(rows) == count, f"dataset.{name}", amount, f"at most {len(rows)}: each class keeps a sample")
        held, how = np.isin(np.arange(len(classes)), rows.numpy()), "stratified by class"
    log.info(
        "no %s set in the data: %s of %s samples set aside for it, %s, always the same (dataset.%s)",
        name, f"{int(held.sum()):,}", f"{len(held):,}", how, name,
    )  # fmt: skip
    if joined and part.groups is None:
        log.warning("neighbours of %s samples are in the training set: dataset.keys.groups keeps them together", name)
    return part.select(~held), part.select(held)
