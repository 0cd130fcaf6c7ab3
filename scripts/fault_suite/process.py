"""A command of kdbench in a forked process, killed at any moment of its life."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked processes share the cores

from fault_suite.state import points
from kdbench import build, cli  # noqa: F401 (build imports all that a run needs, once, before the forks)
from kdbench.commands import compare, evaluate, table, train  # noqa: F401

PATIENCE = 300.0  # seconds after which a process hangs


class Ended(NamedTuple):
    code: int  # negative: killed by that signal
    text: str  # what it printed
    changes: int = 0  # that it made to files


class Moment(NamedTuple):
    """When a process is killed: after so many seconds of processor time, or before its so-manieth change of a file."""

    seconds: float | None = None
    change: int | None = None


TO_ITS_END = Moment()


class Process:
    """`kdbench words...` in a forked process of its own, in a folder, killed at a moment. `limit`: bytes a file."""

    def __init__(self, words: Sequence[str], folder: Path, dies: Moment = TO_ITS_END, limit: int | None = None) -> None:
        self.dies, self.begin = dies, time.monotonic()
        self.output, self.count = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        self.number = os.fork()
        if self.number == 0:
            self._become(words, folder, limit)

    def _become(self, words: Sequence[str], folder: Path, limit: int | None) -> None:
        code = 70
        try:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            os.chdir(folder)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            made = _count_changes(self.dies.change)
            sys.argv = ["kdbench", *words]
            code = _read_events() if words[0] == "events" else cli.main()
            sys.stdout.flush()
            os.write(self.count.fileno(), str(next(made)).encode())
        finally:
            os._exit(code)

    def spent(self) -> float:
        """Seconds of processor time it has used; where the system does not tell, seconds since it began."""
        try:
            return time.clock_gettime((~self.number << 3) | 2)  # Linux: another process's clock
        except (OSError, AttributeError):
            return time.monotonic() - self.begin

    def lives(self, seconds: float) -> bool:
        """Wait until it has used so much processor time; whether it is still there then. Never reaps it."""
        until = time.monotonic() + PATIENCE
        while self.spent() < seconds and time.monotonic() < until:
            if os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.004)
        return True

    def wait(self) -> Ended:
        """Until it ends, by itself or at its moment."""
        hangs = self.lives(self.dies.seconds if self.dies.seconds is not None else float("inf"))
        if hangs:
            os.kill(self.number, signal.SIGKILL)
        _, status = os.waitpid(self.number, 0)
        with self.output, self.count:
            self.output.seek(0)
            self.count.seek(0)
            text, changes = self.output.read().decode(errors="replace"), int(self.count.read() or 0)
        if hangs and self.dies.seconds is None:
            text += f"\nhangs after {PATIENCE:.0f} s: This should not happen"
        return Ended(os.waitstatus_to_exitcode(status), text, changes)


def _count_changes(fatal: int | None) -> Iterator[int]:
    """Count this process's changes of files from now on; right before the `fatal`th it is killed."""
    made = itertools.count()
    names = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        changes = name in names or (name == "open" and isinstance(arguments[2], int) and arguments[2] & writes)
        if changes and next(made) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return made


def _read_events() -> int:
    for folder in {path.parent for path in Path().rglob("events.out.tfevents.*")}:
        points(folder)
    return 0


def warm_up(words: Sequence[str]) -> None:
    """Compose once before the forks: Hydra's parsers are slow until they have met these words."""
    single = [word for word in words if word == "train" or ("=" in word and "," not in word)]
    sys.argv = ["kdbench", *single, "--cfg", "all", "--resolve"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main()
