"""Predictions of a student on inputs of one's own: pictures in a folder, the rows of a table, or texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdbench.data.arrays import ENDINGS
from kdbench.data.files import find_images
from kdbench.data.readers.tensors import vectors_in
from kdbench.data.readers.text import texts_in
from kdbench.data.rows import ENDINGS as OF_ROWS
from kdbench.data.rows import read_text
from kdbench.data.tokenise import SEPARATOR
from kdbench.deploy.student import Student, batched, options_of
from kdbench.deploy.texts import text_files
from kdbench.errors import UserError, require
from kdbench.types import TokenInfo, VectorInfo

log = logging.getLogger("kdbench")
_TOGETHER = 64  # inputs that go through the network at once


class Prediction(NamedTuple):
    """What a student says of one input."""

    name: str  # the file, the row of a table, or the text
    probabilities: Tensor | None  # [C], or an embedding [D]; None: it could not be read
    problem: str = ""

    def embedding(self, dimensions: Sequence[str]) -> list[object]:
        """Of a network that embeds: the input, a number a dimension, and the problem."""
        found = self.probabilities
        numbers = [""] * len(dimensions) if found is None else [float(f"{v:.6g}") for v in found.tolist()]
        return [self.name, *numbers, self.problem]

    def values(self, classes: Sequence[str]) -> list[object]:
        """In the order of `columns`."""
        if self.probabilities is None:
            return [self.name, "", "", *[""] * len(classes), self.problem]
        best, shares = int(self.probabilities.argmax()), [float(f"{v:.6g}") for v in self.probabilities.tolist()]
        return [self.name, classes[best], shares[best], *shares, ""]


def columns(classes: Sequence[str]) -> list[str]:
    """What a file of predictions holds: the input, the class and its probability, and each class's own."""
    return ["input", "class", "probability", *(f"p({name})" for name in classes), "problem"]


def predictions(student: Student, given: Path | Sequence[str]) -> Iterator[Prediction]:
    """Of every picture in or below a folder, of one picture, of every row of a table, of every .txt file in or below a
    folder, of every line of one, or of the texts that are `given`; in order.

    A file that cannot be read is a Prediction with its problem: one broken file of ten thousand stops nothing.
    Raises UserError for a place that is none of these, for a table of other columns, and for texts where the network
    takes none.
    """
    if isinstance(student.info, TokenInfo):
        yield from _of_texts(student, given)
        return
    if not isinstance(given, Path):
        raise UserError("--text", list(given)[:1], f"left out: {student.folder} was trained on {student.info.samples}")
    if isinstance(student.info, VectorInfo):
        yield from _of_rows(student, given)
    else:
        yield from _of_pictures(student, given)


def _of_texts(student: Student, given: Path | Sequence[str]) -> Iterator[Prediction]:
    """Texts by their own names, those of a folder's files by the files'."""
    cut = 0
    texts = _texts(student, given)
    for part in batched(len(texts), _TOGETHER):
        pairs = [texts[place] for place in part]
        read = student.read([text for _, text in pairs])
        cut += read.cut
        yield from (Prediction(name, one) for (name, _), one in zip(pairs, student.predict(list(read.ids))))
    if cut:
        length = student.info[-1]
        log.warning("%d of %d texts are longer than the run's %d tokens and were cut there", cut, len(texts), length)


def _texts(student: Student, given: Path | Sequence[str]) -> list[tuple[str, str]]:
    if isinstance(given, Path) and given.is_dir():
        return [(str(path), read_text(path)) for path in text_files(given)]
    if isinstance(given, Path):
        there = given.suffix.lower() in OF_ROWS and given.is_file()
        require(there, "input", str(given), f"a file of texts ({', '.join(OF_ROWS)}) or a folder of .txt files")
        given = texts_in(given, options_of(student).get("text"))
    return [(text.replace(SEPARATOR, "\t"), text) for text in given]


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
    columns = student.interface.columns
    vectors = torch.from_numpy(vectors_in(place, node.get("keys"), (before, after), columns))
    wanted = student.info[-1]
    if vectors.shape[1] != wanted:
        raise UserError(
            f"{place}: it has {vectors.shape[1]} columns of numbers, {student.folder} was trained on {wanted}"
        )
    for part in batched(len(vectors), 4096):
        found = student.predict(list(vectors[part.start : part.stop]))
        yield from (Prediction(f"row {row}", one) for row, one in zip(part, found))
