"""The sections by name, and one of them as a process does it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from device_check import equal, goals, speed
from device_check.check import Check
from device_check.page import replace
from kdbench.bench.machine import describe, peak_memory

SECTIONS: dict[str, Callable[[Check], None]] = {
    "run": goals.run, "sweep": goals.sweep, "live": goals.live, "eager": goals.eager, "bench": goals.bench,
    "equal": equal.equal, "kernels": speed.kernels, "matrix": speed.matrix, "cohort": speed.cohort,
    "losses": equal.losses, "follow": equal.follow, "compile": speed.compile,
}  # fmt: skip


def run_section(arguments: argparse.Namespace) -> int:
    """The work of one process: its result as JSON in `out`, written after every verdict."""
    with tempfile.TemporaryDirectory(prefix="kdbench-check-") as scratch:
        seconds = 0.2 if arguments.quick else arguments.seconds
        check = Check(Path(scratch), arguments.quick, seconds, arguments.peer)
        placement = check.bench().placement

        def keep(check: Check) -> None:
            found = {"verdicts": [verdict._asdict() for verdict in check.verdicts], "figures": check.figures}
            about = {"machine": describe(placement), "peak": peak_memory(placement)}
            replace(arguments.out, json.dumps(about | found) + "\n")

        check.kept = keep
        SECTIONS[arguments.section](check)
        keep(check)
    return 0
