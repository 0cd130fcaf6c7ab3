"""What a run leaves behind, as far as it must be the same in every run of the same command."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # its reader tells of every continued run

# What differs between equal runs.
TIMES = (
    "seconds", "images_per_second", "time/images_per_second", "finished", "started", "machine", "git", "cost",
    "process", "host", "epochs_done",
)  # fmt: skip
NO_MESSAGE = ("unexpected ", "Traceback (most recent call last)", "This should not happen", "Exception in thread")
UNCOMPARED = (
    ".lock", ".log", "checkpoint.pt", "multirun.yaml", "optimization_results.yaml", "points.json",
)  # fmt: skip # times, folders, threads
WHOLE = "undisturbed"  # the folder of the run that all others are compared with


def state(folder: Path) -> dict[str, Any]:
    """All that must be the same: every file that the run left, and what TensorBoard shows of it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".hydra" in path.parts or path.is_dir() or path.name.endswith(UNCOMPARED):
            continue
        if path.name.startswith("events.out.tfevents."):
            name = str(path.parent.relative_to(folder) / "events")
        found[name] = "a leftover" if path.name.endswith(".tmp") else _content(path, folder)
    return found


def _content(path: Path, folder: Path) -> Any:
    try:
        if path.name.startswith("events.out.tfevents."):
            return points(path.parent)
        if path.suffix not in (".json", ".jsonl"):
            return hashlib.sha256(_placeless(path.read_bytes(), folder)).hexdigest()
        text = _placeless(path.read_bytes(), folder).decode("utf-8")
        return [_timeless(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except Exception as error:  # a reader of damaged events raises whatever it meets
        return f"damaged: {error}"


def _placeless(raw: bytes, folder: Path) -> bytes:
    """Without the names of the folder, and of the one that it may be a copy of."""
    for place in (folder, folder.parent / WHOLE):
        raw = raw.replace(f"{place}/".encode(), b"")
    return raw


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else repr(value)


def points(folder: Path) -> list[tuple[str, int, float]]:
    """The points of a run's curves, as TensorBoard's own reader has them."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if tag not in TIMES]
    return [(tag, point.step, point.value) for tag in sorted(tags) for point in shown.Scalars(tag)]


def no_messages(text: str) -> list[str]:
    """Lines of an output that say nothing to a user."""
    return [line for line in text.splitlines() if any(word in line for word in NO_MESSAGE)]
