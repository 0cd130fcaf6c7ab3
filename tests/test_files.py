"""What a run writes: whole or not there, of the umask's mode, the same bytes each time, and named when it fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import Timeout
from torch import nn

from kdbench import files
from kdbench.engine.checkpoint import load_checkpoint, save_checkpoint, save_state, save_weights
from kdbench.errors import UserError, printable, told
from kdbench.files import read_object, remove_leftovers, write_atomically
from kdbench.models.weights import read_safetensors, weight_hash
from tests.support.full import POSIX, files_of_at_most

ABOUT = {"network": "net", "dataset": "data", "hash": "abc"}


def flip(path: Path, share: float) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * share)] ^= 8
    path.write_bytes(raw)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_a_flipped_bit_in_a_checkpoint_or_in_weights_is_named_with_the_file(tmp_path, share):
    state = {"learner": {"w": torch.randn(4000)}, "epochs_done": 3}
    save_checkpoint(tmp_path / "c.pt", state)
    assert load_checkpoint(tmp_path / "c.pt")["learner"]["w"].equal(state["learner"]["w"])
    save_state(tmp_path / "best.safetensors", state["learner"], ABOUT)
    assert read_safetensors(tmp_path / "best.safetensors")["w"].equal(state["learner"]["w"])
    for name, read in (("c.pt", load_checkpoint), ("best.safetensors", read_safetensors)):
        flip(tmp_path / name, share)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


@pytest.mark.skipif(os.name != "posix", reason="pipes that are files are POSIX's")
def test_a_device_or_a_pipe_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is there already, and is no file"):
        write_atomically(tmp_path / "pipe", lambda temporary: temporary.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


def test_the_same_weights_are_the_same_bytes_in_a_file_that_others_may_read(tmp_path):
    network = nn.Linear(3, 4)
    before = os.umask(0o022)
    try:
        for i in range(8):
            save_weights(tmp_path / f"{i}.safetensors", network, ABOUT)
    finally:
        os.umask(before)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644} or os.name != "posix"
    assert weight_hash(read_safetensors(tmp_path / "0.safetensors")) == weight_hash(network.state_dict())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("kind", ["checkpoint", "weights", "text"])
def test_a_full_disk_is_said_as_such_with_the_file(tmp_path, kind, monkeypatch):
    save = {
        "checkpoint": lambda path: save_checkpoint(path, {"w": torch.randn(1000)}),
        "weights": lambda path: save_weights(path, nn.Linear(100, 100), ABOUT),
        "text": lambda path: write_atomically(path, lambda temporary: temporary.write_text("x" * 9999)),
    }[kind]
    real = Path.with_name
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full") if name[0] == "." else real(self, name))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(OSError, match=r"No space left on device.*room.*file\.bin") as caught:
        save(tmp_path / "file.bin")
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "file.bin").exists()


@POSIX
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_disk_that_fills_up_within_a_file_is_said_as_such_and_leaves_the_old_one(tmp_path, kind, share):
    """torch ends its archive all the same, and would complain of that."""
    path, state = tmp_path / "file.bin", {"w": torch.randn(20_000), "b": torch.randn(300)}
    save = save_checkpoint if kind == "checkpoint" else lambda path, state: save_state(path, state, ABOUT)
    save(path, state)
    before = path.read_bytes()
    with files_of_at_most(int(share * len(before))), pytest.raises(OSError, match=r"too large.*file\.bin") as caught:
        save(path, {"w": torch.randn(20_000), "b": torch.randn(300)})
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["file.bin"]


def test_leftovers_of_killed_writes_go_and_those_of_living_processes_stay(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, own, living = int(gone.stdout), os.getpid(), os.getppid()
    for name in (f".checkpoint.pt.{dead}.tmp", f".a.b.{own}.tmp", f".student.{living}.tmp", ".mine.tmp", "x.1.tmp"):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".student.{living}.tmp", ".mine.tmp", "x.1.tmp"}


@pytest.mark.parametrize("content", [b"null", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b""])
def test_json_that_is_no_object_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: "):
        read_object(tmp_path / "run.json")


def test_text_that_would_steer_a_terminal_is_shown_as_its_code():
    assert printable("a\x1b[2Jb\x9b1m\rc\u202ed\ud800") == r"a\x1b[2Jb\x9b1m\rc\u202ed\ud800"
    assert printable("één 模型 \u200d\n\t👩") == "één 模型 \u200d\n\t👩"


def test_a_file_system_without_locks_is_said_once_and_worked_on_without(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def without(file, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files, "_lockless", {})
    monkeypatch.setattr(fcntl, "flock", without)
    with files.lock(tmp_path / "a.lock"), files.lock(tmp_path / "b.lock", 0):
        pass
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and str(tmp_path) in said[0] and "gives no locks (No locks available)" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_lock_is_seen_and_waited_for(tmp_path):
    path = tmp_path / "a.lock"
    assert not files.is_locked(path) and not path.exists()
    with files.lock(path):
        assert files.is_locked(path)
        with pytest.raises(Timeout), files.lock(path, 0):
            pass
    assert not files.is_locked(path)


def test_a_place_that_cannot_be_written_from_here_is_left_out(monkeypatch):
    """A file on another drive of Windows, a current folder that is gone: the exception is told all the same."""
    Path("mine.py").write_text("def forward():\n    raise KeyError('tau')\n")
    monkeypatch.syspath_prepend(Path.cwd())
    forward = __import__("mine").forward
    for failure in (None, ValueError("path is on mount 'C:'"), FileNotFoundError()):
        if failure is not None:
            monkeypatch.setattr("os.path.relpath", lambda path, failure=failure: (_ for _ in ()).throw(failure))
        with pytest.raises(KeyError) as caught:
            forward()
        place = "" if failure else ", in mine.py, line 2 (forward)"
        assert told(caught.value) == f"KeyError: 'tau'{place}"
    sys.modules.pop("mine")
