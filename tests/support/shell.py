"""Running the real command line in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kdbench import cli

# The smallest real experiment: seconds on one core.
TINY = [
    "dataset=fake", "dataset.n=64", "dataset.size=8", "dataset.num_classes=4", "dataset.validation=0.25",
    "teacher=resnet8", "student=resnet8",
    "schedule.epochs=3", "schedule.batch_size=16", "teacher.schedule.epochs=2", "teacher.schedule.batch_size=16",
    "teacher.allow_chance=true", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended: a busy machine does not move it much."""
    return sum(os.times()[:4])


def kdbench(*words: str) -> int:
    """The exit code of `kdbench words...` in this process."""
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        return cli.main()
    finally:
        sys.argv = before


def train(*words: str) -> Path:
    """`kdbench train` on the tiny experiment in the folder `run`; returns the folder."""
    folder = next((Path(w.split("=", 1)[1]) for w in words if w.startswith("hydra.run.dir=")), Path("run"))
    extra = [] if any(w.startswith("hydra.run.dir=") for w in words) else ["hydra.run.dir=run"]
    assert kdbench("train", *tiny(*words), *extra, *words) == 0
    return folder


def tiny(*words: str) -> list[str]:
    """TINY without the options that only a teacher has, if `words` ask for none."""
    return [w for w in TINY if not ("teacher=none" in words and w.startswith("teacher.allow"))]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
