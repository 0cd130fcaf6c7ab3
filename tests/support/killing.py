"""Training in a process of its own that is killed at a chosen step, once its checkpoints are on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PATHS = (REPOSITORY, REPOSITORY / "kdbench/_hydra")
KILLED = -signal.SIGKILL  # the exit code of such a process


def in_its_own_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that may kill itself, in the current folder; it can import kdbench and the tests."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


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
