"""Finding runs under folders and reading their results."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from kdbench.errors import UserError
from kdbench.files import read_object
from kdbench.results.result import RESULT, RunResult, is_finished, lacking, read_result

LATENCY = "latency.json"  # what `kdbench bench --latency` measured of a run's student
_MARKS = (RESULT, "run.json", "config.yaml", "train.log", ".hydra")  # any of these makes a folder a run's


class Run(NamedTuple):
    folder: Path
    result: RunResult

    def cost(self, name: str) -> float | None:
        """What the run took or its student takes, by its name in `RunResult.cost`, "flops" or "latency"."""
        if name == "latency":
            return latency(self.folder, self.result.student.weights)
        return self.result.figure(f"cost/{name}")


def _lacking(_run: Run, name: str) -> NoReturn:
    """Only for what there is not."""
    if name.startswith("_"):
        raise AttributeError(name)
    raise lacking(Run, name, ["folder", "result"], "What a run found is in .result.")


setattr(Run, "__getattr__", _lacking)  # noqa: B010 - in the class it would make any name right to a type checker


def latency(folder: Path, weights: str) -> float | None:
    """Seconds that the student with these weights (their hash) takes for one input by torch, as `kdbench bench
    --latency` measured them last and on the machine that it ran on; None: it did not, or its file is no such file."""
    try:
        kept = read_object(folder / LATENCY)
        (one,) = (each["milliseconds"] for each in kept["latency"] if (each["way"], each["batch"]) == ("torch", 1))
        seconds = float(one) / 1000
    except (UserError, LookupError, TypeError, ValueError, OverflowError):
        return None
    return seconds if kept.get("weights") == weights and 0 < seconds < math.inf else None


class Found(NamedTuple):
    runs: list[Run]
    problems: list[tuple[Path, str]]  # folders without a usable result, and why


def read_runs(paths: Iterable[Path]) -> Found:
    """Every run at or under the paths, each once. Unfinished and broken ones are named, not fatal.

    Trained teachers in a run's own store (a folder named `teachers`) are left out unless a path points into it.
    Raises UserError for a path that does not exist, or if there is no run at all.
    """
    runs: dict[str, Run] = {}
    problems: dict[str, tuple[Path, str]] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: there is no such folder")
        top = path if path.is_dir() else path.parent
        if top != path and not any((top / mark).exists() for mark in _MARKS):  # a glob's: its folder has all the others
            raise UserError(f"{path}: is neither a folder nor a file in a run's folder")
        real = os.path.realpath(top)  # links are not followed below: one look-up for all that lies there
        for folder in run_folders(top):
            result = _read(folder)
            key = os.path.normpath(os.path.join(real, os.path.relpath(folder, top)))
            if isinstance(result, str):
                problems[key] = folder, result
            else:
                runs[key] = Run(folder, result)
    if not runs and not problems:
        raise UserError(f"{', '.join(map(str, paths))}: there are no runs here (no result.json in any folder)")
    return Found([runs[key] for key in sorted(runs)], [problems[key] for key in sorted(problems)])


def run_folders(top: Path) -> Iterator[Path]:
    """Every folder of a run at or under `top`, but for those of a store of teachers."""
    for place, folders, files in os.walk(top):
        if any(mark in files or mark in folders for mark in _MARKS):
            folders.clear()  # what lies inside is part of this run (the stages of a procedure)
            yield Path(place)
        else:
            folders[:] = sorted(name for name in folders if name != "teachers")


def _read(folder: Path) -> RunResult | str:
    """A run's result, or why there is none."""
    if not is_finished(folder):
        return f"not finished{_progress(folder)}"
    try:
        return read_result(folder)
    except UserError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")


def _progress(folder: Path) -> str:
    """How far an unfinished run came, from the last line of its metrics.jsonl."""
    try:
        last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return f": epoch {int(json.loads(last)['epoch'])} was its last"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
