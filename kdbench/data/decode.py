"""Image files to uint8 tensors: one decoder for all."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdbench.data.bundle import ImageFiles, Pack
from kdbench.data.pixels import BROKEN, RGB, WHITE, Marked, as_seen, jpeg_decoder, plain_jpeg
from kdbench.data.resize import centred, functional
from kdbench.errors import UserError

_CHUNK = 128  # images that a worker process hands over at once
_MANY = 5000  # images that are worth starting processes for: half a second of decoding
_NAMED = 20  # broken images that are named before the rest of a set is left unread
Key = tuple[int, int]  # row, seed
T = TypeVar("T")


class Decoding(Protocol):
    """What is done to images as they are decoded."""

    def drawn(self, seeds: Sequence[int]) -> np.ndarray | None:
        """What is random of the crops of a batch, for all at once; None: they are not cropped."""

    def crop(self, pixels: Tensor, drawn: np.ndarray) -> Tensor:
        """The part of an image [C, H, W] that was drawn."""
        ...

    def rest(self, pixels: Tensor, seed: int) -> Tensor:
        """What follows, of an image [C, size, size] by its seed."""
        ...


def decode(path: str, channels: int, background: RGB = WHITE, value_range: tuple[float, float] | None = None) -> Tensor:
    """One file as uint8 [channels, H, W]. Raises UserError that names the file."""
    return read_file(path, channels, background, value_range)[0]


def read_file(
    path: str, channels: int, background: RGB = WHITE, value_range: tuple[float, float] | None = None
) -> tuple[Tensor, int]:
    """One file as uint8 [channels, H, W] and its marks (kdbench.data.pixels), with Pillow, but for plain JPEGs.

    Raises UserError that names the file if it is missing, broken, or no file at all (a pipe would be waited for).
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is a pipe, a device or a folder")
        # Pillow's warnings are about files that it reads all the same; on a terminal they name no file.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                pixels, marks = plain_jpeg(opened, file, channels), 0
                if pixels is None:
                    image, marks = as_seen(opened, channels, background, value_range)
                    pixels = np.array(image)
    except UserError as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    except BROKEN as error:
        raise UserError(f"cannot read the image {path}: {_reason(path, error)}; mend or remove it") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1), marks


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose own text shows an object of Python's
        return "it is none that Pillow reads" if os.path.getsize(path) else "the file is empty"
    return str(error)


@lru_cache(maxsize=8)
def _mapped(path: str) -> np.ndarray:
    """A pack's bytes, mapped once a process; never written to, though torch asks that they could be."""
    return np.memmap(path, np.uint8, "c")


def _unpacked(pack: Pack, row: int, channels: int) -> Tensor:
    """uint8 [channels, H, W] of one image of a pack."""
    (height, width), start = pack.shapes[row].tolist(), int(pack.start[row])
    pixels = _mapped(pack.path)[start : start + height * width * channels].reshape(height, width, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


class FileSet(Dataset[Tensor]):
    """Image files as uint8 [C, size, size] by (row, seed): the middle, or what `decoding` makes of it for that seed.

    With files.size 0 images stay as they are, and must all be as large as the first.
    """

    def __init__(self, files: ImageFiles, decoding: Decoding | None = None) -> None:
        self.files, self.decoding = files, decoding
        self.shape = files.shape[1:] if files.size else self.read(0)[0].shape

    def read(self, row: int) -> tuple[Tensor, int]:
        files = self.files
        if files.pack is not None:
            return _unpacked(files.pack, row, files.channels), 0
        return read_file(files.path(row), files.channels, files.background, files.value_range)

    def _made(self, row: int, seed: int, drawn: np.ndarray | None) -> Tensor:
        pixels, _ = self.read(row)
        if self.decoding is None:
            return self.fitted(row, pixels)
        pixels = self.fitted(row, pixels) if drawn is None else self.decoding.crop(pixels, drawn)
        return self.decoding.rest(pixels, seed)

    def fitted(self, row: int, pixels: Tensor) -> Tensor:
        """The middle of an image. Raises UserError for one of another size than the first if none is asked for."""
        if self.files.size:
            return centred(pixels, self.files.resize, self.files.size)
        if pixels.shape != self.shape:
            sizes = [f"{shape[-1]}x{shape[-2]}" for shape in (self.shape, pixels.shape)]
            first, other = (f"{self.files.path(at)} has {size}" for at, size in zip((0, row), sizes))
            allowed = f"a number of pixels, because images differ in size: {first} pixels, {other}"
            raise UserError("dataset.size", None, allowed)
        return pixels

    def __getitems__(self, keys: Sequence[Key]) -> Tensor | UserError:
        """A batch [B, C, size, size]; a broken image comes back as a value, so that its message stays as it is."""
        try:
            drawn = self.decoding.drawn([seed for _, seed in keys]) if self.decoding is not None else None
            each = [None] * len(keys) if drawn is None else drawn
            return torch.stack([self._made(*key, one) for key, one in zip(keys, each, strict=True)])
        except UserError as error:
            return error


class MarkedSet(FileSet):
    """The middle of each image and its mark, for reading a whole set."""

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, list[int]] | Broken:  # type: ignore[override]
        """A batch [B, C, size, size] and B marks."""
        read = read_each(self._marked, keys)
        return read if isinstance(read, Broken) else (torch.stack([one for one, _ in read]), [mark for _, mark in read])

    def _marked(self, row: int) -> tuple[Tensor, int]:
        pixels, mark = self.read(row)
        return self.fitted(row, pixels), mark


