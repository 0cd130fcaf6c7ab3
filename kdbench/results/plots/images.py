"""Plots of the kept predictions: calibration, differences by class, and where student and teacher part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from kdbench.errors import UserError, printable
from kdbench.files import read_object
from kdbench.results.plots.plot import Axis, Cells, Plot, Series, linear
from kdbench.results.predictions import LEVELS, Array, Predictions, read_predictions, right
from kdbench.results.read import Run
from kdbench.results.render import setting
from kdbench.results.rows import Row
from kdbench.results.statistics import interval
from kdbench.results.verdicts import Versus

BINS = 15  # Guo et al. 2017
MOST_CLASSES = 16  # that a plot has room for
_SHARES = [(n / 5, f"{20 * n}") for n in range(6)]


def reliability(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[Plot]:
    """Accuracy of the answers against their confidence, in 15 equal bins over all seeds (Guo et al. 2017)."""
    series = []
    for colour, row in enumerate(rows):
        kept = _kept(row)
        if not kept:
            continue
        level = np.concatenate([one.confidence for one in kept]).astype(np.int64)
        hit = np.concatenate([one.answer == one.label for one in kept])
        slot = (level - 1).clip(0) // (LEVELS // BINS)
        count = np.bincount(slot, minlength=BINS)[:BINS]
        filled = count > 0
        x = (np.bincount(slot, (level - 0.5) / LEVELS, BINS)[:BINS][filled] / count[filled]).tolist()
        y = (np.bincount(slot, hit, BINS)[:BINS][filled] / count[filled]).tolist()
        series.append(Series(setting(row, columns), x, y, kind="marked", colour=colour))
    if series:
        axis = Axis("confidence, %", 0.0, 1.0, ticks=_SHARES)
        ideal = Series("as often right as it says", [0.0, 1.0], [0.0, 1.0], colour=-1)
        note = "Below the dotted line a student is surer than it is right. Bins with few images scatter."
        plot = Plot("reliability", "Reliability", note, axis, axis._replace(title="accuracy, %"), [*series, ideal])
        yield plot


def classes(versus: Sequence[Versus], columns: Sequence[str]) -> Iterator[Plot]:
    """The difference of accuracy in each class, with its interval over the class's images, of up to three settings."""
    found = []
    for one in versus:
        try:
            ours, theirs = right(one.row.runs), right(one.baseline.runs)
        except UserError:
            continue
        if ours and theirs and np.array_equal(ours.label, theirs.label):
            found.append((one, ours.label, ours.share - theirs.share))
        if len(found) == 3:
            break
    if not found:
        return
    label, gaps = found[0][1], found[0][2]
    there = sorted({int(value) for value in np.unique(label) if value >= 0})
    size = {one: abs(float(gaps[label == one].mean())) for one in there}
    shown = sorted(sorted(there, key=lambda one: -size[one])[:MOST_CLASSES])
    names = _names(found[0][0].row.runs[0], there)
    series = [
        _by_class(f"{setting(one.row, columns)} less {setting(one.baseline, columns)}", labels, gap, shown, i)
        for i, (one, labels, gap) in enumerate(found)
        if np.array_equal(labels, label)
    ]
    series.append(Series("", [0.0, 0.0], [-1.0, len(shown)], colour=-1))
    x = linear(
        "difference, %-points",
        [value for one in series[:-1] for value in (*(one.low or ()), *(one.high or ()), *one.x)],
    )
    y = Axis("", -0.7, len(shown) - 0.3, ticks=[(float(i), names[one]) for i, one in enumerate(reversed(shown))])
    note = "95 % intervals over the images of a class, not widened for their number."
    note += f" The {len(shown)} of {len(there)} classes that differ most." if len(shown) < len(there) else ""
    yield Plot("classes", "Differences by class", note, x, y, series)


def _by_class(name: str, label: Array, gaps: Array, shown: Sequence[int], number: int) -> Series:
    x, low, high = [], [], []
    for one in shown:
        own = 100 * gaps[label == one]
        ends = interval(own.tolist()) or (math.nan, math.nan)
        x.append(float(own.mean()) if len(own) else math.nan)
        low.append(ends[0])
        high.append(ends[1])
    places = [len(shown) - 1 - i - 0.22 * number for i in range(len(shown))]
    return Series(name, x, places, low, high, "across", number)


def confusion(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[Plot]:
    """What the student of the first setting with a teacher answers where the teacher answers what, over all seeds."""
    for row in rows:
        kept = [one for one in _kept(row) if one.teacher is not None]
        if not kept:
            continue
        teacher = np.concatenate([one.teacher for one in kept if one.teacher is not None]).astype(np.int64)
        student = np.concatenate([one.answer for one in kept]).astype(np.int64)
        known = (teacher >= 0) & (student >= 0)
        teacher, student = teacher[known], student[known]
        number = int(max(teacher.max(initial=0), student.max(initial=0))) + 1
        apart = np.bincount(teacher[teacher != student], minlength=number) + np.bincount(
            student[teacher != student], minlength=number
        )
        shown = np.sort(np.argsort(-apart, kind="stable")[:MOST_CLASSES])
        table = [[_share(student[teacher == one] == other) for other in shown] for one in shown]
        names = _names(row.runs[0], range(number))
        words = [names[int(one)] for one in shown]
        note = f"{setting(row, columns)}: a row is what the teacher answers, a column the student; darker is more."
        note += f" The {len(shown)} of {number} classes on which they part most." if len(shown) < number else ""
        axes = (Axis("student", 0, 1), Axis("teacher", 0, 1))
        yield Plot("confusion", "Teacher and student", note, *axes, cells=Cells(words, words, table))
        return


def _share(found: Array) -> float:
    return float(found.mean()) if len(found) else 0.0


def _kept(row: Row) -> list[Predictions]:
    """The predictions of a setting's runs that can be read."""
    found = []
    for run in row.runs:
        try:
            one = read_predictions(run.folder)
        except UserError:  # the verdicts name it
            continue
        found += [one] if one is not None else []
    return found


def _names(run: Run, numbers: Sequence[int] | range) -> dict[int, str]:
    """The names of classes, from the run's network.json; their numbers where it has none."""
    try:
        names = read_object(run.folder / "network.json").get("classes")
    except UserError:
        names = None
    known = names if isinstance(names, list) else []
    return {n: printable(str(known[n])) if n < len(known) else str(n) for n in numbers}
