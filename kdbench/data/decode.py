"""Image files to uint8 tensors: one decoder for all, and a cache of what was decoded once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
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


_LONG_TASK = 5e-4  # seconds


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
    """One file as uint8 [channels, H, W]. Raises UserError that names the file if it is missing or broken."""
    try:
        with open(path, "rb") as file:
            data = bytearray(file.read())
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        pixels = decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
        return pixels if pixels.dtype == torch.uint8 else (pixels.to(torch.int32) >> 8).to(torch.uint8)  # 16 bits
    except (RuntimeError, ValueError, OSError):
        return _decode_slowly(path, channels)


def _decode_slowly(path: str, channels: int) -> Tensor:
    """The formats that torchvision does not read."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {error}; mend or remove it") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


def centred(pixels: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to `resize` pixels (antialiased), then the middle `size` x `size`; already so large: untouched."""
    if min(pixels.shape[-2:]) != resize:
        pixels = resize_image(pixels, [resize], antialias=True)
    return pixels if tuple(pixels.shape[-2:]) == (size, size) else center_crop_image(pixels, [size, size])


def for_all(task: Callable[[int], None], count: int) -> None:
    """task(0) .. task(count - 1). The first error is raised.

    In threads if a task is long: decoding leaves Python's lock, but for small images (0.05 ms at 32x32) passing the lock
    to and fro costs more than a second core gains (0.07 ms an image with two threads).
    """
    tried, times = min(count, 15), []
    for position in range(tried):
        start = time.perf_counter()
        task(position)
        times.append(time.perf_counter() - start)
    if sorted(times)[tried // 2] < _LONG_TASK:  # the median: the first call also loads libraries
        for position in range(tried, count):
            task(position)
        return
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        try:
            for _ in pool.map(task, range(tried, count)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_images(files: ImageFiles) -> Tensor:
    """All files decoded: uint8 [N, C, size, size]; size 0 keeps the images as they are.

    Raises UserError naming a file that cannot be read, or the first one of another size if none is asked for.
    """
    if files.size:
        result = torch.empty(files.shape, dtype=torch.uint8)
    else:
        first = decode(files.path(0), files.channels)
        result = torch.empty((len(files.paths), *first.shape), dtype=torch.uint8)

    def read(row: int) -> None:
        pixels = decode(files.path(row), files.channels)
        if files.size:
            pixels = centred(pixels, files.resize, files.size)
        elif pixels.shape != result.shape[1:]:
            height, width = result.shape[-2:]
            raise UserError(
                f"dataset.size must be set, because images differ in size: {files.path(0)} has {width}x{height} "
                f"pixels, {files.path(row)} has {pixels.shape[-1]}x{pixels.shape[-2]}"
            )
        result[row] = pixels

    for_all(read, len(files.paths))
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
