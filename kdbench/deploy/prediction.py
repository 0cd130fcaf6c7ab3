"""Predictions of a student on files of one's own: pictures in a folder, or the rows of a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdbench.data.arrays import ENDINGS
from kdbench.data.files import find_images
from kdbench.data.readers.tensors import vectors_in
from kdbench.deploy.student import Student, batched, options_of
from kdbench.errors import UserError
from kdbench.types import ImageInfo, VectorInfo

_TOGETHER = 64  # inputs that go through the network at once


class Prediction(NamedTuple):
    """What a student says of one input."""

    name: str  # the file, or the row of a table
    probabilities: Tensor | None  # [C]; None: it could not be read
    problem: str = ""


def predictions(student: Student, place: Path) -> Iterator[Prediction]:
    """Of every picture in or below a folder, of one picture, or of every row of a table, in order.

    A picture that cannot be read is a Prediction with its problem: one broken file of ten thousand stops nothing.
    Raises UserError for a place that is none of these, and for a table of other columns.
    """
    if isinstance(student.info, VectorInfo):
        yield from _of_rows(student, place)
    elif isinstance(student.info, ImageInfo):
        yield from _of_pictures(student, place)
    else:
        raise UserError("kdbench predict", student.name, "a network for pictures or vectors: this one takes token ids")


def _of_pictures(student: Student, place: Path) -> Iterator[Prediction]:
    if not place.exists():
        raise UserError(f"{place}: there is no such folder or file")
    if place.is_dir():  # named as the folder was typed
        paths = [
            str(place / os.path.relpath(os.fsdecode(bytes(path)), place.absolute()))
            for path in find_images(place, "folder")
        ]
    else:
        paths = [str(place)]
    for part in batched(len(paths), _TOGETHER):
        yield from _of_batch(student, [paths[i] for i in part])


def _of_batch(student: Student, paths: Sequence[str]) -> Iterator[Prediction]:
    inputs: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    for path in paths:
        try:
            inputs[path] = student.raw(path)
        except UserError as error:
            problems[path] = str(error)
    found = dict(zip(inputs, student.predict(list(inputs.values())) if inputs else ()))
    yield from (Prediction(path, found.get(path), problems.get(path, "")) for path in paths)


def _of_rows(student: Student, place: Path) -> Iterator[Prediction]:
    if not place.is_file():
        raise UserError("file", str(place), f"a file of vectors ({', '.join(ENDINGS)}), as {student.folder} is of such")
    node = options_of(student)
    before, after = node.get("context") or (0, 0)
    vectors = torch.from_numpy(vectors_in(place, node.get("keys"), (before, after)))
    wanted = student.info[-1]
    if vectors.shape[1] != wanted:
        raise UserError(
            f"{place}: it has {vectors.shape[1]} columns of numbers, {student.folder} was trained on {wanted}"
        )
    for part in batched(len(vectors), 4096):
        found = student.predict(list(vectors[part.start : part.stop]))
        yield from (Prediction(f"row {row}", one) for row, one in zip(part, found))
