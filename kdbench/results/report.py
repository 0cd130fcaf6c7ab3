"""The small table that a training ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from kdbench.results.metrics import METRICS, TASKS, Task, metric_of
from kdbench.results.result import RunResult, StageResult

SPLITS = ("test", "val", "train")


def show(result: RunResult, folder: Path, already: bool) -> None:
    """Print teacher accuracy, student accuracy, agreement, where the run is and what to type next."""
    console = Console(soft_wrap=True, markup=False)
    folder = _from_here(folder)
    console.print(_table(result))
    if result.stages:
        console.print(_stages(result.stages, TASKS[result.task]))
    if result.figures:
        console.print(_figures(result.figures, TASKS[result.task]))
    for name, rows in result.tables.items():
        console.print(_rows(name, rows))
    last, best = result.last, result.best
    speed = f"{result.images_per_second:,.0f} {result.samples}/s on {result.device}"
    epochs = f"{int(last['epoch'])} epochs, {result.seconds:.0f} s, {speed}"
    console.print(f"loss  {result.formula}", markup=False, highlight=False)
    console.print(f"run   {folder}  ({epochs})", markup=False, highlight=False)
    if best and best["epoch"] != last["epoch"]:
        task = TASKS[result.task]
        figures = ", ".join(f"{task.primary.text(best[task.on(split)])} on {split}" for split in ("val", "test"))
        console.print(f"best  epoch {int(best['epoch'])} by validation: {figures}", highlight=False)
    if already:
        console.print("This run was finished before; force=true runs it again.", highlight=False)
    outputs = _outputs(result, folder)
    command = f"evaluate {folder}" if outputs is None else f"compare {outputs}"
    console.print(
        f"next  kdbench {command}   |   tensorboard --logdir {outputs or folder}", markup=False, highlight=False
    )


def in_a_line(result: RunResult, folder: Path) -> str:
    """A finished point of a sweep that is started again; the sweep's own table has the rest."""
    task = TASKS[result.task]
    known = [split for split in ("test", "val") if task.on(split) in result.last]
    figures = ", ".join(f"{task.primary.text(result.last[task.on(split)])} on {split}" for split in known)
    return f"This run was finished before: {figures}, in {_from_here(folder)}"


def _from_here(folder: Path) -> Path:
    """As it is typed where the command was typed, if it lies below."""
    with suppress(ValueError):
        return folder.relative_to(Path.cwd())
    return folder


def _table(result: RunResult) -> Table:
    task, teacher, student, last = TASKS[result.task], result.teacher, result.student, result.last
    splits = [split for split in SPLITS if task.on(split) in last]
    numbers = [Column(name, justify="right") for name in ("parameters", *_heads(splits, task), "agreement")]
    table = Table("", "network", *numbers, box=None, header_style="bold", pad_edge=False)
    if teacher:
        figures = [task.primary.text(teacher.metrics.get(task.on(split))) for split in splits]
        table.add_row("teacher", teacher.name, f"{teacher.parameters:,}", *figures, "")
    figures = [task.primary.text(last[task.on(split)]) for split in splits]
    agreement = METRICS["agreement"].text(last.get("test/agreement"))
    table.add_row("student", student.name, f"{student.parameters:,}", *figures, agreement)
    return table


def _heads(splits: Sequence[str], task: Task) -> list[str]:
    """Of columns of the task's figure, named where its numbers do not say themselves what they are."""
    return [split if task.primary.unit == "%" else f"{split} {task.primary.name}" for split in splits]


def _stages(stages: Sequence[StageResult], task: Task) -> Table:
    splits = [split for split in SPLITS if any(task.on(split) in stage.metrics for stage in stages)]
    table = Table("stage", "teacher", "student", *_heads(splits, task), box=None, header_style="bold", pad_edge=False)
    for stage in stages:
        figures = [task.primary.text(stage.metrics.get(task.on(split))) for split in splits]
        table.add_row(stage.name, stage.teacher or "-", stage.student, *figures)
    return table


def _figures(figures: Mapping[str, float | None], task: Task) -> Table:
    """The primary metric, its sets side by side, then single numbers; the task's other metrics are in result.json."""
    primary: dict[str, dict[str, float | None]] = {}
    single: dict[str, float | None] = {}
    for key, value in figures.items():
        place, _, measure = key.rpartition("/")
        name, _, split = place.rpartition("/")
        if measure == task.primary.name:
            primary.setdefault(name, {})[split] = value
        elif metric_of(measure) not in task.metrics:
            single[key] = value
    splits = [split for split in SPLITS if any(split in row for row in primary.values())]
    table = Table("figure", *(splits or [""]), box=None, header_style="bold", pad_edge=False)
    for name, row in primary.items():
        table.add_row(name, *(task.primary.text(row.get(split)) for split in splits))
    for name, value in single.items():
        table.add_row(name, _plain(value))
    return table


def _rows(name: str, rows: Sequence[Mapping[str, object]]) -> Table:
    """A procedure's own table; beyond 20 rows it is in result.json."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(name, *keys, box=None, header_style="bold", pad_edge=False)
    for number, row in enumerate(rows[:20], start=1):
        table.add_row(str(number), *(_plain(row.get(key)) for key in keys))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def _outputs(result: RunResult, folder: Path) -> Path | None:
    """The outputs folder that a run lies in, so that what is printed can be typed; None for a run by itself."""
    own = result.config.get("paths.outputs")
    if isinstance(own, str) and Path(own).resolve() in folder.resolve().parents:
        return Path(own)
    return next((parent for parent in folder.parents if parent.name == "outputs"), None)
