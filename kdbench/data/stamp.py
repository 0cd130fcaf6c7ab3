"""Stamp: what the system says of the files that a dataset was read from, so that unchanged ones need no second reading.

A stamp that does not hold says nothing yet: files may have been copied or touched; their content decides then.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parents[1])
_CODE = (".py", ".pyc", ".so", ".pyd", ".lock")
_listening: list[set[str]] = []  # sets that the files and folders go to which this process reads
_hooked: list[bool] = []


@dataclass(frozen=True)
class Stamp:
    """Files and listed folders (relative ones count from the current folder), and a digest of their names, sizes and
    times of change; "" if one of them was written while it was read."""

    paths: tuple[str, ...]
    digest: str

    @classmethod
    def read(cls, known: Any) -> Stamp | None:
        """From what was JSON; None for anything else."""
        fits = isinstance(known, dict) and known.keys() == {"paths", "digest"} and isinstance(known["paths"], list)
        return cls(tuple(map(str, known["paths"])), str(known["digest"])) if fits else None

    def holds(self) -> bool:
        """Whether nothing has changed since. Asks the system once a file: 3 s for ImageNet."""
        return bool(self.digest) and _digest(self.paths)[0] == self.digest


@contextmanager
def reading(*places: str | None) -> Iterator[Callable[[], Stamp]]:
    """Note what is read in here; afterwards the function that it gives makes the stamp of it.

    places: the dataset's folder, which counts as itself too (a link may lead elsewhere later), and the cache's, which
    does not count. What libraries read without Python's own `open` is not seen, but in the dataset's folder.
    """
    root, cache = (*places, None, None)[:2]
    seen: set[str] = set()
    began = time.time_ns()
    _listening.append(seen)
    if not _hooked:
        sys.addaudithook(_hear)  # stays for good: it costs 0.1 us an event while nobody listens
        _hooked.append(True)
    try:
        yield lambda: _stamp(seen, root, cache, began)
    finally:
        _listening.remove(seen)


def _hear(event: str, given: tuple[Any, ...]) -> None:
    if not _listening or event not in ("open", "os.listdir", "os.scandir"):
        return
    path = given[0]
    if isinstance(path, int) or (event == "open" and _writes(*given[1:3])):
        return
    with suppress(TypeError, ValueError):
        text = os.fsdecode(path) if path is not None else os.curdir
        for seen in _listening:
            seen.add(text)


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(sign in mode for sign in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _stamp(seen: set[str], root: str | None, cache: str | None, began: int) -> Stamp:
    aside = [os.path.abspath(cache)] if cache else []
    aside += [_PACKAGE, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr"]
    base = os.path.abspath(root) if root else None
    if base is not None:
        aside = [place for place in aside if not _below(base, place)]
    found = {os.path.abspath(path) for path in list(seen)}
    kept = {path for path in found if not path.endswith(_CODE) and not any(_below(path, place) for place in aside)}
    kept -= {tempfile.gettempdir(), "/"}
    here = os.getcwd()
    paths = {os.path.relpath(path, here) if _below(path, here) else path for path in kept if os.path.exists(path)}
    if base is not None and not any(_below(place, base) for place in aside):  # not the folder of all datasets
        paths |= {os.path.relpath(base, here) if _below(base, here) else base} if os.path.exists(base) else set()
    if base is not None:
        paths.add(f"{os.path.relpath(base, here) if _below(base, here) else base}{os.sep}.")
    ordered = tuple(sorted(paths))
    digest, latest = _digest(ordered)
    return Stamp(ordered, digest if latest < began else "")


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _digest(paths: Sequence[str]) -> tuple[str, int]:
    """Of all that is known without reading; and the latest time of change. "" if one of the paths is gone."""
    digest, latest = hashlib.sha256(), 0
    for path in paths:
        if path.endswith(f"{os.sep}."):  # the folder itself, if it is there: made-up data have none
            digest.update(f"{path} {_place(path)}\n".encode("utf-8", "surrogateescape"))
            continue
        try:
            about = os.stat(path)
            if stat.S_ISDIR(about.st_mode):
                lines = []
                for name in sorted(os.listdir(path)):
                    known, changed = _known(os.path.join(path, name))
                    lines.append(f"{name} {known}")
                    latest = max(latest, changed)
            else:
                lines, latest = [f"{about.st_size} {about.st_mtime_ns}"], max(latest, about.st_mtime_ns)
        except OSError:
            return "", latest
        digest.update("\n".join([path, *lines, ""]).encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), latest


def _place(folder: str) -> str:
    try:
        about = os.stat(folder)
    except OSError:
        return "none"
    return f"{about.st_dev} {about.st_ino}"


def _known(path: str) -> tuple[str, int]:
    """Of an entry of a folder: a folder in it counts if it was listed itself."""
    try:
        about = os.stat(path)
    except OSError:  # a dead link
        return "", 0
    folder = stat.S_ISDIR(about.st_mode)
    return ("", 0) if folder else (f"{about.st_size} {about.st_mtime_ns}", about.st_mtime_ns)