class Broken(NamedTuple):
    """What stands for a batch in which images cannot be read, so that all of them are named at once."""

    faults: list[UserError]


def read_each(read: Callable[[int], T], keys: Sequence[Key]) -> list[T] | Broken:
    """`read` of each row, or what is wrong with those that cannot be read."""
    made, faults = [], []
    for row, _ in keys:
        try:
            made.append(read(row))
        except UserError as error:
            faults.append(error)
    return Broken(faults) if faults else made


def whole_set(images: FileSet, chunk: int) -> Iterator[tuple[range, Any]]:
    """All rows of a set in batches of `chunk`, each with its rows.

    Raises UserError that names the images that cannot be read, twenty at most: whoever has thirty broken files in a
    hundred thousand does not decode the set thirty times.
    """
    count, faults = len(images.files.paths), []
    rows = [range(first, min(first + chunk, count)) for first in range(0, count, chunk)]
    keys = [[(row, 0) for row in part] for part in rows]
    for part, batch in zip(rows, loader(images, keys, workers_for(images.files))):
        if isinstance(batch, Broken):
            faults += batch.faults
            if len(faults) >= _NAMED or faults[0].allowed:  # of another size: so may be all that follow
                break
        elif not faults:
            yield part, batch
    if len(faults) == 1 or (faults and faults[0].allowed):
        raise faults[0]
    if faults:
        many = f"{len(faults)} images" if len(faults) < _NAMED else f"at least {len(faults)} of {count:,} images"
        raise UserError("\n  ".join([f"{many} cannot be read:", *map(str, faults[:_NAMED])]))


def loader(images: FileSet, batches: Iterable[Sequence[Key]], workers: int, pinned: bool = False) -> DataLoader[Any]:
    """Batches of keys, in their order, as batches of images; a UserError stands for a batch with a broken image.

    Worker processes stay alive between epochs. `batches` is asked for its iterator anew for each epoch.
    """
    functional()  # before the workers are forked, each of which would import it, and this
    jpeg_decoder()
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )


def as_it_is(batch: Any) -> Any:
    """No collation: a FileSet's batches are stacked already."""
    return batch


def workers_for(files: ImageFiles) -> int:
    """How many processes decode a whole set: a few images are not worth starting them, nor are fewer large ones.

    Processes, not threads: at 32x32 half of the 0.1 ms is Python's own.
    """
    work = len(files.paths) * max(1, files.resize // 64)
    return 0 if work < _MANY else min(os.cpu_count() or 1, 16)


def read_images(files: ImageFiles) -> tuple[Tensor, Marked]:
    """All files decoded: uint8 [N, C, size, size], and how many are marked; size 0 keeps the images as they are.

    Raises UserError naming the files that cannot be read, or the first one of another size if none is asked for.
    """
    images = MarkedSet(files)
    result, marks = torch.empty((len(files.paths), *images.shape), dtype=torch.uint8), []
    for rows, (pixels, marked) in whole_set(images, _CHUNK):
        result[rows.start : rows.stop] = pixels
        marks += marked
    return result, Marked.of(marks)


def gray_or_colour(images: Tensor, channels: int | None) -> Tensor:
    """Images with so many channels: gray repeated three times, colour to luma (ITU-R 601), or as they are."""
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in images.split(4096)])
