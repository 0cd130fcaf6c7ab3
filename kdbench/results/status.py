"""Status of runs, read from their folders at any time: done, running (where), failed, stopped, waiting; and how long.

A run that is at work holds the lock of its folder, on whichever machine; run.json says since when and where. A sweep
notes the points that it has before it. Loads no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kdbench.errors import UserError, printable
from kdbench.files import is_locked, read_object, write_json
from kdbench.results.read import run_folders
from kdbench.results.result import RESULT

START = "run.json"  # written when a run starts
FAILURE = "failure.json"  # why a run has failed, until it is begun again
POINTS = "points.json"  # in a sweep's own folder: the points that it has before it
LOCK = ".lock"  # held by whoever is at work in a folder

State = Literal["done", "running", "failed", "stopped", "waiting"]
STATES: tuple[State, ...] = ("done", "running", "failed", "stopped", "waiting")


@dataclass(frozen=True)
class Point:
    """A run, or a point of a sweep that has not begun."""

    folder: Path
    state: State
    epoch: int = 0
    epochs: int | None = None  # of the whole schedule
    stage: str = ""  # of a procedure that has several
    host: str = ""  # where it runs, or ran last
    process: int | None = None
    message: str = ""  # why it failed
    pace: float | None = None  # seconds an epoch, from start to end
    left: float | None = None  # seconds, of one that is running


class Status(NamedTuple):
    points: list[Point]
    sweeps: int  # that are at work on the points
    left: float | None  # seconds until all are done, if those at work go on so; None if that is not known

    def of(self, state: State) -> list[Point]:
        return [point for point in self.points if point.state == state]

    def as_json(self) -> dict[str, object]:
        points = [{**asdict(point), "folder": str(point.folder)} for point in self.points]
        counts: dict[str, int] = {state: len(self.of(state)) for state in STATES}
        return {"points": points, **counts, "sweeps": self.sweeps, "seconds_left": self.left}


def note_points(sweep: Path, folders: Sequence[Path]) -> None:
    """Keep in a sweep's own folder which points it has, beside those of its earlier turns."""
    known = [str(folder) for folder in _noted(sweep / POINTS)]
    named = list(dict.fromkeys([*known, *map(str, folders)]))
    write_json(sweep / POINTS, {"points": [os.path.relpath(folder, sweep) for folder in named]})


def note_failure(folder: Path, error: BaseException) -> None:
    """Keep in a run's folder why it failed, if it has begun and the folder can be written."""
    with suppress(OSError):
        if (folder / START).exists():
            write_json(folder / FAILURE, {"failed": _now(), "message": str(error) or type(error).__name__})


def read_status(paths: Iterable[Path]) -> Status:
    """Of all runs and points of sweeps under the paths. Raises UserError for a path that is not there."""
    points: dict[str, Point] = {}
    sweeps = 0
    for top in paths:
        if not top.is_dir():
            raise UserError(f"{top}: there is no such folder")
        for folder in [*run_folders(top), *_teachers(top)]:
            points.setdefault(os.path.realpath(folder), _point(folder))
        for noted in top.rglob(POINTS):
            sweeps += is_locked(noted.parent / LOCK)
            for folder in _noted(noted):
                points.setdefault(os.path.realpath(folder), _point(folder))
    shown = sorted(points.values(), key=lambda point: str(point.folder))
    return Status(shown, sweeps, _left(shown))


def _teachers(top: Path) -> Iterator[Path]:
    """Teachers in a store that are not trained yet."""
    yield from (start.parent for start in top.rglob(f"teachers/*/*/{START}") if not (start.parent / RESULT).exists())


def _noted(path: Path) -> list[Path]:
    with suppress(UserError, TypeError, AttributeError):
        listed = read_object(path).get("points", []) if path.exists() else []
        return [Path(os.path.normpath(path.parent / str(folder))) for folder in listed]
    return []


def _point(folder: Path) -> Point:
    stage = _stage(folder)
    start = _object(stage / START) or _object(folder / START)
    epochs = (start.get("config") or {}).get("schedule.epochs") if isinstance(start.get("config"), dict) else None
    process = start.get("process")
    point = Point(
        folder, _state(folder, stage, start), _epoch(stage), epochs if isinstance(epochs, int) else None,
        stage.name if stage != folder else "", printable(str(start.get("host", ""))),
        process if isinstance(process, int) else None,
    )  # fmt: skip
    if point.state == "failed":
        return replace(point, message=printable(str(_object(stage / FAILURE).get("message", ""))))
    return _timed(point, stage, start)


def _state(folder: Path, stage: Path, start: dict[str, object]) -> State:
    if (folder / RESULT).exists():
        return "done"
    if is_locked(folder / LOCK):
        return "running"
    if (stage / FAILURE).exists():
        return "failed"
    return "stopped" if start else "waiting"


def _stage(folder: Path) -> Path:
    """Where the figures of a run are at the moment: in the stage that was begun last, if it has several."""
    begun = [(path.stat().st_mtime, path.parent) for path in folder.glob(f"stages/*/{START}")]
    return max(begun)[1] if begun else folder


def _timed(point: Point, stage: Path, start: dict[str, object]) -> Point:
    """With its pace since it was begun (again), and what is left of it at that pace."""
    before = start.get("epochs_done", 0)
    since = point.epoch - before if isinstance(before, int) else 0
    with suppress(OSError):
        last = (stage / "metrics.jsonl").stat().st_mtime
        took = last - (stage / START).stat().st_mtime
        if since < 1 or took <= 0:
            return point
        pace = took / since
        if point.state != "running" or point.epochs is None:
            return replace(point, pace=pace)
        left = (point.epochs - point.epoch) * pace - (time.time() - last)
        return replace(point, pace=pace, left=max(left, 0.0))
    return point


def _left(points: Sequence[Point]) -> float | None:
    """Seconds until all are done, if as many run at once as do now."""
    running = [point for point in points if point.state == "running"]
    paces = [point.pace for point in points if point.pace is not None]
    lengths = [point.epochs for point in points if point.epochs is not None]
    if not running or not paces or not lengths:
        return None
    pace, length = sum(paces) / len(paces), sum(lengths) / len(lengths)
    begun = [length * pace if point.left is None else point.left for point in running]
    ahead = [point for point in points if point.state in ("waiting", "stopped")]
    rest = [((point.epochs or length) - point.epoch) * pace for point in ahead]
    return max(max(begun), (sum(begun) + sum(rest)) / len(running))


def _epoch(folder: Path) -> int:
    """The last whole epoch, from the end of metrics.jsonl."""
    with suppress(OSError, ValueError, LookupError, TypeError), open(folder / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
        return int(json.loads(file.read().splitlines()[-1])["epoch"])
    return 0


def _object(path: Path) -> dict[str, Any]:
    with suppress(UserError):
        return read_object(path) if path.exists() else {}
    return {}


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
