"""A file of teacher logits, one entry for each (image, view), filled as needed by any number of processes.

The file is sparse: an entry that nobody computed takes no disk space. It starts with a header that names what the
entries are, then comes a 32-bit tag an entry, then the entries. A tag is a checksum of its entry and of the entry's
place, and 0 where there is none, so a tag is at once "this is here" and "this is whole". An entry that was torn by a
kill, cut off, moved or damaged does not match its tag and is computed anew.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdbench.files import lock, remove_leftovers, write_atomically

log = logging.getLogger(__name__)

MAGIC, HEADER, FORMAT = b"KDBTABLE", 8192, 1
SUFFIX = ".table"
_POSITION = threading.Lock()
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _TYPES}
_BLOCK = 8192  # entries whose checksums are computed at once: bounds the memory that this takes


class Shape(NamedTuple):
    """`rows` images, `views` of each, `classes` logits an entry of type `dtype`."""

    rows: int
    views: int
    classes: int
    dtype: torch.dtype

    @property
    def entries(self) -> int:
        return self.rows * self.views

    @property
    def words(self) -> int:
        """32-bit words an entry."""
        return -(-self.classes * self.dtype.itemsize // 4)

    @property
    def data(self) -> int:
        """Where the entries start, in bytes, at a whole page."""
        return HEADER + -(-self.entries * 4 // HEADER) * HEADER

    @property
    def bytes(self) -> int:
        """The file's size when it is full (a sparse file takes less)."""
        return self.data + self.entries * self.words * 4


