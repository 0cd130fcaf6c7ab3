"""Verdicts on the settings of a comparison: each against a baseline, or every pair of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from kdbench.errors import UserError
from kdbench.results.metrics import CLASSIFICATION, Metric, metric_of
from kdbench.results.predictions import Array, Right, right
from kdbench.results.read import Run
from kdbench.results.rows import Row
from kdbench.results.statistics import (
    FEWEST,
    MARGIN,
    Difference,
    Judged,
    Pool,
    all_pairs,
    correlation,
    difference,
    image_variance,
    judge,
    mcnemar,
    on_images,
    pool,
    pooled_difference,
)

Seed = tuple[object, object]  # of the initial weights, and of the order of the images


class Versus(NamedTuple):
    """A setting against a baseline."""

    row: Row
    baseline: Row
    judged: Judged  # the methods on this test set: over seeds
    images: Judged | None = None  # the methods on such images: over seeds and images; None without kept predictions
    networks: float | None = None  # of single runs: McNemar's mid-p of these two networks on such images


class Verdicts(NamedTuple):
    metric: str
    versus: list[Versus]
    comparisons: int  # that Holm counts
    correlation: float | None = None  # of two settings' runs with the same seed; None where the seeds differ
    problems: list[str] = []  # predictions that cannot be read
    pool: Pool | None = None  # the variance that was asked for of all settings together, whether or not it holds

    @property
    def kind(self) -> Metric:
        """What the metric measures in these runs."""
        return metric_of(self.metric, self.versus[0].row.task) if self.versus else metric_of(self.metric)


class Rule(NamedTuple):
    """How a table's differences are judged."""

    margin: float | None = None  # a difference below it matters to nobody, in the figures' own numbers; None: default
    pooled: bool = False  # with one variance for all settings, where they vary alike


_PLAIN = Rule()


def against(rows: Sequence[Row], baseline: Row, metric: str, rule: Rule = _PLAIN) -> Verdicts:
    """Every other setting against one that was named beforehand."""
    others = [row for row in rows if row is not baseline]
    return _verdicts([*others, baseline], [(i, len(others)) for i in range(len(others))], metric, rule)


def every_pair(rows: Sequence[Row], metric: str, rule: Rule = _PLAIN) -> Verdicts:
    return _verdicts(rows, [(b, a) for a, b in combinations(range(len(rows)), 2)], metric, rule)


def best_against_others(rows: Sequence[Row], metric: str, rule: Rule = _PLAIN) -> Verdicts:
    """Every setting against the best of those with runs enough for a verdict (of all, where none has). It was chosen by
    looking, so Holm counts every pair."""
    known = [row for row in rows if _mean(row, metric) is not None]
    if len(known) < 2:
        return Verdicts(metric, [], 0)
    better = metric_of(metric, known[0].task).better
    enough = [row for row in known if len(by_seed(row, metric)) >= FEWEST]
    best = max(enough or known, key=lambda row: better * (_mean(row, metric) or 0.0))
    others = [row for row in known if row is not best]
    return _verdicts([best, *others], [(i, 0) for i in range(1, len(known))], metric, rule, looked=True)


