"""Predictions of a test set, image by image: what a run keeps beside its result, and what settings have right of it."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdbench.errors import UserError
from kdbench.files import write_atomically
from kdbench.results.read import Run

PREDICTIONS = "predictions.npz"
MOST = 1_000_000  # images of a test set; of a larger one nothing is kept
LEVELS = 255  # of confidence; 15 bins of a reliability diagram are 17 levels each, so none is split

Array = np.ndarray[Any, np.dtype[Any]]


class Predictions(NamedTuple):
    """A finished student on its test set, in the set's own order. Classes are the smallest signed integers that do."""

    label: Array  # [N] the true class; -1: none
    answer: Array  # [N] the student's class
    confidence: Array  # [N] uint8: its probability, rounded up to 255ths
    teacher: Array | None = None  # [N] the teacher's class; None without a teacher

    def write(self, folder: Path) -> None:
        """predictions.npz: two to four bytes an image before they are compressed. The same predictions, the same bytes.

        Measured: 10,000 images of 100 classes are 35 kB, written in 1 ms and read in half a one; a million, 5.4 MB.
        """
        kept = {name: values for name, values in self._asdict().items() if values is not None}
        stream = io.BytesIO()
        np.savez_compressed(stream, **kept)
        write_atomically(folder / PREDICTIONS, lambda temporary: temporary.write_bytes(stream.getvalue()))


def predictions(label: Array, answer: Array, probability: Array, teacher: Array | None = None) -> Predictions:
    """To be kept, from integers [N] and the answers' probabilities float [N]."""
    highest = max(int(values.max(initial=0)) for values in (label, answer, teacher) if values is not None)
    kind = np.min_scalar_type(-highest - 1)
    level = np.clip(np.ceil(probability.astype(np.float64) * LEVELS), 1, LEVELS).astype(np.uint8)
    return Predictions(
        label.astype(kind), answer.astype(kind), level, None if teacher is None else teacher.astype(kind)
    )


def read_predictions(folder: Path) -> Predictions | None:
    """What a run folder keeps; None if it keeps none. Raises UserError naming a file that is damaged or foreign."""
    found = _arrays(folder / PREDICTIONS, Predictions._fields)
    return None if found is None else Predictions(**found)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, Array] | None:
    """Those of the arrays that the file has: only they are unpacked."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.file_size > 8 * MOST for entry in archive.infolist()):
                raise ValueError(f"it unpacks to more than {MOST:,} images")
            there = set(archive.namelist())
            lacking = [name for name in names if name != "teacher" and f"{name}.npy" not in there]
            if lacking:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            packed = {name: archive.read(f"{name}.npy") for name in names if f"{name}.npy" in there}
        found = {name: np.lib.format.read_array(io.BytesIO(data), allow_pickle=False) for name, data in packed.items()}
        length = len(found["label"])
        if any(values.shape != (length,) or values.dtype.kind not in "iu" for values in found.values()):
            raise ValueError("no whole numbers, one an image")
    except _UNREADABLE as error:
        raise UserError(f"{path}: no predictions of kdbench ({error})") from error
    return found


_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, NotImplementedError, RuntimeError,
               zipfile.BadZipFile, zlib.error)  # fmt: skip


class Right(NamedTuple):
    """What the runs of a setting have right of a test set."""

    label: Array  # [N]
    share: Array  # [N] float64: of the runs, those that have the image right


def right(runs: Sequence[Run]) -> Right | None:
    """Of each test image, the share of runs that have it right; None if a run keeps no predictions, or they are of
    another test set, or not the ones that its result is of (more than two answers differ)."""
    found: list[Right] = []
    for run in runs:
        kept = _arrays(run.folder / PREDICTIONS, ("label", "answer"))
        if kept is None or (found and not np.array_equal(kept["label"], found[0].label)):
            return None
        hits = (kept["answer"] == kept["label"]).astype(float)
        figure, one = run.result.figure("test/top1"), Right(kept["label"], hits)
        if figure is None or abs(one.share.sum() - figure * len(one.share)) > 2.5:
            return None
        found.append(one)
    return Right(found[0].label, np.mean([one.share for one in found], axis=0)) if found else None
