"""Verdicts on the settings of a comparison: each against a baseline, or every pair of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from kdbench.results.metrics import metric_of
from kdbench.results.read import Run
from kdbench.results.rows import Row
from kdbench.results.statistics import MARGIN, Judged, difference, judge


class Versus(NamedTuple):
    """A setting against a baseline."""

    row: Row
    baseline: Row
    judged: Judged


class Verdicts(NamedTuple):
    metric: str
    versus: list[Versus]
    comparisons: int  # that Holm counts


def against(rows: Sequence[Row], baseline: Row, metric: str) -> Verdicts:
    """Every other setting against one that was named beforehand."""
    return _verdicts([(row, baseline) for row in rows if row is not baseline], metric)


def every_pair(rows: Sequence[Row], metric: str) -> Verdicts:
    return _verdicts([(row, baseline) for baseline, row in combinations(rows, 2)], metric)


def best_against_others(rows: Sequence[Row], metric: str) -> Verdicts:
    """Every setting against the best of them. The best was chosen by looking, so Holm counts every pair."""
    known = [row for row in rows if _mean(row, metric) is not None]
    if len(known) < 2:
        return Verdicts(metric, [], 0)
    best = max(known, key=lambda row: metric_of(metric).better * (_mean(row, metric) or 0.0))
    pairs = every_pair([best, *(row for row in known if row is not best)], metric)
    return pairs._replace(versus=[one for one in pairs.versus if one.baseline is best])


def _verdicts(pairs: Sequence[tuple[Row, Row]], metric: str) -> Verdicts:
    kind = metric_of(metric)
    figures = {id(row): by_seed(row, metric) for pair in pairs for row in pair}
    found = [difference(figures[id(a)], figures[id(b)], _step(a, metric)) for a, b in pairs]
    margin = MARGIN if kind.unit == "%" else 0.0  # what matters of other metrics is not known here
    judged = judge(found, kind.better, margin)
    return Verdicts(metric, [Versus(*pair, one) for pair, one in zip(pairs, judged, strict=True)], len(pairs))


Seed = tuple[object, object]  # of the initial weights, and of the order of the images


def _step(row: Row, metric: str) -> float:
    """How finely a share can be told: one image of its set; 0 where that is not known."""
    split = "val" if "val/" in metric else "train" if "train/" in metric else "test"
    images = row.runs[0].result.images.get(split, 0)
    return 1 / images if images and metric_of(metric).unit == "%" else 0.0


def by_seed(row: Row, metric: str) -> dict[tuple[Seed, int], float]:
    """A setting's figures by what its runs' seeds are; a seed that is there twice is numbered."""
    found: dict[tuple[Seed, int], float] = {}
    times: Counter[Seed] = Counter()
    for run in row.runs:
        value = run.result.figure(metric)
        if value is not None:
            seed = _seed(run)
            found[seed, times[seed]] = value
            times[seed] += 1
    return found


def _seed(run: Run) -> Seed:
    """What two settings' runs may share."""
    config = run.result.config
    alone = config.get("seed", run.result.seed)
    return config.get("seeds.init", alone), config.get("seeds.data", alone)


def _mean(row: Row, metric: str) -> float | None:
    figure = row.metrics.get(metric)
    return figure.mean if figure else None
