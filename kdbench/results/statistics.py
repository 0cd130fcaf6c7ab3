"""Statistics of a handful of runs: an interval for the difference of two settings, and what may be said of it.

t intervals, paired where the seeds match. A percentile bootstrap over three seeds calls one in five comparisons of a
setting with itself BETTER, two deviations that do not overlap one in thirteen; these do so in at most one of twenty.
Only scipy.special is loaded: scipy.stats takes longer than reading a thousand runs.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import bdtr, chdtrc, chdtri, nctdtr, stdtr, stdtrit

LEVEL = 0.05  # of all of a table's comparisons together
MARGIN = 0.005  # a difference below it matters to nobody: half a point
FEWEST = 3  # runs a side, or pairs, below which nothing is said
POWER = 0.8  # with which the runs that would do show a difference of the size that was seen
ALIKE = 0.1  # of Bartlett's test, below which settings' variances are not pooled

Floats = np.ndarray[Any, np.dtype[Any]]
Verdict = Literal["BETTER", "WORSE", "NO DIFFERENCE SHOWN", "CANNOT BE TOLD", "TOO FEW RUNS"]


class Difference(NamedTuple):
    """One setting less another."""

    mean: float | None  # None: a side has no figure
    low: float | None  # of the interval at 1 - LEVEL, of this comparison alone; None below two runs a side
    high: float | None
    p: float | None  # two-sided; raw
    n: int  # pairs, or runs of the smaller side
    paired: bool
    error: float | None = None  # the standard error of the mean difference
    freedom: float = 0.0  # degrees of freedom
    wins: float | None = None  # share of the pairs (of all pairs, if unpaired) in which it has the larger figure
    fixed: float = 0.0  # the part of `error` that more seeds do not make smaller: the test set's


class Judged(NamedTuple):
    """A difference beside the others of its table."""

    difference: Difference
    p: float | None  # after Holm
    low: float | None  # at the level that Holm tested it at
    high: float | None
    verdict: Verdict
    runs: int | None  # a side that would show a difference of this size; None where that says nothing


def difference(ours: Mapping[Any, float], theirs: Mapping[Any, float], step: float = 0.0) -> Difference:
    """Two settings' figures by seed. Paired if both have the same seeds: they share initial weights and order.

    Student's interval of the pairs' differences, or Welch's for unequal variances (Welch 1947). `step` is that of the
    figures (one image of the test set): rounding to it has the variance step^2 / 12 (of a difference twice that), and
    figures that coincide by it, three seeds that each gain one image, do not count as having none.
    """
    paired = ours.keys() == theirs.keys()
    if not ours or not theirs:
        return Difference(None, None, None, None, 0, paired)
    if paired:
        gaps = [ours[seed] - theirs[seed] for seed in ours]
        spread, freedom = max(_variance_of_mean(gaps), step * step / 6 / len(gaps)), float(len(gaps) - 1)
    else:
        gaps = [one - other for one in ours.values() for other in theirs.values()]
        values = [list(side.values()) for side in (ours, theirs)]
        sides = [(max(_variance_of_mean(v), step * step / 12 / len(v)), len(v) - 1) for v in values]
        spread, freedom = sum(v for v, _ in sides), _welch_freedom(sides)
    mean = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    wins = (sum(gap > 0 for gap in gaps) + 0.5 * sum(gap == 0 for gap in gaps)) / len(gaps)
    n = min(len(ours), len(theirs))
    if n < 2:
        return Difference(mean, None, None, None, n, paired, wins=wins)
    error = math.sqrt(spread)
    low, high = _interval(mean, error, freedom, LEVEL)
    return Difference(mean, low, high, _p_value(mean, error, freedom), n, paired, error, freedom, wins)


def on_images(one: Difference, gaps: Sequence[float] | np.ndarray[Any, Any]) -> Difference:
    """A difference over seeds as one of the methods on such images, of which the test set is a sample.

    `gaps` [N]: each test image's difference, averaged over the seeds. The variance of the mean over images is added to
    that over seeds, whose degrees of freedom stay, so that what is said of all such images is never surer than what is
    said of these. That, and what is left between seed and image and is in both, make the interval a little too wide.
    """
    if one.mean is None or one.error is None or len(gaps) < 2:
        return one
    fixed = float(np.var(gaps, ddof=1)) / len(gaps)
    error = math.sqrt(one.error**2 + fixed)
    low, high = _interval(one.mean, error, one.freedom, LEVEL)
    p = _p_value(one.mean, error, one.freedom)
    return one._replace(low=low, high=high, p=p, error=error, fixed=math.sqrt(fixed))


def correlation(settings: Sequence[Sequence[float]]) -> float | None:
    """How much the runs of one seed have in common: the mean covariance of two settings' figures over their mean
    variance. settings: figures in the order of their seeds. None for fewer than two settings or seeds, or no variance.
    """
    if len(settings) < 2 or len(settings[0]) < 2:
        return None
    table = np.cov(np.asarray(settings, dtype=np.float64))
    own, count = float(np.trace(table)), len(settings)
    return float((table.sum() - own) / (count - 1) / own) if own > 0 else None


class Pairs(NamedTuple):
    """Every pair of a table's settings that has two runs a side, as `difference` has one; arrays [P]."""

    first: Floats  # places of the two settings, first < second
    second: Floats
    mean: Floats  # of the second less the first
    variance: Floats  # of that mean
    freedom: Floats

    def p(self, images: Floats | None = None) -> Floats:
        """Raw two-sided p values. images [S, S]: what a test set adds to the variance of a pair (`image_variance`)."""
        variance = self.variance if images is None else self.variance + images[self.first, self.second]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.abs(self.mean) / np.sqrt(variance)
        found: Floats = 2 * stdtr(self.freedom, -np.where(np.isnan(t), 0.0, t))  # 0 / 0: no difference at all
        return found


