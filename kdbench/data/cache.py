"""Cache of what was decoded once: whole sets, and what a sample of a streamed set says of it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdbench.data.bundle import ImageFiles, fingerprint, stamp, statistics
from kdbench.data.decode import read_images
from kdbench.data.pixels import Marked
from kdbench.files import lock

log = logging.getLogger("kdbench")


class Decoded(NamedTuple):
    """A set of images in memory."""

    images: Tensor  # uint8 [N, C, H, W]
    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    marked: Marked


def cached_images(files: ImageFiles, root: str | Path, cache: str | Path) -> Decoded:
    """`read_images` once; later from a file below `cache`.

    The file is keyed by the paths below `root`, sizes in bytes and times of change, and what is done to the images;
    its content is checked against its fingerprint, and it is made again if it does not match. Written whole or not at
    all; a second process waits for the first. Without permission to write, what is there is used, and the rest decoded
    each time.
    """
    path = Path(cache) / f"{stamp(files, os.path.abspath(root))[:32]}.safetensors"
    found = _load(path)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(f"{path}.lock"):
            return _load(path) or _build(files, path)
    except OSError as error:
        log.warning("no cache of decoded images in %s (%s): decoding them each time", path.parent, error)
        return _decoded(files)


def _decoded(files: ImageFiles) -> Decoded:
    images, marked = read_images(files)
    return Decoded(images, fingerprint(images), *statistics(images), marked)


def _load(path: Path) -> Decoded | None:
    """The cached images, or None if the file is missing or not what it was when it was written."""
    try:
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            images = file.get_tensor("images")
        mean, std, marked = json.loads(known["about"])
        found = Decoded(images, known["fingerprint"], tuple(mean), tuple(std), Marked(*marked))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is broken (%s): decoding the images again", path, error)
        return None
    if found.fingerprint != fingerprint(images):
        log.warning("%s has changed since it was written: decoding the images again", path)
        return None
    return found


def _build(files: ImageFiles, path: Path) -> Decoded:
    """Decode and keep, with the lock held: what a killed process left half written goes first."""
    log.info("decoding %s images once, into %s", f"{len(files.paths):,}", path)
    start = time.perf_counter()
    made = _decoded(files)
    about = {"fingerprint": made.fingerprint, "about": json.dumps([made.mean, made.std, made.marked])}
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        left.unlink(missing_ok=True)
    keep(path, lambda partial: save_file({"images": made.images}, partial, about))
    log.info("decoded %s images in %.1f s", f"{len(made.images):,}", time.perf_counter() - start)
    return made


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file that becomes `path` whole or not at all, readable for whom the umask lets read."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors makes its files for the owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
