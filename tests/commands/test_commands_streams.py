"""Consoles that go away, are closed or lack characters, and a folder that is gone: no training ends by them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kdbench import cli
from tests.support.killing import PATHS
from tests.support.shell import kdbench, result

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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_under_standard_output_is_named():
    done = shell("$KD list loss >/dev/full")
    assert done.returncode == 1 and "kdbench: standard output: No space left on device" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM ends a process at once elsewhere")
def test_who_ends_a_run_in_order_loses_no_epoch():
    """SIGTERM, as schedulers and systemd send it: one sentence, 143, and the run goes on to the same weights."""
    words = [*RUN.split(), "dataset.n=512", "schedule.batch_size=16", "schedule.epochs=20"]
    words += ["trainer.checkpoint_every=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdbench", *words, "hydra.run.dir=cut"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not Path("cut/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=60)
    said = "stopped by SIGTERM. The same command goes on from the last complete epoch."
    assert process.returncode == 128 + signal.SIGTERM and said in err and "Traceback" not in err
    assert said in Path("cut/train.log").read_text() and not Path("cut/result.json").exists()
    done = len(Path("cut/metrics.jsonl").read_text().splitlines())
    quiet = [word for word in words if not word.startswith("trainer.progress")] + ["trainer.progress=none"]
    assert kdbench(*quiet, "hydra.run.dir=cut") == 0 == kdbench(*quiet, "hydra.run.dir=whole")
    assert 0 < done < 20 and f"continues after epoch {done - done % 2}" in Path("cut/train.log").read_text()
    assert result(Path("cut"))["student"]["weights"] == result(Path("whole"))["student"]["weights"]


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch):
    """A terminal sends Ctrl-C to all, and a launcher (uv run) passes it on: the second one would stop what the first
    one has begun, the writing of what was put off."""
    set_to: dict[int, Any] = {}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    monkeypatch.setattr(signal, "signal", set_to.__setitem__)
    cli._stop_in_order()
    assert {signal.SIGINT, signal.SIGTERM} <= set(set_to)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as nohup has it
    monkeypatch.setattr(signal, "signal", None)
    cli._stop_in_order()
    now = [5.0]
    stop = cli._Stop(lambda: now[0])
    with pytest.raises(KeyboardInterrupt) as stopped:
        stop(signal.SIGINT, None)
    assert stopped.value.args == (signal.SIGINT,)
    for now[0] in (5.0, 5.0 + 0.9 * stop.AGAIN):
        stop(signal.SIGINT, None)
        stop(signal.SIGTERM, None)
    now[0] = 5.0 + stop.AGAIN
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)


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
        while not any(path.stat().st_size for path in Path("outputs").rglob("metrics.jsonl")):  # an epoch's row
            assert process.poll() is None
            time.sleep(0.01)
        assert b"loss" in os.read(here, 4096)
        os.close(here)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    (log,) = Path("outputs/runs").rglob("train.log")
    assert "stopped by SIGHUP. The same command goes on" in log.read_text() and "Traceback" not in log.read_text()
