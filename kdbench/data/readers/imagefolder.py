"""Any folder of class folders; small sets are decoded once into memory, large ones stream."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdbench.arguments.ranges import Amount, Finite, Text, listed, within
from kdbench.data.bundle import ImageFiles, Inputs, Source
from kdbench.data.cache import Decoded, cached_images
from kdbench.data.decode import FileSet
from kdbench.data.files import LeftOut, images_below, no_images
from kdbench.data.pack import packed_files
from kdbench.data.pixels import Marked, ground, span
from kdbench.data.readers.folders import class_folders, parts_of
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError, some

log = logging.getLogger("kdbench")

Side = Annotated[int, within(4, 10_000)]  # pixels
Gigabytes = Annotated[float, within(0, 1e6)]
Listing = tuple[np.ndarray, Tensor]  # paths of dtype bytes [N], labels int64 [N]


class Parts(NamedTuple):
    """A set's files by what they are for."""

    train: Listing
    test: Listing
    val: Listing | None = None


@dataclass(frozen=True)
class Reading:
    """How a set's files become images; the keys of `dataset` of the same names."""

    base: Path  # the set's folder
    cache: str
    channels: int | None
    size: int | None = None
    resize: int | None = None
    in_memory_limit: float = 4.0
    background: str = "white"
    value_range: list[float] | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        ground(self.background), span(self.value_range)  # refuse before any file is looked for

    def files(self, paths: np.ndarray) -> ImageFiles:
        """Files of the training set. Raises UserError for a size that is none, or that is needed and not set."""
        size, resize = self.size or 0, self.resize or self.size or 0
        files = ImageFiles(paths, size, resize, self.channels or 3, ground(self.background), span(self.value_range))
        if self.size is None:
            height, width = FileSet(files).shape[1:]
            if self.resize is not None or height != width:
                shape = f"images are not square ({width}x{height})"
                why = shape if self.resize is None else "dataset.resize is set"
                raise UserError("dataset.size", None, f"a number of pixels, because {why}")
        elif size < 4 or resize < size:
            raise UserError("dataset.size", size, f"4 or more, and at most dataset.resize, {resize}")
        return files


def imagefolder(
    root: str | None,
    cache: str,
    channels: int | None,
    size: Side | None = None,
    resize: Side | None = None,
    test: Amount = 0.2,
    in_memory_limit: Gigabytes = 4.0,
    background: Text = "white",
    value_range: Annotated[list[Finite], listed(2, "[black, white]", most=2)] | None = None,
    packed: bool = False,
) -> Source:
    """A folder of class folders, or one with train/ and test/ (or val/ in place of test/).

    Spelled in any case, and as training, testing, eval, valid, validation, dev. With both, val/ is the validation set,
    unless dataset.validation sets images of train/ aside. Without a test folder a stratified share `test` of the images
    (or that many) becomes the test set, always the same; each class keeps an image to train on.
    size: pixels a side after resizing the shorter side to `resize` (null: to `size`) and cutting out the middle;
    null where all images have one size. in_memory_limit in GB of decoded images: above it they stream from the files.
    packed: streamed images are decoded and resized once, into a file that is mapped into memory (kdbench.data.pack).
    background: what transparent images are laid on. value_range: black and white of gray images of more than 8 bits.
    What is left out is said with its count. Raises UserError that names the path for whatever is missing.
    """
    if not root:
        raise UserError("dataset.root", root, "the folder that holds the class folders")
    base = Path(root)
    if not base.is_dir():
        raise UserError("dataset.root", root, "a folder of class folders", f"There is no folder {base.resolve()}")
    reading = Reading(base, cache, channels, size, resize, in_memory_limit, background, value_range, packed)
    left_out = LeftOut()
    where = parts_of(base, left_out)
    names, train = listing(where["train"], left_out)
    parts = {part: listing(where[part], left_out, names)[1] for part in ("test", "val") if part in where}
    left_out.tell(base)
    if not parts:
        return source(names, Parts(*_test_split(names, train, test)), reading)
    val = parts["val"] if len(parts) == 2 else None
    return source(names, Parts(train, parts.get("test", parts.get("val")), val), reading)  # type: ignore[arg-type]


def imagenet(
    root: str,
    cache: str,
    channels: int | None,
    size: Side = 224,
    resize: Side = 256,
    in_memory_limit: Gigabytes = 4.0,
    packed: bool = False,
) -> Source:
    """ImageNet-1k (Russakovsky et al. 2015): train/ and val/ with a folder a class; val/ is the test set."""
    base = Path(root)
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise UserError(
                "dataset.root", root, "a folder that holds train/ and val/ with a folder a class",
                f"There is no {(base / part).resolve()}. ImageNet is unpacked by hand: put ILSVRC2012_img_train.tar "
                "and ILSVRC2012_img_val.tar (from https://image-net.org, registration needed) there and unpack them",
            )  # fmt: skip
    left_out = LeftOut()
    names, train = listing(base / "train", left_out)
    held_out = listing(base / "val", left_out, names)[1]
    left_out.tell(base)
    reading = Reading(base, cache, channels, size, resize, in_memory_limit, packed=packed)
    return source(names, Parts(train, held_out), reading)._replace(published=(1_281_167, 50_000))


