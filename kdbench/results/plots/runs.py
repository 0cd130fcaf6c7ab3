"""Plots of runs: learning curves, accuracy against what was swept and what it cost, PTLoss' candidates."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from kdbench.errors import UserError, printable
from kdbench.files import read_object
from kdbench.results.metrics import Metric, metric_of
from kdbench.results.plots.plot import MOST_SERIES, Plot, Series, decades, linear, logarithmic
from kdbench.results.read import Run
from kdbench.results.render import metric_title, setting
from kdbench.results.rows import Comparison, Row
from kdbench.results.statistics import interval

MOST_POINTS = 200  # of a curve
NAN = math.nan


def curves(rows: Sequence[Row], columns: Sequence[str], metric: str) -> Iterator[Plot]:
    """The metric and the training loss after every epoch, mean and sample standard deviation over seeds."""
    if not rows:
        return
    logs = [[_log(run.folder) for run in row.runs] for row in rows]
    named = rows[0].task.on("test") if metric in ("last", "best") else metric
    for name in dict.fromkeys((named.removeprefix("best/"), "train/loss")):
        kind = metric_of(name, rows[0].task)
        series = [
            one._replace(colour=i)
            for i, (row, log) in enumerate(zip(rows, logs, strict=True))
            if (one := _curve(setting(row, columns), log, name, kind)).x
        ]
        if not series:
            continue
        drawn = [value for one in series for value in (*one.y, *(one.low or ()), *(one.high or ()))]
        y = linear(_unit(name, kind), [*filter(math.isfinite, drawn)])
        x = linear("epoch", [value for one in series for value in one.x])
        note = "Mean over seeds; the band is a sample standard deviation to both sides."
        if name == "train/loss" and len({run.result.formula for row in rows for run in row.runs}) > 1:
            note += " The losses have different formulas, so their heights say nothing of each other."
        yield Plot(f"curves-{_file(name)}", f"{name} over epochs", note, x, y, series)


def _curve(title: str, logs: Sequence[Mapping[int, Mapping[str, object]]], name: str, kind: Metric) -> Series:
    epochs = sorted({epoch for log in logs for epoch, values in log.items() if _number(values.get(name))})
    epochs = epochs[:: -(-len(epochs) // MOST_POINTS) or 1]
    y, spread = [], []
    for epoch in epochs:
        found = [kind.scale * value for log in logs if _number(value := log.get(epoch, {}).get(name))]
        y.append(statistics.fmean(found))
        spread.append(statistics.stdev(found) if len(found) > 1 else NAN)
    low, high = ([a + sign * b for a, b in zip(y, spread)] for sign in (-1, 1))
    return Series(title, epochs, y, low, high)


def _log(folder: Path) -> dict[int, dict[str, object]]:
    """The rows of a metrics.jsonl by epoch; damaged ones are left out."""
    found = {}
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
            found[int(row["epoch"])] = row
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            continue
    return found


def sweeps(comparison: Comparison, metric: str) -> Iterator[Plot]:
    """The metric against every key with three numbers or more, a line for each combination of the other keys."""
    kind, named = comparison.metric(metric), metric_title(metric, comparison)
    for key in comparison.columns:
        lines: dict[str, list[tuple[float, Row]]] = {}
        for row in comparison.rows:
            value: Any = row.differs.get(key)
            if _number(value) and not math.isnan(float(value)) and row.metrics[metric].mean is not None:
                others = [column for column in comparison.columns if column != key]
                lines.setdefault(setting(row, others), []).append((float(value), row))
        values = [value for line in lines.values() for value, _ in line]
        if len(set(values)) < 3:
            continue
        chosen = sorted(lines.items(), key=lambda item: -len(item[1]))[:MOST_SERIES]
        series = [_swept(name, line, metric, kind)._replace(colour=i) for i, (name, line) in enumerate(chosen)]
        if len(series) == 1:
            series = [series[0]._replace(name="")]
        inside = [value for value in values if 0 < value < math.inf]
        logs = min(values) >= 0 and bool(inside) and (math.inf in values or max(inside) >= 8 * min(inside))
        drawn = [value for one in series for value in (*one.y, *(one.low or ()), *(one.high or ()))]
        y = linear(_unit(named, kind), drawn)
        note = "Means; the bars are 95 % intervals over seeds."
        note += f" {len(chosen)} of {len(lines)} combinations of the other keys." if len(lines) > len(chosen) else ""
        x = logarithmic(key, values) if logs else linear(key, values)
        yield Plot(f"sweep-{_file(key)}", f"{named} against {key}", note, x, y, series)


def _swept(name: str, line: Sequence[tuple[float, Row]], metric: str, kind: Metric) -> Series:
    points = sorted(line, key=lambda point: point[0])
    y, low, high = [], [], []
    for _, row in points:
        figures = [value for run in row.runs if (value := run.result.figure(metric)) is not None]
        ends = interval(figures) or (NAN, NAN)
        y.append(kind.scale * statistics.fmean(figures))
        low.append(kind.scale * ends[0])
        high.append(kind.scale * ends[1])
    return Series(name, [value for value, _ in points], y, low, high, "marked")


def costs(comparison: Comparison, chosen: Sequence[Row], metric: str) -> Iterator[Plot]:
    """The metric against parameters, FLOPs and latency where they are known, and what training took."""
    kind, named = comparison.metric(metric), metric_title(metric, comparison)
    columns = comparison.columns
    known = [row for row in comparison.rows if row.metrics[metric].mean is not None]
    for name, title, of in (
        ("parameters", "parameters of the student", lambda run: run.result.student.parameters),
        ("flops", "FLOPs of the student", lambda run: run.result.figure("cost/flops")),
        ("latency", "seconds an input takes the student", lambda run: run.cost("latency")),
        ("seconds", "seconds of training", lambda run: run.result.seconds),
        ("energy", "joules of training", lambda run: run.result.figure("cost/energy")),
    ):
        at = {id(row): cost for row in known if (cost := _mean(row.runs, of)) is not None and cost > 0}
        if len(set(at.values())) < 2:
            continue
        points = [(at[id(row)], kind.scale * (row.metrics[metric].mean or 0.0), row) for row in known if id(row) in at]
        rest = [(x, y) for x, y, row in points if row not in chosen]
        series = [Series("", [x for x, _ in rest], [y for _, y in rest], kind="points", colour=-1)] if rest else []
        for i, row in enumerate(chosen):
            one = [(x, y) for x, y, other in points if other is row]
            if one:
                series.append(Series(setting(row, columns), [one[0][0]], [one[0][1]], kind="points", colour=i))
        note = "A point for each setting, means over seeds" + ("; those without a name are gray." if rest else ".")
        y = linear(_unit(named, kind), [y for _, y, _ in points])
        x = decades(title, [x for x, _, _ in points])
        yield Plot(f"cost-{name}", f"{named} against {title}", note, x, y, series)


def candidates(rows: Sequence[Row], columns: Sequence[str]) -> Iterator[Plot]:
    """What PTLoss' search compared, of the first run that has its epsilon.json."""
    pairs = [(row, run) for row in rows for run in row.runs]
    for row, run in pairs:
        if not (run.folder / "epsilon.json").exists():
            continue
        try:
            record = read_object(run.folder / "epsilon.json")
        except UserError:
            continue
        table = record.get("candidates")
        found = [one for one in table if _candidate(one)] if isinstance(table, list) else []
        if len(found) < 2:
            continue
        families: dict[str, list[Any]] = {}
        for one in found:  # "r/m M=3 r=2.5": the same but for its size
            families.setdefault(re.sub(r" r=\S+$", "", one["origin"]), []).append(one)
        named = list(families.items())[: MOST_SERIES - 1]
        rest = [one for family in list(families.values())[MOST_SERIES - 1 :] for one in family]
        series = [Series("", *_scores(rest), kind="points", colour=-1)] if rest else []
        for i, (name, family) in enumerate(named):
            series.append(Series(printable(name), *_scores(family), kind="points", colour=i))
        chosen = min(found, key=lambda one: one["rank"])
        series.append(Series("chosen", *_scores([chosen]), kind="points", colour=MOST_SERIES - 1))
        criterion = printable(str(record.get("criterion", "score")))
        note = (
            f"{len(found)} candidates of {setting(row, columns)}, seed {run.result.seed}; less is better on both axes"
            + ("; those without a name are gray." if rest else ".")
        )
        x = linear(f"{criterion} where they are compared", [one["choose"] for one in found])
        y = linear("on the held-out half", [one["held_out"] for one in found])
        yield Plot("epsilon", "PTLoss' candidates for epsilon", note, x, y, series)
        return


def _candidate(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and all(_number(one.get(key)) and math.isfinite(one[key]) for key in ("choose", "held_out", "rank"))
        and isinstance(one.get("origin"), str)
    )


def _scores(found: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [one["choose"] for one in found], [one["held_out"] for one in found]


def _mean(runs: Sequence[Run], of: Callable[[Run], Any]) -> float | None:
    found = [value for run in runs if _number(value := of(run)) and math.isfinite(value)]
    return statistics.fmean(found) if found else None


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _unit(name: str, kind: Metric) -> str:
    return f"{name}, {kind.unit}" if kind.unit else name


def _file(name: str) -> str:
    """A name as part of a file's: letters, digits, and - for the rest."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)[:60]