def all_pairs(settings: Sequence[Mapping[Any, float]], steps: Sequence[float]) -> Pairs:
    """All pairs at once: 20,000 of them in 10 ms. settings: figures by seed; steps: of each setting's figures."""
    n = np.array([len(one) for one in settings])
    enough = np.flatnonzero(n >= 2)
    a, b = (enough[side] for side in np.triu_indices(len(enough), 1))
    means = np.array([statistics.fmean(one.values()) if one else 0.0 for one in settings])
    own = np.array([np.var(list(one.values()), ddof=1) / len(one) if len(one) > 1 else 0.0 for one in settings])
    squared = np.square(steps)
    sides = np.maximum(own, squared / 12 / np.maximum(n, 1))
    variance, freedom = sides[a] + sides[b], np.zeros(len(a))
    below = sides**2 / np.maximum(n - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(below[a] + below[b] > 0, variance**2 / (below[a] + below[b]), n[a] + n[b] - 2.0)
    by_seeds: dict[frozenset[Any], list[int]] = {}
    for place in enough.tolist():
        by_seeds.setdefault(frozenset(settings[place]), []).append(place)
    for seeds, places in by_seeds.items():
        table = np.zeros((len(settings), len(seeds)))
        table[places] = [[settings[place][seed] for seed in seeds] for place in places]
        among = np.zeros(len(settings), bool)
        among[places] = True
        pairs = np.flatnonzero(among[a] & among[b])
        gaps = np.var(table[b[pairs]] - table[a[pairs]], axis=1, ddof=1)
        variance[pairs] = np.maximum(gaps, squared[b[pairs]] / 6) / len(seeds)
        freedom[pairs] = len(seeds) - 1
    return Pairs(a, b, means[b] - means[a], variance, freedom)


class Pool(NamedTuple):
    """A variance that settings share, estimated from all of their runs."""

    variance: Floats  # [S] of a run of each setting: the shared one, or its own where that is larger
    freedom: float
    alike: float  # p of Bartlett's test (1937) that the settings have one variance

    @property
    def holds(self) -> bool:
        return self.alike >= ALIKE


def pool(settings: Sequence[Mapping[Any, float]], steps: Sequence[float]) -> Pool | None:
    """The variance of all settings' runs together, as Dunnett (1955) compares with a control; None without freedom.

    settings: figures by seed; steps: of each setting's figures (see `difference`). Where all have the same seeds, what
    a seed adds to every setting is taken off first (blocks). Three runs of four settings have 6 degrees of freedom
    instead of a pair's 2, and intervals less than half as wide. The assumption is that all settings vary alike. Without
    a guard a steady one under an unsteady baseline is told from it by chance in up to half of the tables; hence
    Bartlett's test, and no setting counts as steadier than its own runs are. Simulated with 3 to 63 settings of 3 or 5
    runs, a wrong verdict of either sign stands in at most 5 % of the tables if all vary alike (6 % with deviations of
    a lognormal spread of 0.5), and in up to 9 % if one setting's or the baseline's deviation is many times the others'.
    Holm takes the place of Dunnett's quantiles, as for all tables; those make intervals up to 10 % narrower. Variances
    that are drawn towards a common one only as far as all of them say (empirical Bayes, Smyth 2004) are no way out
    where settings vary unlike: with deviations of a lognormal spread of 0.5 a wrong verdict stands in 8 to 11 % of the
    tables (5 to 62 settings of 3 or 5 runs, 1,500 simulated tables each), in 6 to 7 % with the guard above.
    """
    counts = np.array([len(one) for one in settings])
    squares = np.array([np.var(list(one.values())) * len(one) if one else 0.0 for one in settings])
    freedom = np.maximum(counts - 1.0, 0.0)
    if not freedom.any():
        return None
    own, shared, alike = _variances(squares, freedom, steps)
    if len(settings) > 1 and all(one.keys() == settings[0].keys() for one in settings):
        table = np.array([[one[seed] for seed in settings[0]] for one in settings])
        left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        squares, freedom = (left**2).sum(1), (counts - 1) * (len(settings) - 1) / len(settings)
        own, shared, within = _variances(squares, freedom, steps)
        alike = min(2 * alike, 2 * within, 1.0)  # one wild setting moves all settings' blocks: hence both tests
    return Pool(np.maximum(own, shared), float(freedom.sum()), alike)


def _variances(squares: Floats, freedom: Floats, steps: Sequence[float]) -> tuple[Floats, float, float]:
    """Each setting's variance, that of all together, and Bartlett's p that all are one."""
    known = freedom > 0
    own = np.divide(squares, freedom, out=np.zeros(len(squares)), where=known)
    own = np.maximum(own, np.square(steps) / 12)
    shared = float((own * freedom).sum() / freedom.sum())
    return own, shared, _bartlett(own[known], freedom[known], shared)


def _bartlett(variances: Floats, freedom: Floats, shared: float) -> float:
    """p that all variances are one."""
    count, whole = len(variances), float(freedom.sum())
    if count < 2 or not (variances > 0).all():
        return 1.0 if count < 2 or not shared else 0.0
    excess = whole * math.log(shared) - float((freedom * np.log(variances)).sum())
    scale = 1 + (float((1 / freedom).sum()) - 1 / whole) / 3 / (count - 1)
    return float(chdtrc(count - 1, excess / scale))


def pooled_difference(one: Difference, ours: float, theirs: float, pooled: Pool, runs: tuple[int, int]) -> Difference:
    """A difference with the settings' pooled variances (of a run of each) in place of its own runs' alone."""
    if one.mean is None or min(runs) < 1:
        return one
    error = math.sqrt(ours / runs[0] + theirs / runs[1])
    low, high = _interval(one.mean, error, pooled.freedom, LEVEL)
    p = _p_value(one.mean, error, pooled.freedom)
    return one._replace(low=low, high=high, p=p, error=error, freedom=pooled.freedom)


def image_variance(shares: Sequence[Floats | None]) -> Floats:
    """[S, S]: what the test set's own chance adds to the variance of two settings' difference; 0 where not known.

    shares [N] a setting: of its runs, those that have an image right; None: not known.
    """
    added = np.zeros((len(shares), len(shares)))
    table = {place: one for place, one in enumerate(shares) if one is not None and len(one) > 1}
    if len(table) > 1:
        places = list(table)
        covariance = np.cov(np.stack(list(table.values())))
        own = np.diag(covariance)
        gaps = np.maximum(own[:, None] + own[None, :] - 2 * covariance, 0.0)
        added[np.ix_(places, places)] = gaps / len(table[places[0]])
    return added


def judge(
    differences: Sequence[Difference], better: int = 1, margin: float = MARGIN, others: Sequence[float] | Floats = ()
) -> list[Judged]:
    """A verdict on each of a table's comparisons; with Holm's steps their false ones together stay below LEVEL.

    `better` is the metric's: -1 turns the words round. `margin` is in the figures' own numbers. `others`: raw p values
    of comparisons that were made too, and are not told.
    """
    adjusted, levels = holm([*(one.p for one in differences), *others])
    return [_judged(*one, better, margin) for one in zip(differences, adjusted, levels)]


def holm(ps: Sequence[float | None]) -> tuple[list[float | None], list[float]]:
    """Adjusted p values (Holm 1979), and the level that each was tested at; None stays, and counts as no comparison."""
    values = np.array([math.nan if p is None else p for p in ps])
    count = int((~np.isnan(values)).sum())
    ranked = np.argsort(values, kind="stable")[:count]
    left = count - np.arange(count)
    adjusted = np.full(len(ps), math.nan)
    adjusted[ranked] = np.minimum(1.0, np.maximum.accumulate(left * values[ranked]))
    levels = np.full(len(ps), LEVEL / max(count, 1))
    failed = np.flatnonzero(values[ranked] >= LEVEL / left)
    if len(failed):
        left[failed[0] :] = left[failed[0]]  # once a step fails, all later ones fail at its level
    levels[ranked] = LEVEL / left
    return [None if math.isnan(p) else p for p in adjusted.tolist()], levels.tolist()


def runs_needed(
    one: Difference, level: float = LEVEL, power: float = POWER, most: int = 1000, sure: float = POWER
) -> int | None:
    """Runs a side with which a true difference of the size that was seen is shown at `level` (what Holm leaves of
    LEVEL) with probability `power`: that of Student's test by the noncentral t distribution. None beyond `most`.

    The deviation that few runs show is often too small: its upper limit at probability `sure` stands for it (Browne
    1995, Statistics in Medicine 14), so that the advice is enough in at least that share of such comparisons.
    """
    if not one.mean or one.error is None or one.n < 2:
        return None
    seeds = max(one.error**2 - one.fixed**2, 0.0) * one.n  # variance of a single run's difference
    seeds *= one.freedom / float(chdtri(one.freedom, sure)) if sure else 1.0
    each = one.freedom / (one.n - 1)  # degrees of freedom that a run more adds

    def enough(n: int) -> bool:
        freedom, error = each * (n - 1), math.sqrt(seeds / n + one.fixed**2)
        if not error:
            return True
        wanted, effect = float(stdtrit(freedom, 1 - level / 2)), abs(one.mean or 0.0) / error
        # Far from the quantile the answer is known, and scipy's distribution function is not a number there.
        if not wanted / 4 < effect < 2 * wanted + 5:
            return effect > wanted
        return 1 - float(nctdtr(freedom, effect, wanted)) >= power

    if not enough(most):
        return None
    return bisect_left(range(most), True, lo=FEWEST, key=enough)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of a mean at 1 - LEVEL; None for fewer than two values."""
    if len(values) < 2:
        return None
    return _interval(statistics.fmean(values), math.sqrt(_variance_of_mean(values)), len(values) - 1, LEVEL)


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Mid-p of McNemar's exact test for one network against one, by the images that only one has right
    (Fagerland, Lydersen and Laake 2013): a statement about images like these, not about other seeds."""
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    if n == 0:
        return 1.0
    upto, below = bdtr(k, n, 0.5), bdtr(k - 1, n, 0.5) if k else 0.0
    return float(min(1.0, upto + below))  # 2 P(X <= k) - P(X = k)


def _judged(one: Difference, p: float | None, level: float, better: int, margin: float) -> Judged:
    if one.mean is None or one.error is None or one.n < FEWEST:
        return Judged(one, p, one.low, one.high, "TOO FEW RUNS", None)
    low, high = _interval(one.mean, one.error, one.freedom, level)
    if low > 0 or high < 0:
        return Judged(one, p, low, high, "BETTER" if (low > 0) == (better > 0) else "WORSE", None)
    if low >= -margin and high <= margin:
        return Judged(one, p, low, high, "NO DIFFERENCE SHOWN", None)
    return Judged(one, p, low, high, "CANNOT BE TOLD", runs_needed(one, level))


def _interval(mean: float, error: float, freedom: float, level: float) -> tuple[float, float]:
    half = float(stdtrit(freedom, 1 - level / 2)) * error
    return mean - half, mean + half


def _p_value(mean: float, error: float, freedom: float) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(freedom, -abs(mean) / error))


def _variance_of_mean(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def _welch_freedom(sides: Sequence[tuple[float, int]]) -> float:
    """Welch and Satterthwaite's, of the sides' variances of the mean and their degrees of freedom."""
    below = sum(v * v / freedom for v, freedom in sides if freedom)
    whole = sum(v for v, _ in sides)
    return whole * whole / below if below else float(sum(freedom for _, freedom in sides))