def listing(folder: Path, left_out: LeftOut, names: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Listing]:
    """Class names (sorted folder names) and all images with their labels, in the order of their paths.

    names: the classes of the training set, if this is another part. Raises UserError naming the folder.
    """
    found = class_folders(folder, left_out, names)
    if not found:
        raise UserError(f"dataset.root: {folder.resolve()} holds no class folders")
    if names is None and len(found) == 1:
        raise UserError(f"dataset.root: {folder.resolve()} holds one class folder only ({min(found)}); two are needed")
    paths: dict[str, list[bytes]] = {}
    for name, place in found.items():
        here = LeftOut()
        paths[name] = images_below(place, here, within=folder)
        left_out.update(here)
        if not paths[name] and names is None:
            raise UserError(no_images("dataset.root", place, here))
        if paths[name] and names is not None and name not in names:
            raise UserError(f"dataset.root: {place.resolve()} is a class that is not in the training set")
    listed = {name: part for name, part in paths.items() if part}
    if names is None:
        _tell_parts_from_classes(found, listed)
    if not listed:
        raise UserError(f"dataset.root: no images in the class folders of {folder.resolve()}")
    names = names or tuple(listed)
    absent = [name for name in names if name not in listed]
    if absent:
        log.warning("%s has no images of %d of %d classes (%s)", folder, len(absent), len(names), some(absent, 5))
    labels = [torch.full((len(part),), names.index(name)) for name, part in listed.items()]
    return names, (np.concatenate([np.array(part) for part in listed.values()]), torch.cat(labels))


def _tell_parts_from_classes(found: Mapping[str, Path], listed: Mapping[str, Sequence[bytes]]) -> None:
    """Warn where all class folders hold the same two or more folders and no image beside them.

    They may be parts of a set (trn/ and tst/, fold1/ and fold2/) under names that are not known here.
    """
    inner = {name: {_folder_below(found[name], path) for path in paths} for name, paths in listed.items()}
    kinds = {frozenset(folders) for folders in inner.values()}
    same = next(iter(kinds)) if len(kinds) == 1 else frozenset()
    if len(same) < 2 or b"" in same:
        return
    log.warning(
        "the classes %s all hold the same folders (%s): are they parts of a set? Then call them train, val and test",
        ", ".join(sorted(listed)[:3]), ", ".join(sorted(os.fsdecode(folder) for folder in same)[:3]),
    )  # fmt: skip


def _folder_below(place: Path, path: bytes) -> bytes:
    """The first folder below a class's own that an image lies in; empty for none."""
    head, _, rest = os.path.relpath(path, os.fsencode(place)).partition(os.fsencode(os.sep))
    return head if rest else b""


def source(names: tuple[str, ...], parts: Parts, reading: Reading) -> Source:
    """Files as a Source: decoded through the cache if all fit into the limit, else as files that stream."""
    train, test, val = parts
    files = reading.files(train[0])
    limit, count = reading.in_memory_limit, sum(len(part[0]) for part in parts if part is not None)
    pixels = files.size or FileSet(files).shape[-1]
    if count * files.channels * pixels**2 <= limit * 1e9:
        if reading.packed:
            log.warning("dataset.packed: changes nothing, as all images fit into dataset.in_memory_limit, %g GB", limit)
        return _resident(names, parts, files, reading)
    if not files.size:
        why = f"{count:,} images exceed dataset.in_memory_limit = {limit:g} GB, and files are streamed in one size"
        raise UserError("dataset.size", None, f"a number of pixels, because {why}")

    def streamed(paths: np.ndarray) -> ImageFiles:
        own = files.of(paths)
        return packed_files(own, reading.base, reading.cache) if reading.packed else own

    held = None if val is None else (streamed(val[0]), val[1])
    return Source(names, streamed(train[0]), train[1], streamed(test[0]), test[1], held, files=files)


def _resident(names: tuple[str, ...], parts: Parts, files: ImageFiles, reading: Reading) -> Source:
    """All parts decoded. Raises UserError for parts of different sizes."""
    train, test, val = parts

    def read(paths: np.ndarray) -> Decoded:
        return cached_images(files.of(paths), reading.base, reading.cache)

    own, tests = read(train[0]), read(test[0])
    decoded = [own, tests]
    if own.images.shape[1:] != tests.images.shape[1:]:
        why = f"training and test images differ in size below {reading.base.resolve()}"
        raise UserError("dataset.size", None, f"a number of pixels, because {why}")
    held: tuple[Inputs, Tensor] | None = None
    if val is not None:
        decoded.append(read(val[0]))
        held = (decoded[-1].images, val[1])
    marked = Marked(*(sum(counts) for counts in zip(*(part.marked for part in decoded))))
    marked.tell(str(reading.base), f"{sum(len(part.images) for part in decoded):,} images", files.background)
    known = (own.fingerprint, (own.mean, own.std), files)
    return Source(names, own.images, train[1], tests.images, test[1], held, *known)


def _test_split(names: tuple[str, ...], train: Listing, test: float) -> tuple[Listing, Listing]:
    """A test set from the images of a set that has none. Raises UserError where a class has one image only."""
    paths, labels = train
    count = count_of(test, len(labels), "dataset.test", whole=False)
    if count == 0:
        raise UserError("dataset.test", test, "above 0 where the folder has no test/ or val/")
    single = [names[number] for number in (torch.bincount(labels) < 2).nonzero()[:, 0].tolist()]
    if single:
        raise UserError(
            f"dataset.root: {len(single)} of {len(names)} classes have one image only ({some(single, 5)}): it cannot "
            "both be trained on and tested. Add images, remove the class, or make train/ and test/ yourself"
        )
    rows = stratified(labels, count, order_keys(len(labels), 0, "imagefolder test"), leave=1)
    if len(rows) < count:
        raise UserError("dataset.test", test, f"at most {len(rows)}, to leave each class an image to train on")
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[rows] = False
    return (paths[rest.numpy()], labels[rest]), (paths[rows.numpy()], labels[rows])
