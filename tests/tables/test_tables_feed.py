"""A teacher that answers from its table gives the live teacher's bits, and computes an entry once in all processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdbench.data.augment.views import CropFlip
from kdbench.tables import feed
from kdbench.tables.feed import DeviceLogits, Fed, TableTeacher, WindowLogits
from kdbench.tables.key import key_name, table_key
from kdbench.teachers.live import chunk_for
from tests.support.tables import (
    CLASSES,
    IMAGES,
    VIEWS,
    all_live,
    fill_slowly,
    make_batches,
    make_data,
    make_filler,
    make_live,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["window", "device"])
@pytest.mark.parametrize("window", [30, 8192])
def test_a_fed_epoch_has_the_live_teachers_bits(tmp_path, monkeypatch, precision, kind, window):
    monkeypatch.setattr(feed, "WINDOW", window)
    live, data = make_live(precision), make_data()
    batches = make_batches(data)
    filler = make_filler(tmp_path, live, data, batches)
    store = WindowLogits(CPU) if kind == "window" else DeviceLogits(filler.table, CPU)
    teacher = TableTeacher(filler, store)
    fed = Fed(batches, teacher)
    assert (fed.size, fed.steps) == (batches.size, batches.steps) and batches.views == VIEWS
    for epoch in range(2):
        steps = 0
        for batch, plain in zip(fed.epoch(epoch, 2), batches.epoch(epoch, 2), strict=True):
            answer, expected = teacher(batch), live(plain)
            assert answer.logits.dtype == expected.logits.dtype and torch.equal(answer.logits, expected.logits)
            assert torch.equal(batch.input, plain.input) and not answer.features
            steps += 1
        assert steps == batches.steps == 13
    assert IMAGES < filler.computed == filler.table.filled <= 2 * IMAGES


def test_runs_with_other_batch_sizes_and_other_processes_compute_nothing_again(tmp_path):
    live, data = make_live(), make_data()
    teacher = TableTeacher(make_filler(tmp_path, live, data, make_batches(data)), WindowLogits(CPU))
    for _ in Fed(make_batches(data), teacher).epoch(0, 1):
        pass
    again = make_filler(tmp_path, live, data, make_batches(data, batch_size=50))  # its own view of the file
    calls = live.network.calls
    for batch in Fed(make_batches(data, batch_size=50), fresh := TableTeacher(again, WindowLogits(CPU))).epoch(0, 1):
        fresh(batch)
    assert again.computed == 0 and live.network.calls == calls


def test_a_damaged_entry_is_computed_again(tmp_path):
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    entries = np.arange(200)
    logits = filler.load(filler.look(entries))
    filler.flush()
    with open(filler.table.path, "r+b") as file:
        file.seek(filler.table.shape.data + 77 * 4 * CLASSES)
        file.write(b"\xff" * 4)
    again = make_filler(tmp_path, live, data, make_batches(data))
    assert torch.equal(again.load(again.look(entries)), logits) and again.computed == 1 and again.table.damaged
    again.flush()
    assert make_filler(tmp_path, live, data, make_batches(data)).table.valid(entries).all()


def test_an_entry_that_was_not_made_ready_is_not_a_number(tmp_path):
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    for store in (WindowLogits(CPU), DeviceLogits(filler.table, CPU)):
        teacher = TableTeacher(filler, store)
        teacher.prepare(teacher.look(np.arange(40)))
        batch = next(make_batches(data).epoch(0, 1))
        entries = batch.target.row * VIEWS + batch.view
        assert (entries >= 40).any()
        assert torch.equal(teacher(batch).logits.isnan().all(1), entries >= 40)


def start(folder: Path, pause: float) -> tuple[BaseProcess, Connection]:
    fork = multiprocessing.get_context("fork")  # no seconds of importing torch
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=fill_slowly, args=(folder, pause, sender))
    process.start()
    sender.close()
    return process, receiver


@pytest.mark.parametrize("slices", [1, 7])
def test_two_processes_fill_one_table_and_one_of_them_is_killed(tmp_path, monkeypatch, slices):
    monkeypatch.setattr(feed, "SLICE", 100)
    (killed, its_news), (other, news) = start(tmp_path, 0.0), start(tmp_path, 0.0)
    assert [its_news.recv() for _ in range(slices)] == [100] * slices
    os.kill(killed.pid, signal.SIGKILL)  # wherever it is now
    killed.join()
    other.join()
    assert killed.exitcode == -signal.SIGKILL and other.exitcode == 0
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    entries = np.arange(IMAGES * VIEWS)
    assert filler.table.valid(entries).all() and not filler.table.damaged
    assert torch.equal(filler.table.find(entries)[1], all_live(live, data))
    told = [news.recv() for _ in range(len(entries) // 100 + 1)]
    assert sum(told[:-1]) == len(entries) and told[-1] <= len(entries)


def test_processes_take_slices_in_their_own_order(monkeypatch):
    positions = np.arange(20 * feed.SLICE + 5)
    orders = []
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        shares = list(feed.Filler._shares(positions))
        assert np.array_equal(np.sort(np.concatenate(shares)), positions)
        orders.append([int(share[0]) for share in shares])
    assert orders[0] != orders[1]


def test_what_decides_the_numbers_decides_the_key():
    live, data = make_live(), make_data()

    def name(live=live, weights="w", data=data, precision="fp32", **options):
        return key_name(table_key(live, weights, data, make_batches(data, **options), precision)[0])

    same = name()
    part = replace(data, transfer=data.transfer.select(torch.arange(0, 300, 3)))
    assert same == name() == name(data=part) == name(seed=5) == name(batch_size=100)
    others = [
        name(weights="v"),
        name(precision="bf16"),
        name(live=make_live(seed=4)),  # the same name of the weights, other answers: code that changed
        name(live=make_live(chunk=16)),
        name(data=replace(data, fingerprint="x")),
        name(data=replace(data, mean=(0.4,) * 3)),
        name(data=replace(data, augment=CropFlip(1, padding="reflect"))),
        name(data=replace(data, augment=CropFlip(1, flip=False))),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_a_chunk_is_fixed_on_a_cpu_and_fits_the_batch_on_a_gpu():
    assert {chunk_for(CPU, size) for size in (2, 32, 100, 4096)} == {32}
    gpu = torch.device("cuda")
    assert [chunk_for(gpu, size) for size in (16, 64, 100, 128, 1000, 9999)] == [64, 64, 64, 128, 512, 512]


def test_what_is_computed_is_written_by_another_thread_and_all_of_it_before_the_epoch_ends(tmp_path, monkeypatch):
    """The training waits for no lock and no disk; a write that fails is not lost."""
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, batches := make_batches(data))
    threads, write = set(), filler.table.write

    def slow(entries: np.ndarray, logits: torch.Tensor) -> None:
        threads.add(threading.get_ident())
        time.sleep(0.02)
        write(entries, logits)

    monkeypatch.setattr(filler.table, "write", slow)
    monkeypatch.setattr(feed, "WINDOW", 30)
    for _ in Fed(batches, TableTeacher(filler, WindowLogits(CPU))).epoch(0, 1):
        pass
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert filler.computed == filler.table.filled == IMAGES

    def broken(entries: np.ndarray, logits: torch.Tensor) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(filler.table, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        for _ in Fed(batches, TableTeacher(filler, WindowLogits(CPU))).epoch(1, 2):
            pass


def test_a_gpu_makes_larger_windows_ready(tmp_path, monkeypatch):
    """Its teacher computes hundreds of images at once, and pads the last of them."""
    live, data = make_live(), make_data()
    batches, sizes = make_batches(data), []
    teacher = TableTeacher(make_filler(tmp_path, live, data, batches), WindowLogits(CPU))
    prepare = teacher.prepare
    monkeypatch.setattr(teacher, "prepare", lambda found: (sizes.append(len(found.entries)), prepare(found)))
    monkeypatch.setattr(feed, "WINDOW", 30)
    monkeypatch.setitem(feed.WINDOWS, "cpu", IMAGES)
    for _ in Fed(batches, teacher).epoch(0, 1):
        pass
    assert len(sizes) <= 2 and sum(sizes) == IMAGES and feed.WINDOWS["cuda"] > 1024


def test_only_entries_that_are_there_are_read(tmp_path, monkeypatch):
    """A hole of the sparse file is a page fault each."""
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    filler.fill(np.arange(0, 60, 2))
    asked, words, data_at = [], filler.table._words, filler.table.shape.data

    def read(places, offset, width):
        asked.extend(places.tolist() if offset == data_at else [])
        return words(places, offset, width)

    monkeypatch.setattr(filler.table, "_words", read)
    logits = filler.load(filler.look(np.arange(60)))
    assert sorted(asked) == list(range(0, 60, 2)) and filler.computed == 60
    other = make_filler(tmp_path / "other", live, data, make_batches(data))
    assert torch.equal(logits, other.load(other.look(np.arange(60))))


def test_the_next_window_is_looked_up_by_another_thread_while_this_one_is_trained_on(tmp_path, monkeypatch):
    """Also that of the next epoch, and anew where an epoch was left before its end."""
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, batches := make_batches(data))
    threads, begun, find = set(), [threading.Event() for _ in range(12)], filler.table.find
    looks = iter(begun)

    def look(entries: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        if len(entries) > 48:  # a window, not what it lacks
            threads.add(threading.get_ident())
            next(looks).set()
        return find(entries)

    filler.fill(np.arange(IMAGES * VIEWS))
    monkeypatch.setattr(filler.table, "find", look)
    monkeypatch.setattr(feed, "WINDOW", 120)  # 3 of them
    fed = Fed(batches, teacher := TableTeacher(filler, WindowLogits(CPU)))
    stream = fed.epoch(0, 3)
    for number in (1, 2, 3):
        window = [next(stream) for _ in range(5 if number < 3 else 3)]
        assert begun[number].wait(10) and not begun[min(number + 1, 6)].is_set()
        assert [torch.equal(teacher(batch).logits, live(batch).logits) for batch in window] == [True] * len(window)
    assert next(stream, None) is None
    batch, plain = next(fed.epoch(1, 3)), next(batches.epoch(1, 3))  # and no further
    assert begun[4].wait(10) and torch.equal(teacher(batch).logits, live(plain).logits)
    batch, plain = next(fed.epoch(2, 3)), next(batches.epoch(2, 3))
    assert begun[6].wait(10) and torch.equal(teacher(batch).logits, live(plain).logits)
    *_, batch = fed.epoch(0, 1)
    batch, plain = next(fed.epoch(1, 2)), next(batches.epoch(1, 2))  # of a longer training
    assert torch.equal(teacher(batch).logits, live(plain).logits)
    assert threading.get_ident() not in threads


def test_what_a_look_ahead_raises_comes_where_its_entries_are_needed(tmp_path, monkeypatch):
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, batches := make_batches(data))
    filler.fill(np.arange(IMAGES * VIEWS))
    calls, find = [], filler.table.find

    def broken(entries: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        calls.append(len(entries))
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        return find(entries)

    monkeypatch.setattr(filler.table, "find", broken)
    monkeypatch.setattr(feed, "WINDOW", 240)
    seen = []
    with pytest.raises(OSError, match="Input/output"):
        seen.extend(Fed(batches, TableTeacher(filler, WindowLogits(CPU))).epoch(0, 1))
    assert len(seen) == 10  # the first window's batches


def test_a_table_is_filled_while_what_was_computed_before_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "SLICE", 100)
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    gate, write, compute = threading.Event(), filler.table.write, filler.compute
    monkeypatch.setattr(filler.table, "write", lambda *given: (gate.wait(10), write(*given)))
    monkeypatch.setattr(filler, "compute", lambda entries: (filler.computed and gate.set(), compute(entries))[1])
    told = []
    filler.fill(np.arange(300), told.append)  # would wait 10 seconds and more for the first write
    assert gate.is_set() and told == [100] * 3 and filler.table.filled == 300


class Moves(TorchDispatchMode):
    """What is moved to a GPU by the thread that launches kernels, and whether it waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.seen.append(bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_given_what_another_thread_has_read_into_page_locked_memory(tmp_path, monkeypatch):
    """The thread that launches kernels reads no file, and no copy makes it wait."""
    live, data, pinned = make_live(), make_data(), {}
    filler = make_filler(tmp_path, live, data, batches := make_batches(data))
    filler.fill(np.arange(IMAGES * VIEWS))
    monkeypatch.setattr(batches, "device", torch.device("cuda"))

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.setdefault(tuple(tensor.shape), threading.get_ident())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    entries = np.arange(0, 1000, 5)
    for whole in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True):
            store = DeviceLogits(filler.table, batches.device) if whole else WindowLogits(batches.device)
        teacher = TableTeacher(filler, store)
        found = filler.reader.submit(teacher.look, entries).result()
        with FakeTensorMode(allow_non_fake_inputs=True), Moves() as moves:
            teacher.prepare(found)
        assert moves.seen == [True, True] and store.logits.device.type == "cuda"
    assert pinned[200, CLASSES] != threading.get_ident()
