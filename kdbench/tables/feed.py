"""A teacher that answers from its table: what an epoch will ask for is known before it, so no step waits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from kdbench.data.batches import TrainingBatches
from kdbench.tables.file import LogitTable
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Outputs, Teacher

# Images whose logits are made ready at once, just before the first step that needs them. On a GPU a teacher's pass is
# of 512 images, and the last one of a window is padded: of those missing, half of them while a table is filled.
WINDOW, WINDOWS = 1024, {"cuda": 8192}
SLICE = 2048  # entries that are computed, then written, at once
WAITING = 2  # slices that may wait to be written: with the one at work what a kill loses at most


class Filler:
    """Computes a table's missing entries exactly as the live teacher would: in chunks of the same size.

    What it computed is written by a thread of its own, so that the training does not wait for locks and disks.
    `computed`: entries so far.
    """

    def __init__(self, table: LogitTable, live: LiveTeacher, batches: TrainingBatches) -> None:
        self.table, self.live, self.batches = table, live, batches
        self.computed = 0
        self._thread: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def load(self, entries: np.ndarray) -> Tensor:
        """The logits [n, C] of entries [n], from the table or computed (and kept), on the device of the batches."""
        good = self.table.valid(entries)
        if good.all():
            return to_device(self.table.read(entries), self.batches.device)
        shape = self.table.shape
        logits = torch.empty(len(entries), shape.classes, dtype=shape.dtype, device=self.batches.device)
        self._read(logits, entries, np.flatnonzero(good))
        for part in self._shares(np.flatnonzero(~good)):
            # Another process may have written some since.
            there = self.table.valid(entries[part])
            self._read(logits, entries, part[there])
            if not there.all():
                _place(logits, part[~there], self._new(entries[part[~there]]))
        return logits

    def fill(self, entries: np.ndarray, advance: Callable[[int], None] = lambda done: None) -> None:
        """Make sure that the table has the entries [n]; `advance` is told how many more are there."""
        for part in self._shares(np.arange(len(entries))):
            missing = part[~self.table.valid(entries[part])]
            if len(missing):
                self._new(entries[missing])
            self.flush()
            advance(len(part))

    def flush(self) -> None:
        """Until all that was computed is written. Raises what a write raised."""
        while self._pending:
            self._pending.popleft().result()

    def _read(self, logits: Tensor, entries: np.ndarray, places: np.ndarray) -> None:
        if len(places):
            _place(logits, places, self.table.read(entries[places]))

    def _new(self, entries: np.ndarray) -> Tensor:
        """Entries' logits, computed now and written soon."""
        logits = self.compute(entries)
        done = None
        if logits.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(logits.device))
        self._thread = self._thread or ThreadPoolExecutor(1, "kdbench-table")
        while len(self._pending) >= WAITING:  # bounds the memory of what is not written yet
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, entries, logits, done))
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

    def prepare(self, entries: np.ndarray) -> None:
        """Have the entries [n] on the device."""
        missing = self.store.missing(np.unique(entries))
        if len(missing):
            self.store.put(missing, self.filler.load(missing))


class Fed:
    """Batches whose teacher logits are ready when they come out (Epochs)."""

    def __init__(self, batches: TrainingBatches, teacher: TableTeacher) -> None:
        self.batches, self.teacher = batches, teacher
        self.size, self.steps = batches.size, batches.steps

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        rows, view = self.batches.plan(epoch)
        entries = (rows * self.teacher.views + view).numpy()
        here = ready = 0
        window = WINDOWS.get(torch.device(self.batches.device).type, WINDOW)
        for batch in self.batches.epoch(epoch, epochs):
            after = here + len(batch.view)
            if after > ready:  # whole batches, so that no entry is in two windows
                ready = here + max(1, window // len(batch.view)) * len(batch.view)
                self.teacher.prepare(entries[here:ready])
            here = after
            yield batch
        self.teacher.filler.flush()


def _place(logits: Tensor, places: np.ndarray, values: Tensor) -> None:
    device = logits.device
    logits.index_copy_(0, to_device(torch.from_numpy(places), device), to_device(values, device))


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for; the same where it is there."""
    here = values.device == device or device.type != "cuda"
    return values.to(device) if here else values.pin_memory().to(device, non_blocking=True)
