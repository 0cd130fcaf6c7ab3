"""Image files below a folder: which there are, and which were left out and why."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdbench.errors import UserError

log = logging.getLogger("kdbench")
# What Pillow reads as one picture of pixels (not PDF, video, fonts, or scientific containers).
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c", ".mpo", ".tga", ".pcx",
    ".qoi", ".sgi", ".rgb", ".ras", ".ico", ".dds",
)  # fmt: skip
_THUMBNAILS = ("__macosx", "@eadir", "_thumbs", ".thumbnails", ".ipynb_checkpoints", "#recycle", "$recycle.bin")
_JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".localized", ".directory")
_PIPES = "pipes, devices or sockets"


class LeftOut(Counter[str]):
    """What is no image of the set, counted by kind."""

    def tell(self, where: str | Path) -> None:
        if self.total():
            log.warning("%s: left out %s", where, self)

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {kind}" for kind, number in self.most_common() if number)


class Entries(NamedTuple):
    """What lies in one folder, the images and folders of it."""

    folders: list[str]  # names, sorted; without thumbnails and hidden ones
    images: list[str]  # names


def entries(folder: str | Path, left_out: LeftOut) -> Entries:
    """Folders and images of one folder, links followed. What is neither is counted in `left_out`.

    Asks the system for a link's end only: a folder's list says what the others are. Raises UserError naming the folder.
    """
    folders, images = [], []
    try:
        found = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"cannot read the folder {os.path.abspath(folder)}: {error}; mend or remove it") from error
    for entry in found:
        name = entry.name
        if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
            if name.startswith(".") or name.lower() in _THUMBNAILS:
                left_out[f"folder {name}"] += 1
            else:
                folders.append(name)
        elif name.startswith("._") or name.lower() in _JUNK:
            continue  # what systems leave everywhere
        elif not os.path.isfile(entry) if entry.is_symlink() else not entry.is_file():
            left_out[_PIPES if os.path.exists(entry) else "dead links"] += 1
        elif name.startswith("."):
            left_out["hidden files"] += 1
        elif name.lower().endswith(EXTENSIONS):
            images.append(name)
        else:
            left_out[os.path.splitext(name)[1].lower() or "files without extension"] += 1
    return Entries(sorted(folders), images)


def images_below(folder: str | Path, left_out: LeftOut, within: Path | None = None) -> list[bytes]:
    """Paths of all image files below a folder, links to folders followed, each folder once; sorted.

    A link to a folder that was read already, or that holds this one or is `within`, is left out: it would count images
    twice, or give one class another's.
    """
    top = os.path.abspath(folder)
    seen = {place_of(parent) for parent in Path(top).resolve().parents}
    if within is not None:
        seen |= {place_of(parent) for parent in (within, *within.resolve().parents)}
    found: list[bytes] = []
    waiting = [top]
    while waiting:
        place = waiting.pop()
        if place_of(place) in seen:
            left_out["links to a folder that is read already or lies above"] += 1
            continue
        seen.add(place_of(place))
        here = entries(place, left_out)
        found += [os.fsencode(os.path.join(place, name)) for name in here.images]
        # Real folders first: of a folder and a link to it, the folder is read.
        below = [os.path.join(place, name) for name in here.folders]
        waiting = [path for path in below if os.path.islink(path)] + waiting
        waiting += [path for path in reversed(below) if not os.path.islink(path)]
    return sorted(found)


def place_of(folder: str | Path) -> tuple[int, int]:
    """What a folder is, whatever the path to it: its device and number there."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def find_images(folder: str | Path, key: str) -> np.ndarray:
    """All image files below a folder, sorted, as an array of bytes. Raises UserError that names the folder."""
    if not os.path.isdir(folder):
        raise UserError(key, folder, "a folder of images", f"There is no folder {os.path.abspath(folder)}")
    left_out = LeftOut()
    found = images_below(folder, left_out)
    if not found:
        raise UserError(no_images(key, folder, left_out))
    left_out.tell(folder)
    return np.array(found)


def no_images(key: str, folder: str | Path, left_out: LeftOut) -> str:
    there = f"; left out: {left_out}" if left_out else ""
    return f"{key}: no images in {os.path.abspath(folder)} (looked for {', '.join(EXTENSIONS)}{there})"
