"""Whether recorded steps may be believed on the GPU at hand: a short training tells, once, in a process of its own.

`trainer.cuda_graph=auto` records only where it has told so. A recording that goes wrong may take its process with it,
hang, or train something else, and nobody has asked for one: so it is the rehearsal that breaks, not the training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from kdbench.errors import UserError
from kdbench.files import lock, read_object, write_json

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "kdbench.engine.rehearsal")  # and the device; its last line is JSON: {"why": "..."}
PATIENCE = 300.0  # seconds
KEY = "trainer.cuda_graph=auto"


@functools.cache
def proven(device: torch.device) -> bool:
    """Whether recorded steps have been plain steps on this GPU, with these versions and this code.

    Tried now where it is not known, some ten seconds at a guess. What a rehearsal finds is kept in the user's folder
    for caches; one that comes to no end proves nothing and is tried again by the next training.
    """
    about = _about(device)
    kept = _folder() / f"recorded-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    why = _known(kept)
    if why is None:
        with _alone(kept):
            why = _known(kept)  # another process may have found out meanwhile
            if why is None:
                why = _rehearsed(device, kept, about)
    if why:
        log.warning("%s: steps are not recorded on %s: %s", KEY, about["gpu"], why)
    return not why


def _alone(kept: Path) -> AbstractContextManager[object]:
    """One rehearsal at a time, where the folder can be had."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        return lock(kept.with_suffix(".lock"))
    except OSError:
        return nullcontext()


def _known(kept: Path) -> str | None:
    """What an earlier rehearsal found: why steps are not to be recorded, "" if they may be; None if there was none."""
    with suppress(UserError):
        return str(read_object(kept)["why"])
    return None


def _rehearsed(device: torch.device, kept: Path, about: dict[str, Any]) -> str:
    log.info("%s: recorded steps are tried beside plain ones on %s, once; some seconds", KEY, about["gpu"])
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # it finds what this process finds
    try:
        done = subprocess.run(
            [*COMMAND, str(device)], capture_output=True, text=True, errors="replace", timeout=PATIENCE, env=where
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the trial of them came to no end ({error})"
    try:
        why = str(json.loads(done.stdout.splitlines()[-1])["why"])
    except (LookupError, ValueError, TypeError):
        said = (done.stderr.splitlines() or ["it said nothing"])[-1]
        return f"the trial of them broke (exit code {done.returncode}: {said})"
    with suppress(OSError, UserError):  # a folder that may not be written: the next process tries again
        write_json(kept, {"why": why, **about})
    return why


def _about(device: torch.device) -> dict[str, Any]:
    """What it is a result of."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return {
        "gpu": torch.cuda.get_device_name(device), "capability": torch.cuda.get_device_capability(device),
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "driver": getattr(torch._C, "_cuda_getDriverVersion", lambda: None)(), "engine": code.hexdigest()[:16],
    }  # fmt: skip


def _folder() -> Path:
    """The user's folder for caches, ours in it."""
    named = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(named or Path.home() / ".cache") / "kdbench"
    except RuntimeError:  # a user without a home
        return Path("/nonexistent")
