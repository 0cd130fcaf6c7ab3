"""Statistics against scipy and hand computations, and how often a setting is called better than itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kdbench.results.statistics import (
    Difference,
    all_pairs,
    correlation,
    difference,
    holm,
    image_variance,
    interval,
    judge,
    mcnemar,
    on_images,
    pool,
    pooled_difference,
    runs_needed,
)

OURS = {0: 0.91, 1: 0.92, 2: 0.935, 3: 0.90}
THEIRS = {0: 0.90, 1: 0.905, 2: 0.92, 3: 0.89}


def test_paired_where_the_seeds_match():
    found, wanted = difference(OURS, THEIRS), stats.ttest_rel(list(OURS.values()), list(THEIRS.values()))
    low, high = wanted.confidence_interval()
    assert found.paired and found.n == 4 and found.wins == 1.0
    assert (found.p, found.low, found.high) == pytest.approx((wanted.pvalue, low, high))


def test_pairs_are_by_seed_and_not_by_place():
    assert difference(OURS, dict(reversed(THEIRS.items()))) == difference(OURS, THEIRS)


def test_welch_where_they_do_not():
    theirs = {10: 0.90, 11: 0.905, 12: 0.92}
    wanted = stats.ttest_ind(list(OURS.values()), list(theirs.values()), equal_var=False)
    low, high = wanted.confidence_interval()
    found = difference(OURS, theirs)
    assert not found.paired and found.n == 3
    assert (found.p, found.low, found.high) == pytest.approx((wanted.pvalue, low, high))
    assert found.freedom == pytest.approx(wanted.df) and found.wins == pytest.approx(8 / 12)


def test_interval_of_a_mean():
    values = [0.9, 0.91, 0.95]
    wanted = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx(wanted) and interval([0.5]) is None


def test_holm_by_hand():
    # 4 x 0.01, then 3 x 0.02, then the largest so far: 2 x 0.03 = 0.06 and 1 x 0.2; None is no comparison.
    assert holm([0.2, 0.01, None, 0.03, 0.02])[0] == pytest.approx([0.2, 0.04, None, 0.06, 0.06])
    assert holm([0.2, 0.01, None, 0.03, 0.02])[1][1] == 0.05 / 4
    assert holm([0.9, 0.8])[0] == [1.0, 1.0] and holm([]) == ([], [])


def test_mcnemar_mid_p_by_hand():
    # 2 of 7: 2 (1 + 7 + 21) / 128 - 21 / 128.
    assert mcnemar(2, 5) == mcnemar(5, 2) == pytest.approx((2 * 29 - 21) / 128)
    assert mcnemar(0, 0) == 1.0 and mcnemar(0, 10) == pytest.approx(2**-10)
    assert mcnemar(6, 30) == pytest.approx(stats.binomtest(6, 36).pvalue - stats.binom.pmf(6, 36, 0.5))
    assert mcnemar(50, 50) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.010, 0.012, 0.011], "BETTER"),
        ([-0.010, -0.012, -0.011], "WORSE"),
        ([0.001, -0.001, 0.0005], "NO DIFFERENCE SHOWN"),
        ([0.02, -0.01, 0.015], "CANNOT BE TOLD"),
        ([0.010, 0.012], "TOO FEW RUNS"),
        ([0.010], "TOO FEW RUNS"),
        ([], "TOO FEW RUNS"),
        ([0.0, 0.0, 0.0], "NO DIFFERENCE SHOWN"),
    ],
)
def test_words(gaps, verdict):
    ours, theirs = dict(enumerate(gaps)), dict.fromkeys(range(len(gaps)), 0.0)
    (judged,) = judge([difference(ours, theirs)])
    assert judged.verdict == verdict
    turned = {"BETTER": "WORSE", "WORSE": "BETTER"}
    assert judge([difference(ours, theirs)], better=-1)[0].verdict == turned.get(verdict, verdict)


def test_many_comparisons_are_judged_more_strictly():
    pair = difference(dict(enumerate([0.010, 0.013, 0.016])), dict.fromkeys(range(3), 0.0))
    assert pair.p is not None and 0.01 < pair.p < 0.05
    noise = difference(dict(enumerate([0.01, -0.02, 0.005])), dict.fromkeys(range(3), 0.0))
    assert judge([pair])[0].verdict == "BETTER"
    alone, *_ = judge([pair, noise, noise, noise])
    assert alone.verdict == "CANNOT BE TOLD" and alone.p == pytest.approx(4 * pair.p)
    assert alone.low is not None and pair.low is not None and alone.low < 0 < pair.low


def seen(gap: float, deviation: float, n: int, paired: bool = True) -> Difference:
    """A difference of the mean `gap` whose runs (pairs, if paired) have this deviation."""
    sides = 1 if paired else 2
    return Difference(gap, None, None, None, n, paired, deviation * (sides / n) ** 0.5, float(sides * (n - 1)))


def test_how_many_runs_would_do():
    (judged,) = judge([difference(dict(enumerate([0.02, -0.01, 0.015])), dict.fromkeys(range(3), 0.0))])
    assert judged.runs is not None and judged.runs > 3
    # The textbook's for 80 % at an effect of one and of half a deviation (Cohen 1988: 10 and 34 pairs, 17 and 64 runs).
    assert [runs_needed(seen(gap, 1.0, 3), sure=0) for gap in (1.0, 0.5)] == [10, 34]
    assert [runs_needed(seen(gap, 1.0, 3, paired=False), sure=0) for gap in (1.0, 0.5)] == [17, 64]
    assert runs_needed(seen(0.0, 1.0, 3)) is None and runs_needed(seen(1e-6, 1.0, 3)) is None
    # A deviation that was seen in few runs says less; a table of many comparisons asks for more.
    assert [runs_needed(seen(1.0, 1.0, n)) for n in (3, 5, 10, 100)] == [38, 22, 16, 12]
    assert [runs_needed(seen(3.0, 1.0, 3), level) for level in (0.05, 0.05 / 62, 0.05 / 2000)] == [7, 15, 21]


@pytest.mark.parametrize("level", [0.05, 0.05 / 62])
def test_the_runs_that_would_do_show_the_difference(level):
    """Of 300 true differences, in runs of a deviation that is known by three pairs alone, four in five or more."""
    random, shown, asked, tries = np.random.default_rng(7), 0, 0, 300
    for _ in range(tries):
        few = float(np.std(random.normal(size=3), ddof=1))
        n = runs_needed(seen(3.0, few, 3), level)
        if n is not None:
            gaps = random.normal(3.0, 1.0, size=n)
            shown += stats.ttest_1samp(gaps, 0.0).pvalue < level
            asked += 1
    assert asked > 0.9 * tries and shown / asked >= 0.75  # where the three had the same figure by chance, none is named


def test_three_seeds_that_each_gain_one_image_are_not_certain():
    base = {0: 0.9, 1: 0.91, 2: 0.92}
    ours = {seed: value + 1 / 360 for seed, value in base.items()}
    for theirs in (base, {seed + 10: value for seed, value in base.items()}):
        rounded = difference(ours, theirs, step=1 / 360)
        assert rounded.p is not None and rounded.p > 0.04
    found = difference(ours, base, step=1 / 360)
    assert found.error == pytest.approx(1 / 360 / 6**0.5 / 3**0.5)
    spread = difference(OURS, THEIRS)
    assert difference(OURS, THEIRS, step=1e-4) == spread  # what varies more than that is left as it is


@pytest.mark.parametrize(("n", "rho"), [(3, 0.0), (3, 0.6), (5, 0.3)])
def test_a_setting_is_seldom_better_than_itself(n, rho):
    """1,000 tables of three settings without a difference against a baseline: a wrong BETTER in at most 5 % of them."""
    random = np.random.default_rng(n)
    wrong, tables = {True: 0, False: 0}, 1000
    for _ in range(tables):
        shared = random.normal(size=n) * rho**0.5
        runs = [shared + random.normal(size=n) * (1 - rho) ** 0.5 for _ in range(4)]
        for paired in (True, False):
            base = dict(enumerate(runs[0])) if paired else {i + 100: value for i, value in enumerate(runs[0])}
            found = judge([difference(dict(enumerate(run)), base) for run in runs[1:]])
            wrong[paired] += any(one.verdict == "BETTER" for one in found)
    assert wrong[True] / tables <= 0.05 and wrong[False] / tables <= 0.05


def test_on_such_images_by_hand():
    gaps = np.array([0.5, 0.0, -0.5, 0.0] * 25)
    seeds = difference(OURS, THEIRS)
    found = on_images(seeds, gaps)
    assert found.fixed == pytest.approx(stats.sem(gaps)) and found.mean == seeds.mean and found.freedom == seeds.freedom
    assert found.error == pytest.approx((seeds.error**2 + stats.sem(gaps) ** 2) ** 0.5)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, seeds.mean, found.error))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(seeds.mean / found.error), 3))
    assert found.low < seeds.low and found.high > seeds.high  # never surer than of this test set
    single = difference({0: 0.9}, {0: 0.8})
    assert on_images(single, gaps) == single


def test_more_seeds_do_not_help_where_the_test_set_is_too_small():
    one = on_images(difference({s: 0.91 + s / 1e4 for s in range(3)}, {s: 0.90 - s / 1e4 for s in range(3)}),
                    np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=300))  # fmt: skip
    (judged,) = judge([one])
    assert judged.verdict == "CANNOT BE TOLD" and judged.runs is None
    alone = difference({s: 0.91 + s / 1e4 for s in range(3)}, dict.fromkeys(range(3), 0.9))
    assert judge([alone])[0].verdict == "BETTER"


def test_runs_that_would_do_are_more_than_there_are():
    gaps = [difference(dict(enumerate(r)), {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}) for r in
            ([1, 2, 3, 9], [2, 3, 1, 8], [3, 3, 1, 8], [2, 2, 1, 9])]  # fmt: skip
    for one in judge(gaps):
        assert one.verdict == "CANNOT BE TOLD" and one.runs is not None and one.runs > 4


def test_the_correlation_of_runs_of_one_seed_by_hand():
    table = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 5.0], [0.0, 1.0, 1.0]])
    covariance = np.cov(table)
    pairs = [covariance[i, j] for i in range(3) for j in range(3) if i != j]
    assert correlation(table.tolist()) == pytest.approx(np.mean(pairs) / np.mean(np.diag(covariance)))
    assert correlation([[1.0, 2.0], [1.0, 2.0]]) == pytest.approx(1.0)
    assert correlation([[1.0, 2.0]]) is None and correlation([[1.0], [2.0]]) is None
    assert correlation([[1.0, 1.0], [1.0, 1.0]]) is None


def test_a_method_is_seldom_better_than_itself_on_such_images():
    """Runs whose errors are of seed, image and both: over seeds alone the test set's luck is taken for the method's."""
    random, wrong = np.random.default_rng(1), {"set": 0, "images": 0}
    images, seeds, tables = 200, 4, 400
    for _ in range(tables):
        taste = random.normal(size=(2, images)) * 1.5  # what each method finds easy: no method is better on average
        right = [random.normal(size=(seeds, images)) + one > 0 for one in taste]
        figures = [dict(enumerate(one.mean(1))) for one in right]
        alone = difference(*figures)
        both = on_images(alone, right[0].mean(0) - right[1].mean(0))
        for name, one in (("set", alone), ("images", both)):
            wrong[name] += judge([one])[0].verdict in ("BETTER", "WORSE")
    assert wrong["images"] / tables <= 0.05 < wrong["set"] / tables


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    random = np.random.default_rng(5)
    seeds = [range(3), range(3), range(3), range(5), range(10, 14), range(5), [7], [], range(3)]
    settings = [{seed: float(random.integers(300, 340)) / 360 for seed in some} for some in seeds]
    settings[8] = dict(settings[0])  # no difference at all
    steps = [1 / 360 if i % 2 else 0.0 for i in range(len(settings))]
    shares: list[np.ndarray | None] = [random.random(50) for _ in settings]
    shares[2] = None
    found, added = all_pairs(settings, steps), image_variance(shares)
    told = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(found.first, found.second, strict=True))}
    for a in range(len(settings)):
        for b in range(a + 1, len(settings)):
            alone = difference(settings[b], settings[a], steps[b])
            if alone.p is None:
                assert (a, b) not in told
                continue
            at, ours, theirs = told[a, b], shares[a], shares[b]
            wider = alone if ours is None or theirs is None else on_images(alone, theirs - ours)
            assert found.mean[at] == pytest.approx(alone.mean) and found.freedom[at] == pytest.approx(alone.freedom)
            assert found.p()[at] == pytest.approx(alone.p) and found.p(added)[at] == pytest.approx(wider.p)


def test_comparisons_that_are_not_told_count():
    pair = difference(dict(enumerate([0.010, 0.013, 0.016])), dict.fromkeys(range(3), 0.0))
    assert judge([pair], others=[0.5, 0.9, 0.7])[0] == judge([pair, *[pair._replace(p=p) for p in (0.5, 0.9, 0.7)]])[0]


def test_a_pooled_variance_is_that_of_all_runs():
    random = np.random.default_rng(2)
    settings = [dict(enumerate(random.normal(size=n))) for n in (3, 4, 5)]
    found = pool(settings, [0.0] * 3)
    own = [np.var(list(one.values()), ddof=1) for one in settings]
    shared = (2 * own[0] + 3 * own[1] + 4 * own[2]) / 9
    assert found is not None and found.freedom == 9 and found.variance == pytest.approx(np.maximum(own, shared))
    assert found.alike == pytest.approx(stats.bartlett(*(list(one.values()) for one in settings)).pvalue)
    one = pooled_difference(difference(settings[0], settings[1]), *found.variance[:2], found, (3, 4))
    error = (found.variance[0] / 3 + found.variance[1] / 4) ** 0.5
    assert one.error == pytest.approx(error) and one.p == pytest.approx(2 * stats.t.sf(abs(one.mean / error), 9))
    assert (one.low, one.high) == pytest.approx(stats.t.interval(0.95, 9, one.mean, error))


def test_pooled_over_two_settings_is_the_pairs_own():
    alone, found = difference(OURS, THEIRS), pool([OURS, THEIRS], [0.0, 0.0])
    assert found is not None and found.holds
    one = pooled_difference(alone, *found.variance, found, (4, 4))
    assert one == pytest.approx(alone)


def test_what_a_seed_adds_to_all_settings_is_no_variance():
    random = np.random.default_rng(3)
    noise, seeds = random.normal(size=(5, 3)), 100 * random.normal(size=3)
    plain = pool([dict(enumerate(row)) for row in noise], [0.0] * 5)
    blocked = pool([dict(enumerate(row + seeds)) for row in noise], [0.0] * 5)
    assert plain is not None and blocked is not None and blocked.variance == pytest.approx(plain.variance)
    table = noise - noise.mean(1, keepdims=True) - noise.mean(0) + noise.mean()
    assert blocked.freedom == 8 and min(blocked.variance) == pytest.approx((table**2).sum() / 8)  # two-way anova
    assert pool([{0: 1.0}, {0: 2.0}], [0.0, 0.0]) is None  # nothing that varies


def test_settings_that_vary_unlike_are_not_pooled():
    steady, wild = {0: 0.90, 1: 0.901, 2: 0.902}, {0: 0.5, 1: 0.9, 2: 0.1}
    found = pool([steady, wild, {s: v + 0.01 for s, v in wild.items()}, {3: 0.9, 4: 0.9, 5: 0.9}], [0.0] * 4)
    assert found is not None and not found.holds
    rounded = pool([dict.fromkeys(range(3), 0.9), dict.fromkeys(range(3), 0.8)], [1 / 360, 1 / 360])
    assert rounded is not None and rounded.variance == pytest.approx(1 / 360**2 / 12)  # figures that coincide


def test_one_wild_setting_of_few_is_noticed_with_the_same_seeds():
    """It moves the mean of every seed, so that all four settings are left with much the same of it."""
    steady = [(0.950, 0.953, 0.948), (0.947, 0.955, 0.940), (0.936, 0.957, 0.949)]
    table = [dict(enumerate(row)) for row in (*steady, (0.40, 0.95, 0.62))]
    found = pool(table, [1 / 360] * 4)
    assert found is not None and not found.holds and found.alike < 1e-3
    alike = pool([*table[:3], {0: 0.94, 1: 0.95, 2: 0.945}], [1 / 360] * 4)
    assert alike is not None and alike.holds


@pytest.mark.parametrize("spread", ["alike", "lognormal", "one of ten times", "baseline of three times"])
def test_a_setting_is_seldom_better_than_itself_with_a_pooled_variance(spread):
    """400 tables of nine settings against a baseline, three runs each: a wrong BETTER in at most 5 % of them."""
    random = np.random.default_rng(4)
    wrong, pooled, tables = 0, 0, 400
    for _ in range(tables):
        deviation = np.exp(0.5 * random.normal(size=10)) if spread == "lognormal" else np.ones(10)
        deviation[0 if spread.startswith("baseline") else 9] *= {"o": 10, "b": 3}.get(spread[0], 1)
        runs = [
            dict(enumerate(row)) for row in random.normal(size=(10, 3)) * deviation[:, None] + random.normal(size=3)
        ]
        found = pool(runs, [0.0] * 10)
        assert found is not None
        differences = [difference(run, runs[0]) for run in runs[1:]]
        if found.holds:
            pooled += 1
            first, *rest = found.variance
            differences = [pooled_difference(one, own, first, found, (3, 3)) for one, own in zip(differences, rest)]
        wrong += any(one.verdict == "BETTER" for one in judge(differences))
    assert wrong / tables <= 0.05 and (pooled > 0.85 * tables if spread == "alike" else pooled < tables)
