"""Training in a process of its own that is killed at a chosen step, once its checkpoints are on the disk."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PATHS = (REPOSITORY, REPOSITORY / "kdbench/_hydra")
KILLED = -signal.SIGKILL  # the exit code of such a process
_STARTING = threading.Lock()
NEEDED = ["pytest", "torch._dynamo", "kdbench.build", "kdbench.commands.train", "tests.support.killing"]


def in_a_new_interpreter(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in the current folder, in a process that has imported nothing; it can import kdbench and the
    tests."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def in_its_own_process(code: str) -> subprocess.CompletedProcess[str]:
    """The same for code that may kill itself, forked from a process that has imported what a training needs and has
    done nothing else: that takes three seconds, once instead of each time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return in_a_new_interpreter(code)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(NEEDED)
    with tempfile.TemporaryDirectory() as folder:
        said = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        process = server.Process(target=_become, args=(code, os.getcwd(), dict(os.environ), said))
        with _STARTING, pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PYTHONPATH", os.pathsep.join(map(str, PATHS))
            )  # the server's own
            process.start()
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        out, err = (Path(name).read_text(encoding="utf-8") for name in said)
        return subprocess.CompletedProcess([code], process.exitcode, out, err)


def _become(code: str, folder: str, environment: dict[str, str], said: list[str]) -> None:
    """What the forked process does."""
    for number, name in enumerate(said, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    exec(compile(code, "<its own process>", "exec"), {"__name__": "__main__"})


def kill_at(step: int, folder: str, checkpoints: int = 1) -> None:
    """Kill this process after its `step`th training step, as soon as `folder` has so many checkpoints.

    They are written beside the training, so a short epoch may end before the last one's checkpoint is on the disk; none
    is put off.
    """
    from kdbench.engine import checkpoint
    from kdbench.engine.learner import Learner

    checkpoint.PUT_OFF = 0.0
    take, count = Learner.step, [0]

    def killed(self, *args):
        take(self, *args)
        count[0] += 1
        if count[0] == step:
            deadline = time.monotonic() + 60
            while len(list(Path(folder).rglob("checkpoint.pt"))) < checkpoints:
                if time.monotonic() > deadline:
                    os.write(2, b"no such checkpoints came: the kill would prove nothing\n")
                    os._exit(1)
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    Learner.step = killed
