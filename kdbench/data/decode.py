"""Image files to uint8 tensors: one decoder for all, and a cache of what was decoded once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop_image, resize_image

from kdbench.data.bundle import ImageFiles, fingerprint, statistics
from kdbench.data.seeds import torch_generator
from kdbench.errors import UserError

log = logging.getLogger("kdbench")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Decoded(NamedTuple):
    """A set of images in memory."""

    images: Tensor  # uint8 [N, C, H, W]
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CHUNK = 128  # images that a worker process hands over at once
_MANY = 5000  # images that are worth starting processes for: half a second of decoding
Key = tuple[int, int]  # row, seed


def find_images(folder: str | Path, key: str) -> np.ndarray:
    """All image files below a folder, sorted, as an array of bytes. Raises UserError that names the folder."""
    if not os.path.isdir(folder):
        raise UserError(f"{key} must be a folder of images; there is no folder {os.path.abspath(folder)}")
    found: list[bytes] = []
    for place, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        wanted = [name for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        found += [os.fsencode(os.path.join(place, name)) for name in wanted]
    if not found:
        raise UserError(f"{key}: no images in {os.path.abspath(folder)} (looked for {', '.join(EXTENSIONS)})")
    return np.array(sorted(found))


def decode(path: str, channels: int) -> Tensor:
    """One file as uint8 [channels, H, W], with Pillow. Raises UserError that names the file if it is missing or broken.

    torchvision.io is half as fast again for small JPEGs, but is to be removed, and lets truncated files pass.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as opened:
            image: Image.Image = opened
            if opened.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut at 255
                image = Image.fromarray((np.asarray(opened).astype(np.uint32) >> 8).astype(np.uint8))
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}; mend or remove it") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


