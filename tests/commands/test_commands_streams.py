"""Consoles that go away, are closed or lack characters, and a folder that is gone: no training ends by them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killing import PATHS

RUN = (
    "train dataset=fake dataset.n=32 dataset.size=8 teacher=none loss=ce student=mlp schedule.epochs=2 "
    "trainer.device=cpu trainer.progress=plain"
)


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's pipeline in the current folder; $KD is the command line."""
    path = os.pathsep.join(map(str, PATHS))
    settings = os.environ | {"PYTHONPATH": path, "KD": f"{sys.executable} -m kdbench"} | environment
    return subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True, timeout=120)


def finished() -> int:
    return len(list(Path("outputs/runs").rglob("result.json")))


def test_a_reader_that_goes_away_ends_no_run():
    done = shell(f'(exec $KD {RUN}; ) | head -1 >/dev/null; echo "${{PIPESTATUS[0]}}"')
    assert done.stdout.strip() == "0" and finished() == 1 and done.stderr == ""


def test_a_closed_stdout_and_one_of_ascii():
    assert shell(f"$KD {RUN} >&-").returncode == 0 and finished() == 1
    done = shell(f"$KD {RUN} seed=1; $KD compare outputs", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.isascii() and finished() == 2


def test_a_folder_that_is_gone_is_one_sentence():
    done = shell("mkdir gone; cd gone; rmdir ../gone; $KD list loss")
    assert done.returncode == 1 and done.stderr.startswith("kdbench: the current folder is not there any more")
    assert "Traceback" not in done.stderr


def test_unbuffered_streams_stay_so():
    """PYTHONUNBUFFERED: what was said before a kill is there."""
    code = "import os, sys; from kdbench import cli; sys.argv = ['kdbench', 'nonsense']; os._exit(cli.main() + 1)"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "there is no command 'nonsense'" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_log_file_on_a_full_disk_is_no_traceback():
    done = shell(f"$KD {RUN} hydra.job_logging.handlers.file.filename=/dev/full")
    assert done.returncode == 0 and finished() == 1 and done.stderr == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no hang-up")
def test_a_terminal_that_hangs_up_stops_a_run_in_order():
    """A session of its own on a terminal whose other end is closed: the kernel sends SIGHUP, and writing fails."""
    import fcntl
    import pty
    import termios

    here, there = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    words = [sys.executable, "-m", "kdbench", *RUN.split(), "schedule.epochs=20000", "trainer.progress=plain"]

    def on_its_own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would hand down that it is ignored
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        words, stdin=there, stdout=there, stderr=there, env=environment, start_new_session=True,
        preexec_fn=on_its_own_terminal,
    )  # fmt: skip
    os.close(there)
    try:
        shown = b""
        while b": epoch " not in shown:
            shown += os.read(here, 4096)
        os.close(here)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (log,) = Path("outputs/runs").rglob("train.log")
    assert "stopped by SIGHUP. The same command goes on" in log.read_text() and "Traceback" not in log.read_text()
