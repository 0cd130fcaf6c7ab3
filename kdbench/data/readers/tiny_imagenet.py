"""Tiny ImageNet, from the zip of its official layout."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.utils import download_url

from kdbench.data.bundle import Source
from kdbench.data.download import Files, obtain
from kdbench.data.files import LeftOut
from kdbench.data.readers.imagefolder import Gigabytes, Listing, Parts, Reading, Side, listing, source
from kdbench.errors import UserError

NAME = "tiny-imagenet-200"
FILES = Files(
    "Tiny ImageNet",
    "http://cs231n.stanford.edu",
    (f"http://cs231n.stanford.edu/{NAME}.zip",),
    ((f"{NAME}.zip", "90528d7ca1a48142e341f4ef8d21d0de"),),
)


def tiny_imagenet(
    root: str,
    cache: str,
    download: bool,
    channels: int | None,
    size: Side | None = None,
    resize: Side | None = None,
    in_memory_limit: Gigabytes = 4.0,
) -> Source:
    """100,000 + 10,000 colour 64x64 images, 200 classes (Le and Yang 2015); its validation images are the test set.

    The 10,000 images that it calls its test set have no published labels and are not read.
    """
    base = obtain(lambda fetch: _unpacked(Path(root), fetch), FILES, root, download)
    left_out = LeftOut()
    names, train = listing(base / "train", left_out)
    del left_out[".txt"]  # bounding boxes, a file a class
    left_out.tell(base)
    reading = Reading(base, cache, channels, size, resize, in_memory_limit)
    return source(names, Parts(train, _validation(base, names)), reading)._replace(published=(100_000, 10_000))


def _unpacked(root: Path, fetch: bool) -> Path:
    """The folder; with `fetch` it is unpacked from the zip, which is downloaded if it is not there."""
    folder = root / NAME
    if folder.is_dir():
        return folder
    if not fetch:
        raise FileNotFoundError(folder)
    archive, md5 = FILES.wanted[0]
    download_url(FILES.urls[0], str(root), archive, md5)
    partial = root / f".{NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(root / archive) as packed:
        packed.extractall(partial)
    (partial / NAME).replace(folder)  # whole or not at all: an interrupted unpacking is never taken for the data
    partial.rmdir()
    return folder


def _validation(base: Path, names: tuple[str, ...]) -> Listing:
    """val/val_annotations.txt: file name, tab, class, tab, bounding box."""
    table = base / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t")[:2] for line in table.read_text().splitlines() if line]
        labels = torch.tensor([names.index(name) for _, name in rows])
    except (OSError, ValueError) as error:
        raise UserError(f"{table.resolve()} cannot be read ({error}): remove {base.resolve()} and try again") from error
    paths = np.array([bytes((base / "val" / "images" / name).resolve()) for name, _ in rows])
    return paths, labels
