"""A teacher that answers from its table: what an epoch will ask for is known before it, so no step waits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdbench.data.batches import TrainingBatches, parts
from kdbench.tables.file import LogitTable
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Outputs, Teacher

# Images whose logits are made ready at once, just before the first step that needs them. On a GPU a teacher's pass is
# of 512 images, and the last one of a window is padded: of those missing, half of them while a table is filled.
WINDOW, WINDOWS = 1024, {"cuda": 8192}
SLICE = 2048  # entries that are computed, then written, at once
WAITING = 2  # slices that may wait to be written: with the one at work what a kill loses at most


class Found(NamedTuple):
    """What a table had of some entries when it was looked at."""

    entries: np.ndarray  # [n] ascending
    good: np.ndarray  # [n] bool: which of them were there and whole
    logits: Tensor  # [those, C] on the CPU; page-locked if they are for a GPU


class Filler:
    """Reads a table's entries, and computes those that are missing exactly as the live teacher would: in chunks of the
    same size.

    The training waits for no lock and no disk: what it is going to ask for is looked up ahead by one thread, and what
    it computed is written by another. `computed`: entries so far.
    """

    def __init__(self, table: LogitTable, live: LiveTeacher, batches: TrainingBatches) -> None:
        self.table, self.live, self.batches = table, live, batches
        self.computed = 0
        self.reader = ThreadPoolExecutor(1, "kdbench-table-reader")
        self._writer = ThreadPoolExecutor(1, "kdbench-table-writer")
        self._pending: deque[Future[None]] = deque()

    def look(self, entries: np.ndarray) -> Found:
        """What there is of entries [n], ascending. Raises OSError."""
        good, logits = self.table.find(entries)
        return Found(entries, good, pinned(logits, self.batches.device))

    def load(self, found: Found) -> Tensor:
        """The logits [n, C] of the entries, those found or computed now (and kept), on the device of the batches."""
        if found.good.all():
            return to_device(found.logits, self.batches.device)
        entries, shape = found.entries, self.table.shape
        logits = torch.empty(len(entries), shape.classes, dtype=shape.dtype, device=self.batches.device)
        _place(logits, np.flatnonzero(found.good), found.logits)
        for part in self._shares(np.flatnonzero(~found.good)):
            # Another process may have written some since. On a GPU this is while it computes the share before.
            again = self.look(entries[part])
            _place(logits, part[again.good], again.logits)
            if not again.good.all():
                _place(logits, part[~again.good], self._new(entries[part[~again.good]]))
        return logits

    def fill(self, entries: np.ndarray, advance: Callable[[int], None] = lambda done: None) -> None:
        """Make sure that the table has the entries [n]; `advance` is told how many more are there or about to be."""
        for part in self._shares(np.arange(len(entries))):
            missing = part[~self.table.valid(entries[part])]
            if len(missing):
                self._new(entries[missing])
            advance(len(part))
        self.flush()

    def flush(self) -> None:
        """Until all that was computed is written. Raises what a write raised."""
        while self._pending:
            self._pending.popleft().result()

    def _new(self, entries: np.ndarray) -> Tensor:
        """Entries' logits, computed now and written soon."""
        logits = self.compute(entries)
        done = None
        if logits.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(logits.device))
        while len(self._pending) >= WAITING:  # bounds the memory of what is not written yet
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(self._write, entries, logits, done))
        return logits

    def _write(self, entries: np.ndarray, logits: Tensor, done: torch.cuda.Event | None) -> None:
        if done is not None:
            done.synchronize()
        self.table.write(entries, logits.cpu())

    def compute(self, entries: np.ndarray) -> Tensor:
        """The live teacher's logits [n, C] of entries [n], on the device."""
        views, places = self.table.shape.views, torch.from_numpy(entries)
        inputs = self.batches.inputs_at(places // views, places % views)
        # A chunk at a time: only its features are in memory.
        logits = [self.live.outputs(chunk).logits for chunk in inputs.split(self.live.chunk)]
        self.computed += len(entries)
        return torch.cat(logits)

    @staticmethod
    def _shares(positions: np.ndarray) -> Iterator[np.ndarray]:
        """Slices in an order of this process's own, so that processes which fill the same entries share the work."""
        starts = np.arange(0, len(positions), SLICE)
        for start in np.random.default_rng(os.getpid()).permutation(starts).tolist():
            yield positions[start : start + SLICE]


class WindowLogits:
    """The logits of one window on the device, found by binary search. 4 C bytes an image: 3 MB for CIFAR-100."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.entries = torch.empty(0, dtype=torch.int64)

    def missing(self, entries: np.ndarray) -> np.ndarray:
        return entries

    def put(self, entries: np.ndarray, logits: Tensor) -> None:
        """entries [n] ascending, logits [n, C]; what was there before is dropped."""
        self.entries, self.logits = to_device(torch.from_numpy(entries), self.device), to_device(logits, self.device)

    def get(self, entries: Tensor) -> Tensor:
        """Logits [B, C] of entries [B]; NaN for one that was not put, which the training then reports."""
        place = torch.searchsorted(self.entries, entries).clamp_max_(len(self.entries) - 1)
        found = self.entries.index_select(0, place) == entries
        return self.logits.index_select(0, place).masked_fill_(~found[:, None], torch.nan)


class DeviceLogits:
    """The whole table on the device, copied there as it is needed: after that an epoch moves nothing."""

    def __init__(self, table: LogitTable, device: torch.device) -> None:
        shape, self.device = table.shape, device
        self.logits = torch.full((shape.entries, shape.classes), torch.nan, dtype=shape.dtype, device=device)
        self.here = np.zeros(shape.entries, bool)

    def missing(self, entries: np.ndarray) -> np.ndarray:
        return entries[~self.here[entries]]

    def put(self, entries: np.ndarray, logits: Tensor) -> None:
        self.logits.index_copy_(0, to_device(torch.from_numpy(entries), self.device), to_device(logits, self.device))
        self.here[entries] = True

    def get(self, entries: Tensor) -> Tensor:
        """Logits [B, C] of entries [B]; NaN for one that was not put."""
        return self.logits.index_select(0, entries)


class TableTeacher(Teacher):
    """Answers the batches of `feed(...)` from a table. Its outputs have no features."""

    def __init__(self, filler: Filler, store: WindowLogits | DeviceLogits) -> None:
        self.filler, self.store = filler, store
        self.views = filler.table.shape.views

    def __call__(self, batch: Batch) -> Outputs:
        return Outputs(self.store.get(batch.target.row * self.views + batch.view), {})

    def look(self, entries: np.ndarray) -> Found:
        """What the table has of those of the entries [n] that are not on the device."""
        return self.filler.look(self.store.missing(np.unique(entries)))

    def prepare(self, found: Found) -> None:
        """Have the entries on the device, computed where they were not found."""
        if len(found.entries):
            self.store.put(found.entries, self.filler.load(found))


class Fed:
    """Batches whose teacher logits are ready when they come out (Epochs).

    A window's entries are looked up while the steps before it run, also those of the next epoch's first window.
    """

    def __init__(self, batches: TrainingBatches, teacher: TableTeacher) -> None:
        self.batches, self.teacher = batches, teacher
        self.size, self.steps = batches.size, batches.steps
        window = WINDOWS.get(torch.device(batches.device).type, WINDOW)
        self._windows = [*parts(batches.order.own, window)]  # whole batches, so that no entry is in two of them
        self._entries: Iterator[np.ndarray] = iter(())  # of the windows that nobody has looked for yet
        self._found: Future[Found]  # of the next window
        self._next: tuple[int, int] | None = None  # the epoch that this is of, and the last one

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        if self._next != (epoch, epochs):
            self._entries = self._from(epoch, epochs)
            self._look_ahead()
        self._next = None  # unless this one is seen to its end
        stream = self.batches.epoch(epoch, epochs)
        for window in self._windows:
            self.teacher.prepare(self._found.result())
            self._look_ahead()
            yield from islice(stream, len(window))
        self.teacher.filler.flush()
        self._next = (epoch + 1, epochs)

    def _look_ahead(self) -> None:
        entries = next(self._entries, np.zeros(0, np.int64))
        self._found = self.teacher.filler.reader.submit(self.teacher.look, entries)

    def _from(self, epoch: int, epochs: int) -> Iterator[np.ndarray]:
        """Entries of each window, from an epoch to the last."""
        sizes = [sum(last - first for first, last in window) for window in self._windows]
        for number in range(epoch, epochs):
            rows, view = self.batches.plan(number)
            yield from np.split((rows * self.teacher.views + view).numpy(), np.cumsum(sizes[:-1]))


def _place(logits: Tensor, places: np.ndarray, values: Tensor) -> None:
    device = logits.device
    logits.index_copy_(0, to_device(torch.from_numpy(places), device), to_device(values, device))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for; the same where it is there."""
    return values if values.device == device else pinned(values, device).to(device, non_blocking=device.type == "cuda")


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """In memory that a GPU reads by itself."""
    return values.pin_memory() if device.type == "cuda" else values
