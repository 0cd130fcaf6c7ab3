"""Pack of a streamed set: its images decoded and resized once, in one file that all processes map into memory.

A random crop is then cut out of the image of `resize` pixels a shorter side instead of the whole one, so what is
trained on is a little softer where a crop is small; what is evaluated on is the same to the last bit. A set of 1.3
million images of 341x256 takes 335 GB.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from kdbench.data.bundle import ImageFiles, Pack, stamp
from kdbench.data.cache import keep
from kdbench.data.decode import Broken, FileSet, Key, read_each, whole_set
from kdbench.data.resize import shorter_side
from kdbench.errors import UserError
from kdbench.files import lock

log = logging.getLogger("kdbench")
_CHUNK = 32  # images that a worker process hands over at once


class _Resized(FileSet):
    """Images [C, H, W] with `files.resize` pixels on the shorter side, a list a batch."""

    def __getitems__(self, keys: Sequence[Key]) -> list[Tensor] | Broken:  # type: ignore[override]
        return read_each(lambda row: shorter_side(self.read(row)[0], self.files.resize), keys)


def packed_files(files: ImageFiles, root: str | Path, cache: str | Path) -> ImageFiles:
    """The files with their pack below `cache`, which is made if it is not there, whole or not at all.

    Keyed as a cache of decoded images is; a second process waits for the first. Raises UserError for an image that
    cannot be read, or where the pack cannot be written.
    """
    name = stamp(files, os.path.abspath(root))[:32]
    path = Path(cache) / f"{name}.pack"
    index = path.with_suffix(".npy")  # written last: where it is, the pack is whole
    try:
        if not index.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(f"{path}.lock"):
                if not index.exists():
                    _build(files, path, index)
        shapes = np.load(index)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"dataset.packed = true: cannot make {path}: {error}; free the disk or set false") from error
    start = np.concatenate([[0], np.cumsum(shapes[:, 0].astype(np.int64) * shapes[:, 1] * files.channels)])
    if len(shapes) != len(files.paths) or size != start[-1]:
        raise UserError(f"{path} is broken: remove it and {index.name}, and it is made again")
    return replace(files, pack=Pack(str(path.resolve()), start[:-1], shapes))


def _build(files: ImageFiles, path: Path, index: Path) -> None:
    count, shapes, began = len(files.paths), np.empty((len(files.paths), 2), np.int32), time.perf_counter()
    log.info("packing %s images once, into %s", f"{count:,}", path)
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        left.unlink(missing_ok=True)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            for rows, images in whole_set(_Resized(files), _CHUNK):
                for row, image in zip(rows, images):
                    shapes[row] = image.shape[1:]
                    file.write(image.permute(1, 2, 0).contiguous().numpy().data)

    keep(path, write)
    keep(index, lambda partial: _save(partial, shapes))
    log.info("packed %s images in %.1f s", f"{count:,}", time.perf_counter() - began)


def _save(partial: Path, shapes: np.ndarray) -> None:
    with open(partial, "wb") as file:
        np.save(file, shapes)
