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
    logits = filler.load(entries)
    filler.flush()
    with open(filler.table.path, "r+b") as file:
        file.seek(filler.table.shape.data + 77 * 4 * CLASSES)
        file.write(b"\xff" * 4)
    again = make_filler(tmp_path, live, data, make_batches(data))
    assert torch.equal(again.load(entries), logits) and again.computed == 1 and again.table.damaged
    again.flush()
    assert make_filler(tmp_path, live, data, make_batches(data)).table.valid(entries).all()


def test_an_entry_that_was_not_made_ready_is_not_a_number(tmp_path):
    live, data = make_live(), make_data()
    filler = make_filler(tmp_path, live, data, make_batches(data))
    for store in (WindowLogits(CPU), DeviceLogits(filler.table, CPU)):
        teacher = TableTeacher(filler, store)
        teacher.prepare(np.arange(40))
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
    assert torch.equal(filler.table.read(entries), all_live(live, data))
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
    monkeypatch.setattr(teacher, "prepare", lambda entries: (sizes.append(len(entries)), prepare(entries)))
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
    asked, read = [], filler.table.read
    monkeypatch.setattr(filler.table, "read", lambda entries: (asked.extend(entries.tolist()), read(entries))[1])
    logits = filler.load(np.arange(60))
    assert sorted(asked) == list(range(0, 60, 2)) and filler.computed == 60
    assert torch.equal(logits, make_filler(tmp_path / "other", live, data, make_batches(data)).load(np.arange(60)))
