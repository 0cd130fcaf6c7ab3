"""Whether recorded steps may be believed is found out once, by a process that may break in any way."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from kdbench.engine import graph, proof, rehearsal
from tests.support.tape import Tape

CUDA = torch.device("cuda", 0)
GOOD = "print('some other words'); print('{\"why\": \"\"}')"
BAD = 'print(\'{"why": "they ended elsewhere"}\')'


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Answer `proven` as a process with a program of its own finds it out, in memory of its own each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = {"gpu": "GPU", "torch": "2"}
    monkeypatch.setattr(proof, "_about", lambda device: about)

    def ask(program: str, **changed) -> bool:
        about.update(changed)
        monkeypatch.setattr(proof, "COMMAND", (sys.executable, "-c", program))
        proof.proven.cache_clear()
        return proof.proven(CUDA)

    yield ask
    proof.proven.cache_clear()


def test_what_a_rehearsal_finds_is_kept_for_its_gpu_and_versions(asked, tmp_path, caplog):
    caplog.set_level("INFO")
    assert asked(GOOD) and asked("raise SystemExit(1)")  # known: nothing is run
    assert caplog.text.count("tried beside plain ones on GPU, once") == 1
    assert not asked(BAD, torch="3") and "not recorded on GPU: they ended elsewhere" in caplog.text
    assert not asked(GOOD) and asked(GOOD, torch="2") and asked(GOOD, gpu="other")
    (file,) = [path for path in (tmp_path / "kdbench").glob("*.json") if '"other"' in path.read_text()]
    file.write_text("half of")
    assert not asked(BAD)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise RuntimeError('CUDA error: an illegal memory access')", r"exit code 1: RuntimeError: CUDA error"),
        ("import os; os.abort()", r"exit code -6"),
        ("pass", "it said nothing"),
        (r"import os; os.write(2, b'a driver\xb4s word'); raise SystemExit(3)", "exit code 3: a driver"),
        ("print('3')", "broke"),
        ("import time; time.sleep(60)", "came to no end"),
    ],
)
def test_one_that_breaks_proves_nothing_and_is_tried_again(asked, monkeypatch, caplog, program, said):
    monkeypatch.setattr(proof, "PATIENCE", 0.4 if "sleep" in program else 60)
    assert not asked(program)
    assert said in caplog.text
    assert asked(GOOD)


def test_a_folder_that_cannot_be_had_costs_a_rehearsal_each_time(asked, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert asked(GOOD) and not asked(BAD)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert asked(GOOD) or os.geteuid() == 0


def test_the_proof_is_of_the_code_that_takes_the_steps(monkeypatch, tmp_path):
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda device: "x")
    (tmp_path / "proof.py").write_text("1")
    monkeypatch.setattr(proof, "__file__", str(tmp_path / "proof.py"))
    first = proof._about(CUDA)
    assert proof._about(CUDA) == first
    (tmp_path / "proof.py").write_text("2")
    assert proof._about(CUDA) != first


def test_a_rehearsal_tells_recordings_that_do_as_they_should_from_those_that_do_not(tapes, monkeypatch):
    monkeypatch.setattr(rehearsal, "STEPS", 6)
    assert rehearsal.why_not("cpu") == "" and len(tapes) == 2  # one of the student with dropout

    class Idle(Tape):
        def replay(self) -> None:
            return

    monkeypatch.setattr(graph, "recording", lambda function, device: Idle(function))
    assert "ends elsewhere where it is recorded" in rehearsal.why_not("cpu")
    monkeypatch.setattr(graph, "TRIED", 0)  # seen by where the training ends, too
    assert "ended elsewhere than plain ones" in rehearsal.why_not("cpu")