def _verdicts(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], metric: str, rule: Rule, looked: bool = False
) -> Verdicts:
    """Of pairs of rows, by their places. `looked`: they were chosen by looking at every pair that there is."""
    task = rows[0].task if rows else CLASSIFICATION
    kind = metric_of(metric, task)
    figures, steps = [by_seed(row, metric) for row in rows], [_step(row, metric) for row in rows]
    pooled = pool(figures, steps) if rule.pooled else None
    shared = pooled if pooled and pooled.holds else None
    found = [_difference(figures, steps, shared, a, b) for a, b in pairs]
    # What matters of other metrics is not known here.
    margin = rule.margin if rule.margin is not None else MARGIN if kind.unit == "%" else 0.0
    # Predictions say which images are right: of other figures they know nothing.
    rated = task is CLASSIFICATION and metric in ("last", task.on("test"))
    kept, problems = _right_by_image(rows) if rated else ([None] * len(rows), [])
    gaps = [_gaps(kept[a], kept[b]) for a, b in pairs]
    on_them = [one if gap is None else on_images(one, gap) for one, gap in zip(found, gaps)]
    untold, untold_images = _untold(figures, steps, kept, pairs, shared) if looked else ((), ())
    judged = judge(found, kind.better, margin, untold)
    wider = judge(on_them, kind.better, margin, untold_images)
    told = []
    for (a, b), one, gap, on in zip(pairs, judged, gaps, wider, strict=True):
        seen = gap is not None and one.difference.n >= FEWEST
        told.append(Versus(rows[a], rows[b], one, on if seen else None, _networks(rows[a], rows[b], gap)))
    count = len(rows) * (len(rows) - 1) // 2 if looked else len(pairs)
    return Verdicts(metric, told, count, _shared(figures), problems, pooled)


def _difference(
    figures: Sequence[Mapping[Any, float]], steps: Sequence[float], shared: Pool | None, a: int, b: int
) -> Difference:
    one = difference(figures[a], figures[b], steps[a])
    if shared is None:
        return one
    runs = len(figures[a]), len(figures[b])
    return pooled_difference(one, shared.variance[a], shared.variance[b], shared, runs)


def _untold(
    figures: Sequence[Mapping[Any, float]], steps: Sequence[float], kept: Sequence[Right | None],
    told: Sequence[tuple[int, int]], shared: Pool | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Raw p values of all the other pairs of a table: over seeds, and over seeds and images."""
    pairs = all_pairs(figures, steps)
    if shared is not None:
        own = shared.variance / np.array([max(len(one), 1) for one in figures])
        variance, freedom = own[pairs.first] + own[pairs.second], np.full(len(pairs.mean), shared.freedom)
        pairs = pairs._replace(variance=variance, freedom=freedom)
    known = np.zeros((len(figures), len(figures)), bool)
    for a, b in told:
        known[a, b] = known[b, a] = True
    rest = ~known[pairs.first, pairs.second]
    added = np.zeros_like(known, dtype=float)
    for label in {one.label.tobytes() for one in kept if one is not None}:  # settings on one test set
        alike = [one if one is not None and one.label.tobytes() == label else None for one in kept]
        added += image_variance([None if one is None else one.share for one in alike])
    return pairs.p()[rest], pairs.p(added)[rest]


def _right_by_image(rows: Sequence[Row]) -> tuple[list[Right | None], list[str]]:
    """What each setting has right, image by image, where all of its runs keep that; and what cannot be read."""
    found: list[Right | None] = []
    problems = []
    for row in rows:
        try:
            found.append(right(row.runs))
        except UserError as error:
            problems.append(str(error))
            found.append(None)
    return found, problems


def _gaps(ours: Right | None, theirs: Right | None) -> Array | None:
    """[N]: each test image's difference; None if one of them is not known, or of another test set."""
    if ours is None or theirs is None or not np.array_equal(ours.label, theirs.label):
        return None
    gaps: Array = ours.share - theirs.share
    return gaps


def _networks(row: Row, baseline: Row, gaps: Array | None) -> float | None:
    if gaps is None or len(row.runs) != 1 or len(baseline.runs) != 1:
        return None
    return mcnemar(int((gaps > 0).sum()), int((gaps < 0).sum()))


def _shared(figures: Sequence[Mapping[tuple[Seed, int], float]]) -> float | None:
    """Of the settings that have the first one's seeds."""
    same = [by for by in figures if figures[0].keys() == by.keys()]
    return correlation([[by[seed] for seed in figures[0]] for by in same]) if len(same) > 1 else None


def _step(row: Row, metric: str) -> float:
    """How finely a share can be told: one image of its set; 0 where that is not known."""
    split = "val" if "val/" in metric else "train" if "train/" in metric else "test"
    images = row.runs[0].result.images.get(split, 0)
    return 1 / images if images and metric_of(metric, row.task).unit == "%" else 0.0


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