def centred(pixels: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to `resize` pixels (antialiased), then the middle `size` x `size`; already so large: untouched."""
    if min(pixels.shape[-2:]) != resize:
        pixels = resize_image(pixels, [resize], antialias=True)
    return pixels if tuple(pixels.shape[-2:]) == (size, size) else center_crop_image(pixels, [size, size])


class FileSet(Dataset[Tensor]):
    """Image files as uint8 [C, size, size] by (row, seed): the middle, or what `crop` cuts out for that seed.

    With files.size 0 images stay as they are, and must all be as large as the first.
    """

    def __init__(self, files: ImageFiles, crop: Callable[[Tensor, int], Tensor] | None = None) -> None:
        self.files, self.crop = files, crop
        self.shape = files.shape[1:] if files.size else decode(files.path(0), files.channels).shape

    def __getitem__(self, key: Key) -> Tensor:
        row, seed = key
        pixels = decode(self.files.path(row), self.files.channels)
        if self.crop is not None:
            return self.crop(pixels, seed)
        if self.files.size:
            return centred(pixels, self.files.resize, self.files.size)
        if pixels.shape != self.shape:
            sizes = [f"{shape[-1]}x{shape[-2]}" for shape in (self.shape, pixels.shape)]
            raise UserError(
                f"dataset.size must be set, because images differ in size: {self.files.path(0)} has {sizes[0]} pixels, "
                f"{self.files.path(row)} has {sizes[1]}"
            )
        return pixels

    def __getitems__(self, keys: Sequence[Key]) -> Tensor | UserError:
        """A batch [B, C, size, size]; a broken image comes back as a value, so that its message stays as it is."""
        try:
            return torch.stack([self[key] for key in keys])
        except UserError as error:
            return error


def loader(images: FileSet, batches: Iterable[Sequence[Key]], workers: int, pinned: bool = False) -> DataLoader[Any]:
    """Batches of keys, in their order, as batches of images; a UserError stands for a batch with a broken image.

    Worker processes stay alive between epochs. `batches` is asked for its iterator anew for each epoch.
    """
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


def read_images(files: ImageFiles) -> Tensor:
    """All files decoded: uint8 [N, C, size, size]; size 0 keeps the images as they are.

    Raises UserError naming a file that cannot be read, or the first one of another size if none is asked for.
    """
    count, images = len(files.paths), FileSet(files)
    result = torch.empty((count, *images.shape), dtype=torch.uint8)
    chunks = [[(row, 0) for row in range(first, min(first + _CHUNK, count))] for first in range(0, count, _CHUNK)]
    # Processes, not threads: at 32x32 half of the 0.1 ms is Python's own. A few images are not worth starting them.
    workers = 0 if count < _MANY else min(os.cpu_count() or 1, 16)
    for chunk, batch in zip(chunks, loader(images, chunks, workers)):
        if isinstance(batch, UserError):
            raise batch
        result[chunk[0][0] : chunk[-1][0] + 1] = batch
    return result


def cached_images(files: ImageFiles, root: str | Path, cache: str | Path) -> Decoded:
    """`read_images` once; later from a file below `cache`.

    The file is keyed by the paths below `root`, sizes in bytes and times of change, and what is done to the images;
    its content is checked against its fingerprint, and it is made again if it does not match. Written whole or not at
    all; a second process waits for the first. Without permission to write, images are decoded each time.
    """
    path = Path(cache) / f"{_key(files, root)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            return _load(path) or _build(files, path)
    except OSError as error:
        log.warning("no cache of decoded images in %s (%s): decoding them each time", path.parent, error)
        images = read_images(files)
        return Decoded(images, fingerprint(images), *statistics(images))


SAMPLE = 4000  # images that tell a streamed set's mean and std: to 0.005, in half a minute of one core for ImageNet


def sampled_statistics(files: ImageFiles, cache: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a random sample of a streamed set, kept in a small file below `cache`."""
    path = Path(cache) / f"{fingerprint(files)[:32]}.stats.json"
    if path.exists():
        try:
            mean, std = json.loads(path.read_text())
            return tuple(mean), tuple(std)
        except (OSError, ValueError):
            log.warning("%s is broken: measuring again", path)
    rows = torch.randperm(len(files.paths), generator=torch_generator(0, "statistics"))[:SAMPLE]
    mean, std = statistics(read_images(files[rows]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps([mean, std]))
        partial.replace(path)
    except OSError as error:
        log.warning("cannot keep %s (%s): it is measured each time", path, error)
    return mean, std


def _key(files: ImageFiles, root: str | Path) -> str:
    digest = hashlib.sha256(f"decode 1 {files.size} {files.resize} {files.channels}\n".encode())
    base = os.path.abspath(root)
    for row in range(len(files.paths)):
        path = files.path(row)
        status = os.stat(path)
        digest.update(f"{os.path.relpath(path, base)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _load(path: Path) -> Decoded | None:
    """The cached images, or None if the file is missing or not what it was when it was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            images = file.get_tensor("images")
        mean, std = json.loads(known["stats"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("%s is broken (%s): decoding the images again", path, error)
        return None
    if known.get("fingerprint") != fingerprint(images):
        log.warning("%s has changed since it was written: decoding the images again", path)
        return None
    return Decoded(images, known["fingerprint"], tuple(mean), tuple(std))


def _build(files: ImageFiles, path: Path) -> Decoded:
    log.info("decoding %s images once, into %s", f"{len(files.paths):,}", path)
    start = time.perf_counter()
    images = read_images(files)
    name, (mean, std) = fingerprint(images), statistics(images)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({"images": images}, partial, {"fingerprint": name, "stats": json.dumps([mean, std])})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    log.info("decoded %s images in %.1f s", f"{len(images):,}", time.perf_counter() - start)
    return Decoded(images, name, mean, std)


def gray_or_colour(images: Tensor, channels: int | None) -> Tensor:
    """Images with so many channels: gray repeated three times, colour to luma (ITU-R 601), or as they are."""
    if channels is None or images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return torch.cat([(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in images.split(4096)])