class LogitTable:
    """The table in one file, opened or made. Entries are numbered row * views + view.

    `key` is all that the numbers depend on: a file that was made for another key, is of another format or has a broken
    header is replaced; one that was cut is made whole again (what was lost is computed anew). A table that may not be
    written is read all the same. Raises OSError.

    Read by position, never through a memory map: a hole of a map on a full tmpfs, or a file that somebody cuts, would
    end the process with SIGBUS. That costs 0.4 microseconds an entry. The tags lie in memory (4 bytes an entry).
    Threads may look, read and write at the same time.
    """

    def __init__(self, path: Path, key: Mapping[str, object], shape: Shape) -> None:
        self.path, self.key, self.shape = path, dict(key), shape
        self._lock = lock(f"{path}.lock")
        self._writable = True
        self._open(path)
        tags = _read_whole(reader(self._file), self._file.fileno(), shape.entries * 4, HEADER)
        self._tags = np.frombuffer(tags, np.uint32)
        self.damaged = False  # whether any entry was found damaged

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                remove_leftovers(path.parent, path.name)
                if read_header(path) != self._header():
                    self._create()
                if path.stat().st_size != self.shape.bytes:
                    log.warning("table %s: wrong length, repaired; entries that were lost are computed again", path)
                    os.truncate(path, self.shape.bytes)
                self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (open as long as the table is)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or read_header(path) != self._header():
                raise
            self._file, self._writable = open(path, "rb", buffering=0), False  # type: ignore[assignment] # noqa: SIM115

    @property
    def filled(self) -> int:
        """How many entries there are, by their tags alone."""
        return count_filled(self.path, self.shape)

    def valid(self, entries: np.ndarray) -> np.ndarray:
        """Which of the entries [n] are there and whole: bool [n]."""
        return self.find(entries)[0]

    def find(self, entries: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Which of the entries [n] are there and whole, bool [n], and the logits [those, classes] of those, on the CPU.

        What is given was checked, each time: a file may be cut or damaged while it is in use.
        """
        good, shape = np.zeros(len(entries), bool), self.shape
        tags = self._tags_of(entries)  # of this look: another thread may be at one, too
        unsure = np.flatnonzero(tags)
        words = self._words(entries[unsure], shape.data, shape.words)
        good[unsure] = whole = checksums(words, entries[unsure]) == tags[unsure]
        self._tags[entries[unsure[~whole]]] = 0  # looked up again: another process may have mended them
        if len(unsure):
            self._report(not whole.all())
        words = words if whole.all() else words[whole]
        return good, torch.from_numpy(words.view(np.int32)).view(shape.dtype)[:, : shape.classes]

    def _tags_of(self, entries: np.ndarray) -> np.ndarray:
        """Tags [n]; those that were not there before are looked up again, as other processes write them."""
        lacking = entries[self._tags[entries] == 0]
        if len(lacking):
            self._tags[lacking] = self._words(lacking, HEADER, 1)[:, 0]
        return self._tags[entries]

    def _words(self, places: np.ndarray, offset: int, width: int) -> np.ndarray:
        """Rows of `width` 32-bit words [n, width] at places [n], neighbours together; 0 beyond the file's end."""
        first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        length = np.diff(first, append=len(places)) * (width * 4)
        start = offset + places[first].astype(np.int64) * (width * 4)
        read, file = reader(self._file), self._file.fileno()
        parts: list[bytes | bytearray] = [read(file, size, at) for size, at in zip(length.tolist(), start.tolist())]
        short = [i for i, part in enumerate(parts) if len(part) != length[i]]
        for i in short:
            parts[i] = _read_whole(read, file, int(length[i]), int(start[i]))
        return np.frombuffer(bytearray(b"".join(parts)), np.uint32).reshape(len(places), width)

    def write(self, entries: np.ndarray, logits: Tensor) -> None:
        """Keep the logits [n, classes] of entries [n], but those that another process wrote first.

        An entry is whole before its tag is written, and a whole entry is never written again. A full disk is reported
        once, and from then on nothing is kept.
        """
        if not self._writable:
            return
        words = self._as_words(logits)
        try:
            with self._lock:
                wanted = np.flatnonzero(~self.valid(entries))
                wanted = wanted[np.argsort(entries[wanted], kind="stable")]
                places, words = entries[wanted], words[wanted]
                tags = checksums(words, places)
                self._put(places, words, self.shape.data)
                self._put(places, tags[:, None], HEADER)
            self._tags[places] = tags
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self._writable = False
            log.warning("table %s: the disk is full; logits are no longer kept", self.path)

    def _put(self, places: np.ndarray, values: np.ndarray, offset: int) -> None:
        """Write rows of 32-bit words [n, w] at ascending places, neighbours together."""
        values = np.ascontiguousarray(values)
        size = values.shape[1] * 4
        first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        for start, stop in zip(first.tolist(), [*first[1:].tolist(), len(places)]):
            _write_all(self._file, values[start:stop].data, offset + int(places[start]) * size)

    def _as_words(self, logits: Tensor) -> np.ndarray:
        shape = self.shape
        padded = torch.zeros(len(logits), shape.words * 4 // shape.dtype.itemsize, dtype=shape.dtype)
        padded[:, : shape.classes] = logits
        return padded.view(torch.int32).numpy().view(np.uint32)

    def _header(self) -> dict[str, object]:
        dtype = str(self.shape.dtype).removeprefix("torch.")
        return {"format": FORMAT, "shape": [*self.shape[:3]], "dtype": dtype, "key": self.key}

    def _create(self) -> None:
        """A new, empty file in place of whatever is there; who has the old one open keeps it."""
        if self.path.exists():
            log.warning("table %s: not what it should be (its header differs), started anew", self.path)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.write(_packed(self._header()))
                file.truncate(self.shape.bytes)

        write_atomically(self.path, write)

    def _report(self, damaged: bool) -> None:
        if damaged and not self.damaged:
            log.warning("table %s: damaged entries found; they are computed again", self.path)
        self.damaged |= damaged


def checksums(words: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Tags [n] uint32, none of them 0, of entries [n] with the words [n, w].

    A sum of words times odd numbers modulo 2^64, folded to 32 bits: a single wrong word always changes the sum, any
    other damage goes unseen with probability 2^-32.
    """
    weights = np.random.default_rng(0x7AB1E).integers(2**63, size=words.shape[1] + 1, dtype=np.uint64) * 2 + 1
    total = np.empty(len(words), np.uint64)
    for part in _blocks(np.arange(len(words))):
        total[part] = words[part].astype(np.uint64) @ weights[1:] + (entries[part].astype(np.uint64) + 1) * weights[0]
    folded = (total ^ (total >> np.uint64(32))).astype(np.uint32)
    return np.maximum(folded, np.uint32(1))


def read_header(path: Path) -> dict[str, object] | None:
    """What a table's header says; None if there is no file or no whole header."""
    with suppress(OSError, ValueError, RecursionError):
        with open(path, "rb") as file:
            page = file.read(HEADER)
        length, crc = (int.from_bytes(page[at : at + 4], "little") for at in (8, 12))
        text = page[16 : 16 + length]
        if page[:8] == MAGIC and len(text) == length and zlib.crc32(text) == crc:
            found = json.loads(text)
            return found if isinstance(found, dict) else None
    return None


def shape_in(header: Mapping[str, object]) -> Shape | None:
    """The shape that a header states; None if it is no header of this format, or states nonsense."""
    sizes, dtype = header.get("shape"), _DTYPES.get(str(header.get("dtype")))
    if header.get("format") != FORMAT or dtype is None or not isinstance(header.get("key"), dict):
        return None
    if not isinstance(sizes, list) or len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        return None
    rows, views, classes = sizes
    shape = Shape(rows, views, classes, dtype)
    return shape if shape.bytes < 2**62 else None  # no file is as large


def count_filled(path: Path, shape: Shape) -> int:
    """How many entries a table has, by its tags alone; 0 for a file that is too short."""
    if path.stat().st_size < shape.data:
        return 0
    found = 0
    with open(path, "rb") as file:
        file.seek(HEADER)
        for start in range(0, shape.entries, 1 << 20):
            tags = file.read(min(1 << 20, shape.entries - start) * 4)
            found += int(np.count_nonzero(np.frombuffer(tags, np.uint32)))
    return found


def _packed(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    if len(text) > HEADER - 16:
        raise ValueError(f"a table's key must fit into {HEADER - 16} bytes, got {len(text)}")
    numbers = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
    return (MAGIC + numbers + text).ljust(HEADER, b"\0")


def _write_all(file: BinaryIO, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    write = getattr(os, "pwrite", None)
    while data:
        written = write(file.fileno(), data, offset) if write else _at(file, offset, partial(file.write, data))
        data, offset = data[written:], offset + written


def reader(file: BinaryIO) -> Callable[[int, int, int], bytes]:
    """os.pread, or what does the same where there is none (Windows)."""
    return getattr(os, "pread", lambda _file, size, offset: _at(file, offset, lambda: file.read(size)))


def _at(file: BinaryIO, offset: int, act: Callable[[], Any]) -> Any:
    """Act at a place of a file whose position all threads share."""
    with _POSITION:
        file.seek(offset)
        return act()


def _read_whole(read: Callable[[int, int, int], bytes], file: int, size: int, offset: int) -> bytearray:
    """What one call did not give: it may stop at 2 GB, or at the end of a file that was cut, where zeros follow."""
    found = bytearray()
    while len(found) < size and (part := read(file, size - len(found), offset + len(found))):
        found += part
    return found.ljust(size, b"\0")


def _blocks(positions: np.ndarray) -> list[np.ndarray]:
    return [positions[i : i + _BLOCK] for i in range(0, len(positions), _BLOCK)]
