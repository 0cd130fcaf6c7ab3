"""A table's file: what is written is what is read, by whoever opens it; damage of any kind is seen and repaired."""

from __future__ import annotations

import errno
import os
import zlib

import numpy as np
import pytest
import torch

from kdbench.commands.table import info
from kdbench.tables import file as tables
from kdbench.tables.file import HEADER, LogitTable, Shape, checksums, count_filled, read_header, shape_in

KEY = {"weights": "abc", "mean": [0.5]}
SHAPES = [Shape(20, 6, 10, torch.float32), Shape(7, 3, 5, torch.bfloat16), Shape(9, 1, 1, torch.bfloat16)]
SHAPE = SHAPES[0]


def make(tmp_path, shape=SHAPE, key=KEY):
    return LogitTable(tmp_path / "tables" / "t.table", key, shape)


def some(shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randperm(shape.entries, generator=generator)[:n].numpy()
    return entries, torch.randn(len(entries), shape.classes, generator=generator).to(shape.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written_is_read_by_every_process_that_opens_it(tmp_path, shape):
    one, other = make(tmp_path, shape), make(tmp_path, shape)
    entries, logits = some(shape, 8)
    assert not one.valid(entries).any()
    one.write(entries, logits)
    for seen in (one, other, make(tmp_path, shape)):
        assert seen.valid(entries).all() and torch.equal(seen.find(entries)[1], logits)
        assert seen.filled == len(entries) and seen.valid(np.arange(shape.entries)).sum() == len(entries)


def test_a_table_takes_only_the_disk_that_its_entries_need(tmp_path):
    shape = Shape(50_000, 162, 100, torch.float32)
    table = make(tmp_path, shape)
    table.write(*some(shape, 50))
    status = table.path.stat()
    assert status.st_size == shape.bytes > 3.2e9 and status.st_blocks * 512 < 2e6


def test_whole_entries_are_not_written_again(tmp_path):
    one, other = make(tmp_path), make(tmp_path)
    entries, logits = some(SHAPE, 30)
    one.write(entries[:20], logits[:20])
    other.write(entries, logits + 1)
    assert torch.equal(one.find(entries[:20])[1], logits[:20])
    assert torch.equal(one.find(entries[20:])[1], logits[20:] + 1)


def damage(path, offset, data=None):
    with open(path, "r+b") as file:
        file.seek(offset)
        found = file.read(4)
        file.seek(offset)
        file.write(bytes(b ^ 0x10 for b in found) if data is None else data)


def test_a_thread_that_looks_too_early_makes_no_entry_a_damaged_one(tmp_path, monkeypatch):
    """It noted that there is no tag, after another one had seen the tag and before that one compared it."""
    table = make(tmp_path)
    entries, logits = some(SHAPE, 10)
    make(tmp_path).write(entries, logits)  # another process
    words = table._words

    def late(places, offset, width):
        found = words(places, offset, width)
        if offset != HEADER:
            table._tags[entries] = 0
        return found

    monkeypatch.setattr(table, "_words", late)
    assert table.valid(entries).all() and not table.damaged


@pytest.mark.parametrize("part", ["entry", "tag"])
def test_a_flipped_bit_costs_one_entry(tmp_path, caplog, part):
    table = make(tmp_path)
    entries, logits = some(SHAPE, 40)
    table.write(entries, logits)
    offset = HEADER + 4 * int(entries[3]) if part == "tag" else SHAPE.data + int(entries[3]) * 40 + 12
    damage(table.path, offset)
    again = make(tmp_path)
    good = again.valid(entries)
    assert not good[3] and good.sum() == 39 and again.damaged and "damaged" in caplog.text
    again.write(entries[3:4], logits[3:4])
    assert make(tmp_path).valid(entries).all() and torch.equal(again.find(entries)[1], logits)


def test_entries_that_changed_places_are_seen(tmp_path):
    table = make(tmp_path)
    entries = np.arange(12)
    table.write(entries, torch.randn(12, 10))
    raw = table.path.read_bytes()
    tags, data = slice(HEADER, HEADER + 24), slice(SHAPE.data, SHAPE.data + 240)
    for part in (tags, data):
        middle = (part.start + part.stop) // 2
        damage(table.path, part.start, raw[middle : part.stop])
        damage(table.path, middle, raw[part.start : middle])
    assert not make(tmp_path).valid(entries[:6]).any()  # entries 0-2 and 3-5, with their tags, have swapped places
    assert make(tmp_path).valid(entries[6:]).all()


@pytest.mark.parametrize("length", [0, 100, HEADER, HEADER + 30, SHAPE.data + 805, SHAPE.bytes + 5000])
def test_a_file_of_wrong_length_is_repaired(tmp_path, length):
    table = make(tmp_path)
    entries = np.arange(SHAPE.entries)
    logits = torch.randn(SHAPE.entries, 10)
    table.write(entries, logits)
    del table
    os.truncate(tmp_path / "tables" / "t.table", length)
    again = make(tmp_path)
    good = again.valid(entries)
    kept = max(0, min((length - SHAPE.data) // 40, SHAPE.entries))
    assert good[:kept].all() and not good[kept:].any() and torch.equal(again.find(entries)[1], logits[good])
    again.write(entries, logits)
    assert make(tmp_path).valid(entries).all() and again.path.stat().st_size == SHAPE.bytes


@pytest.mark.parametrize("change", ["key", "shape", "dtype", "header", "foreign"])
def test_a_table_of_something_else_is_replaced_and_its_readers_keep_it(tmp_path, caplog, change):
    old = make(tmp_path)
    entries, logits = some(SHAPE, 10)
    old.write(entries, logits)
    shape, key = SHAPE, KEY
    if change == "key":
        key = {**KEY, "weights": "abd"}
    elif change == "shape":
        shape = SHAPE._replace(views=5)
    elif change == "dtype":
        shape = SHAPE._replace(dtype=torch.bfloat16)
    elif change == "header":
        damage(old.path, 20)
    else:
        damage(old.path, 0, b"MZ\0\0")
    new = make(tmp_path, shape, key)
    assert not new.valid(np.arange(shape.entries)).any() and "started anew" in caplog.text
    assert old.valid(entries).all() and torch.equal(old.find(entries)[1], logits)
    assert shape_in(read_header(new.path)) == shape and count_filled(new.path, shape) == 0


def test_an_entry_is_whole_before_its_tag_is_written(tmp_path, monkeypatch):
    """Stop the writing after every number of bytes: what is valid then is right, and the rest can be written later."""
    shape = Shape(4, 2, 3, torch.float32)
    entries, logits = np.array([1, 2, 3, 6]), torch.randn(4, 3)
    whole = 4 * (12 + 4)
    for stop in range(0, whole + 1, 3):
        table = make(tmp_path / str(stop), shape)
        left = [stop]

        def write(file, data, offset, left=left, pwrite=os.pwrite):
            now = min(left[0], len(data.cast("B")))
            pwrite(file.fileno(), data.cast("B")[:now], offset)
            left[0] -= now
            if now < len(data.cast("B")):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tables, "_write_all", write)
            try:
                table.write(entries, logits)
                assert stop >= whole
            except KeyboardInterrupt:
                pass
        again = make(tmp_path / str(stop), shape)
        good = again.valid(entries)
        assert torch.equal(again.find(entries)[1], logits[good]) and good.sum() == max(0, stop - 48) // 4
        again.write(entries, logits)
        assert make(tmp_path / str(stop), shape).valid(entries).all()


def test_a_full_disk_stops_the_keeping_not_the_run(tmp_path, monkeypatch, caplog):
    table = make(tmp_path)
    entries, logits = some(SHAPE, 10)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        table.write(entries, logits)
        table.write(entries, logits)
    assert caplog.text.count("the disk is full") == 1
    assert not table.valid(entries).any()


def test_checksums_see_every_single_changed_word():
    words = np.random.default_rng(0).integers(2**32, size=(50, 7), dtype=np.uint32)
    entries = np.arange(50)
    tags = checksums(words, entries)
    assert (tags != 0).all() and len(set(tags.tolist())) == 50
    for column in range(7):
        for bit in (0, 13, 31):
            changed = words.copy()
            changed[:, column] ^= np.uint32(1 << bit)
            assert (checksums(changed, entries) != tags).all()
    assert (checksums(words, entries + 1) != tags).all()
    assert (checksums(np.zeros((3, 7), np.uint32), np.arange(3)) != 0).all()


def test_a_key_that_does_not_fit_into_the_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8176 bytes"):
        make(tmp_path, key={"long": "x" * HEADER})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": 3}, {"shape": [1, 2]}, {"shape": [0, 1, 1]}, {"shape": [2**62, 2**62, 4]}, {"shape": [-1, 2, 3]},
        {"shape": [1.5, 2, 3]}, {"shape": [True, 2, 3]}, {"dtype": "save"}, {"dtype": 5}, {"dtype": "int8"},
        {"key": None},        {"key": []}, {"format": "1"}, {"format": None}, {"shape": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_states_nonsense_has_no_shape(change):
    header = {"format": tables.FORMAT, "shape": [20, 6, 10], "dtype": "float32", "key": KEY}
    assert shape_in(header) == SHAPE and shape_in({**header, **change}) is None


def test_one_crafted_table_hides_no_other(tmp_path, capsys):
    table = make(tmp_path)
    table.write(*some(SHAPE, 60))
    texts = [
        b"[" * 5000,
        b'{"format": 1, "shape": [1, 1, 1], "dtype": "float32", "key": {"device": "\\u001b[2J[red]"}}',
        b"{}",
    ]
    for i, text in enumerate(texts):
        numbers = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
        (table.path.parent / f"crafted{i}.table").write_bytes((tables.MAGIC + numbers + text).ljust(2 * HEADER, b"\0"))
    assert info([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("damaged") == 2 and "50.0 %" in out and r"\x1b[2J[red]" in out and "\x1b" not in out


def test_a_table_works_where_there_is_no_pread_and_no_pwrite(tmp_path, monkeypatch):
    for name in ("pread", "pwrite"):
        monkeypatch.delattr(os, name, raising=False)
    table = make(tmp_path)
    entries, logits = some(SHAPE, 70)
    table.write(entries, logits)
    other = make(tmp_path)
    assert other.valid(entries).all() and torch.equal(other.find(entries)[1], logits) and other.filled == 70


def test_a_table_that_may_not_be_written_is_read(tmp_path, monkeypatch):
    table = make(tmp_path)
    entries, logits = some(SHAPE, 10)
    table.write(entries, logits)

    def refuse(*_arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("kdbench.files.FileLock.acquire", refuse)
    before = table.path.read_bytes()
    other = make(tmp_path)
    assert other.valid(entries).all() and torch.equal(other.find(entries)[1], logits)
    other.write(np.arange(SHAPE.entries), torch.zeros(SHAPE.entries, 10))
    assert table.path.read_bytes() == before
    with pytest.raises(OSError, match="Read-only"):
        make(tmp_path, key={"weights": "other"})


def test_a_table_that_is_cut_while_it_is_read_ends_no_process(tmp_path):
    table = make(tmp_path)
    entries, logits = some(SHAPE, 100)
    table.write(entries, logits)
    other = make(tmp_path)
    os.truncate(table.path, HEADER)
    assert not other.valid(entries).any() and other.find(entries)[1].shape == (0, 10)


def test_what_another_process_has_mended_is_good_again(tmp_path):
    table = make(tmp_path)
    entries, logits = some(SHAPE, 5)
    table.write(entries, logits)
    damage(table.path, HEADER + 4 * int(entries[2]))
    other = make(tmp_path)
    assert not other.valid(entries)[2]
    make(tmp_path).write(entries, logits)
    assert other.valid(entries).all()


@pytest.mark.parametrize("harm", ["cut", "damaged"])
def test_what_was_whole_when_it_was_first_read_is_not_believed_for_ever(tmp_path, caplog, harm):
    """A run reads an entry once an epoch; a file that is cut or damaged in between would be taught as it is."""
    table, entries, logits = make(tmp_path), np.arange(6), some(SHAPE, 6)[1]
    table.write(entries, logits)
    assert table.valid(entries).all()
    if harm == "cut":
        os.truncate(table.path, SHAPE.data + 3 * SHAPE.words * 4)
    else:
        damage(table.path, SHAPE.data + 3 * SHAPE.words * 4, os.urandom(3 * SHAPE.words * 4))
    assert table.valid(entries).tolist() == [True] * 3 + [False] * 3
    assert "damaged entries found" in caplog.text
    table.write(entries, logits)
    assert table.valid(entries).all() and torch.equal(table.find(entries)[1], logits)
