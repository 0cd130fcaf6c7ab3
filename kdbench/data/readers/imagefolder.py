"""Any folder of class folders; small sets are decoded once into memory, large ones stream."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdbench.data.bundle import ImageFiles, Inputs, Source
from kdbench.data.decode import cached_images, decode, find_images
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError

Listing = tuple[np.ndarray, Tensor]  # paths of dtype bytes [N], labels int64 [N]


def imagefolder(
    root: str | None,
    cache: str,
    channels: int | None,
    size: int | None = None,
    resize: int | None = None,
    test: float = 0.2,
    in_memory_limit: float = 4.0,
) -> Source:
    """A folder of class folders, or one with train/ and test/ (or val/ in place of test/).

    With both, val/ is the validation set, unless dataset.validation sets images of train/ aside. Without a test folder
    a stratified share `test` of the images (or that many) becomes the test set, always the same.
    size: pixels a side after resizing the shorter side to `resize` (null: to `size`) and cutting out the middle;
    null where all images have one size. in_memory_limit in GB of decoded images: above it they stream from the files.
    Raises UserError that names the path for whatever is missing.
    """
    if not root:
        raise UserError("dataset.root must be the folder that holds the class folders, got null")
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"dataset.root must be a folder of class folders; there is no folder {base.resolve()}")
    if (base / "train").is_dir():
        names, train = listing(base / "train")
        parts = {part: listing(base / part, names)[1] for part in ("test", "val") if (base / part).is_dir()}
        held_out = parts.get("test", parts.get("val"))
        val = parts["val"] if len(parts) == 2 else None
    else:
        names, train, held_out, val = *listing(base), None, None
    if held_out is None:
        train, held_out = _test_split(train, test)
    return source(names, train, held_out, val, base, cache, channels, size, resize, in_memory_limit)


def imagenet(
    root: str, cache: str, channels: int | None, size: int = 224, resize: int = 256, in_memory_limit: float = 4.0
) -> Source:
    """ImageNet-1k (Russakovsky et al. 2015): train/ and val/ with a folder a class; val/ is the test set."""
    base = Path(root)
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise UserError(
                f"ImageNet must be unpacked by hand: {base.resolve()} must hold train/ and val/ with a folder a class, "
                f"and {part}/ is not there. Put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from "
                "https://image-net.org, registration needed) there and unpack them, or set dataset.root"
            )
    names, train = listing(base / "train")
    held_out = listing(base / "val", names)[1]
    return source(names, train, held_out, None, base, cache, channels, size, resize, in_memory_limit)


def listing(folder: Path, names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Listing]:
    """Class names (sorted folder names) and all images with their labels, in the order of their paths.

    names: the classes of the training set, if this is another part. Raises UserError naming the folder.
    """
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise UserError(f"dataset.root: {folder.resolve()} holds no class folders")
    if names is None and len(found) == 1:
        raise UserError(f"dataset.root: {folder.resolve()} holds one class folder only ({found[0]}); two are needed")
    names = names or tuple(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(f"dataset.root: {(folder / unknown[0]).resolve()} is a class that is not in the training set")
    paths = [find_images(folder / name, "dataset.root") for name in found]
    labels = [torch.full((len(part),), names.index(name)) for name, part in zip(found, paths)]
    return names, (np.concatenate(paths), torch.cat(labels))


def source(
    names: tuple[str, ...],
    train: Listing,
    test: Listing,
    val: Listing | None,
    base: Path,
    cache: str,
    channels: int | None,
    size: int | None,
    resize: int | None,
    in_memory_limit: float,
) -> Source:
    """Listings as a Source: decoded through the cache if all fit into the limit, else as files that stream."""
    channels = channels or 3
    size, resize = _sizes(train[0], channels, size, resize)
    count = sum(len(part[0]) for part in (train, test, val) if part is not None)
    if not in_memory_limit >= 0:
        raise UserError(f"dataset.in_memory_limit must be 0 or more GB, got {in_memory_limit}")
    pixels = size or decode(os.fsdecode(bytes(train[0][0])), channels).shape[-1]
    resident = count * channels * pixels**2 <= in_memory_limit * 1e9
    if not resident and not size:
        raise UserError(f"dataset.size must be set: {count:,} images exceed dataset.in_memory_limit={in_memory_limit}")

    def images(paths: np.ndarray) -> Inputs:
        files = ImageFiles(paths, size, resize, channels)
        return cached_images(files, base, cache).images if resident else files

    held = None if val is None else (images(val[0]), val[1])
    if not resident:
        return Source(names, images(train[0]), train[1], images(test[0]), test[1], held)
    done = cached_images(ImageFiles(train[0], size, resize, channels), base, cache)
    tests = images(test[0])
    if done.images.shape[1:] != tests.shape[1:]:
        raise UserError(f"dataset.size must be set: training and test images differ in size below {base.resolve()}")
    return Source(names, done.images, train[1], tests, test[1], held, done.fingerprint, (done.mean, done.std))


def _sizes(paths: np.ndarray, channels: int, size: int | None, resize: int | None) -> tuple[int, int]:
    """(size, resize), 0 for images that are to stay as they are."""
    if size is None:
        height, width = decode(os.fsdecode(bytes(paths[0])), channels).shape[-2:]
        if resize is not None or height != width:
            why = "dataset.resize is set" if resize is not None else f"images are not square ({width}x{height})"
            raise UserError(f"dataset.size must be a number of pixels because {why}, got null")
        return 0, 0
    resize = resize or size
    if size < 4 or resize < size:
        raise UserError(f"dataset.size must be 4 or more and at most dataset.resize ({resize}), got {size}")
    return size, resize


def _test_split(train: Listing, test: float) -> tuple[Listing, Listing]:
    paths, labels = train
    count = count_of(test, len(labels), "dataset.test", whole=False)
    if count == 0:
        raise UserError("dataset.test must be above 0 where the folder has no test/ or val/, got 0")
    rows = stratified(labels, count, order_keys(len(labels), 0, "imagefolder test"))
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[rows] = False
    return (paths[rest.numpy()], labels[rest]), (paths[rows.numpy()], labels[rows])
