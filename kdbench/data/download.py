"""Fetching public datasets through torchvision, and saying what to do where that fails."""

from __future__ import annotations

import pickle
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from kdbench.errors import UserError
from kdbench.files import lock

Result = TypeVar("Result")
REACH_SECONDS = 8.0  # how long a server may take to answer at all
STALL_SECONDS = 30.0  # how long a running download may stand still


class Files(NamedTuple):
    """What a dataset is made of, for the message that asks a person to fetch it."""

    name: str  # "CIFAR-10"
    home: str  # the dataset's own page
    urls: tuple[str, ...]  # where it is fetched from; any one that answers will do
    wanted: tuple[tuple[str, str | None], ...]  # (file name, md5 or None)
    folder: str = ""  # below dataset.root

    def instructions(self, root: str | Path) -> str:
        folder = (Path(root) / self.folder).resolve()
        files = "; ".join(name + (f" (md5 {md5})" if md5 else "") for name, md5 in self.wanted)
        return f"Put {files} into {folder} (from {self.home}), or point dataset.root to where it is"


_UNREADABLE = (RuntimeError, OSError, EOFError, AssertionError, ValueError, KeyError, pickle.UnpicklingError)


def obtain(load: Callable[[bool], Result], files: Files, root: str | Path, download: bool) -> Result:
    """load(False); if that fails load(True), which unpacks the archives that are there and downloads the others.

    Raises UserError with what to put where if the data is neither there nor to be had. One process downloads, others
    wait for it. Takes at most seconds to find out that there is no network.
    """
    try:
        return load(False)
    except _UNREADABLE as error:
        missing = error
    where = f"{files.name} is not (or not whole) in {Path(root).resolve()}"
    if not _archives_are_there(files, root):
        if not download:
            raise UserError(f"{where}, and dataset.download is false. {files.instructions(root)}") from missing
        if not any(answers(url) for url in files.urls):
            raise UserError(f"{where}, and {files.urls[0]} does not answer. {files.instructions(root)}") from missing
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with lock(Path(root) / f".{files.name}.lock"), _stall_limit():
            return load(True)
    except _UNREADABLE as error:
        raise UserError(f"{files.name} could not be read or downloaded: {error}. {files.instructions(root)}") from error


def _archives_are_there(files: Files, root: str | Path) -> bool:
    """Whether all wanted files are in place. Raises UserError for one with another checksum: it is broken."""
    paths = [(Path(root) / files.folder / name, md5) for name, md5 in files.wanted]
    if not all(path.is_file() for path, _ in paths):
        return False
    from torchvision.datasets.utils import calculate_md5  # imported when asked for: torchvision takes two seconds

    for path, md5 in paths:
        if md5 and calculate_md5(path) != md5:
            raise UserError(f"{path} is broken (md5 is not {md5}): remove it. {files.instructions(root)}")
    return True


def answers(url: str) -> bool:
    """Whether a server answers at all, within REACH_SECONDS. A thread, because a name lookup knows no time limit."""
    found: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "kdbench"})
            urllib.request.urlopen(request, timeout=REACH_SECONDS).close()
            found.append(True)
        except urllib.error.HTTPError:
            found.append(True)  # it answered; some servers refuse HEAD
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(found)


@contextmanager
def _stall_limit() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def md5_pairs(listed: Sequence[Sequence[str]]) -> tuple[tuple[str, str | None], ...]:
    """torchvision's lists of [file, md5] as Files.wanted."""
    return tuple((item[0], item[1]) for item in listed)
