"""Claims: a figure and a bound, written down before the runs, and what the runs of several seeds say of them.

Each is one comparison, judged as `kdbench compare` judges. It holds if the 95 % t interval of the mean over seeds lies
on the bound's right side, does not hold if it lies on the wrong one, and cannot be told with so few seeds if the bound
is inside. Accuracies that agree in every seed are certain to one test image only. scripts/claims.py has the papers'.
"""

from __future__ import annotations

import functools
import operator
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdbench.errors import UserError
from kdbench.results.read import Run, read_runs
from kdbench.results.result import read_result
from kdbench.results.statistics import FEWEST, Difference, difference

Of = Callable[[Run], float]  # a figure of a run's result
ALL = -1  # in place of a seed: one figure of all seeds together


class BySeed(dict[int, float]):
    """A figure for each seed."""

    def __sub__(self, other: BySeed) -> BySeed:
        return BySeed({seed: self[seed] - other[seed] for seed in sorted(self.keys() & other.keys())})

    def __mul__(self, factor: float) -> BySeed:
        return BySeed({seed: factor * value for seed, value in self.items()})

    @property
    def mean(self) -> BySeed:
        """One figure, of all seeds."""
        return BySeed({0: statistics.mean(self.values())})


class Results(dict[int, Run]):
    """A run for each seed."""

    def __getitem__(self, key: Any) -> Any:  # results[figure] -> the figure by seed
        if callable(key):
            return BySeed({seed: key(run) for seed, run in self.items()})
        return super().__getitem__(key)


class Runs:
    """The runs of one paper's script: `runs(experiment, loss__tau=4)` are those with loss.tau = 4, by seed."""

    def __init__(self, folder: Path, paper: str) -> None:
        self._folder, self._paper = folder, paper
        self._read = functools.cache(self._results)
        self.images: set[int] = set()  # in the test sets of the runs that were asked for

    def __call__(self, experiment: str, **wanted: Any) -> Results:
        """Raises LookupError if no run or several runs of one seed fit."""
        known = {key.replace("__", "."): value for key, value in wanted.items()}
        fitting = [
            run
            for run in self._read(experiment)
            if all({**run.result.config, **run.result.choices}.get(key) == value for key, value in known.items())
        ]
        found = Results({run.result.seed: run for run in fitting})
        if not fitting or len(found) < len(fitting):
            raise LookupError(f"{experiment}, {known}: {len(fitting)} runs of {len(found)} seeds")
        self.images |= {run.result.images.get("test", 0) for run in fitting}
        return found

    def _results(self, experiment: str) -> list[Run]:
        try:
            return read_runs([self._folder / f"{self._paper}_{experiment}"]).runs
        except UserError as error:
            raise LookupError(str(error)) from error


def last(run: Run) -> float:
    return 100 * run.result.last["test/top1"]


def training(run: Run) -> float:
    return 100 * run.result.last["train/top1"]


def stopped(run: Run) -> float:
    """Test accuracy of the epoch that validation chooses."""
    return 100 * (run.result.best or run.result.last)["test/top1"]


def teacher(run: Run) -> float:
    return of_teacher(run, "test/top1")


def members(run: Run) -> float:
    """The mean of an ensemble's members."""
    return of_teacher(run, "members/test/top1")


def of_teacher(run: Run, name: str) -> float:
    """Raises LookupError for a run without a teacher."""
    if run.result.teacher is None:
        raise LookupError(f"{run.folder}: no teacher taught it")
    return 100 * defined(run.result.teacher.metrics[name])


def defined(value: float | None) -> float:
    """Raises LookupError for a figure that is not defined in this run."""
    if value is None:
        raise LookupError("not defined in this run")
    return value


def figure(key: str, unit: float = 100) -> Of:
    return lambda run: unit * defined(run.result.figures[key])


def stage(number: int) -> Of:
    """The student of a procedure's stage, counted from 1."""
    return lambda run: 100 * defined(run.result.stages[number - 1].metrics["test/top1"])


def first_teacher(run: Run) -> float:
    folder = run.folder / run.result.stages[0].folder
    return teacher(Run(folder, read_result(folder)))


class Claim(NamedTuple):
    name: str
    kind: str  # claim, reported
    text: str
    relation: str  # >=, <=, >, <
    bound: float
    figure: Callable[[Runs], BySeed]
    exact: bool = False  # no share of the test images: nothing is rounded to one of them

    def keeps(self, value: float) -> bool:
        """Whether a value is on the bound's right side."""
        compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[self.relation]
        return bool(compare(value, self.bound))

    def judge(self, found: BySeed, images: int) -> tuple[Difference, bool | None]:
        """Mean, standard error and interval, and whether the claim holds; None: that cannot be told.

        `images`: in the test set; 0: not known.
        """
        step = 0.0 if self.exact or not images else 100 / images
        one = difference(found, dict.fromkeys(found, 0.0), step)
        if one.low is None or one.high is None or one.n < FEWEST:
            return one, None
        inside = {self.keeps(one.low), self.keeps(one.high)}
        return one, inside.pop() if len(inside) == 1 else None


def ratio(above: BySeed, below: BySeed) -> BySeed:
    return BySeed({seed: 100 * above[seed] / below[seed] for seed in sorted(above.keys() & below.keys())})


HEAD = ("paper", "claim", "figure", "claimed", "mean", "error", "95 % interval", "by seed", "kept in", "")


def rows(papers: Mapping[str, Sequence[Claim]], top: Path, size: str) -> Iterator[list[str]]:
    """A row for each claim whose runs are there; what is not there is said on stderr."""
    for paper, claims in papers.items():
        folder = top / f"{paper}-{size}"
        if not folder.is_dir():
            print(f"{paper}: not run: kdbench reproduce {paper} {size} writes {folder}", file=sys.stderr)
            continue
        runs = Runs(folder, paper)
        lacking: dict[str, list[str]] = {}  # the claims by what they lack
        for claim in claims:
            try:
                runs.images.clear()
                found = claim.figure(runs)
                yield row(paper, claim, found, min(runs.images, default=0))
            except LookupError as error:
                lacking.setdefault(str(error), []).append(claim.name)
        for reason, names in lacking.items():
            print(f"{paper} {', '.join(dict.fromkeys(names))}: {reason}", file=sys.stderr)


def row(paper: str, claim: Claim, found: BySeed, images: int) -> list[str]:
    one, holds = claim.judge(found, images)
    values = list(found.values())
    seeds = ", ".join(f"{value:.2f}" for value in values)
    error = "-" if one.error is None else f"{one.error:.2f}"
    interval = "-" if one.low is None else f"{one.low:.2f} to {one.high:.2f}"
    kept = f"{sum(map(claim.keeps, values))} of {len(values)}"
    untold = ": one figure of all seeds" if set(found) == {ALL} else f" with n = {len(found)}"
    word = {True: "holds", False: "does not hold", None: f"cannot be told{untold}"}[holds]
    word = f"reported: {word}" if claim.kind == "reported" else word
    claimed = f"{claim.relation} {claim.bound:g}"
    return [paper, claim.name, claim.text, claimed, f"{one.mean:.2f}", error, interval, seeds, kept, word]


MOVED = ("paper", "claim", "figure", "claimed", "mean", "by seed", "", "mean there", "by seed there", "there", "moved")


def moved(here: Sequence[Sequence[str]], there: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Rows of `rows` of two sets of runs, another machine's or another library's, beside each other.

    "moved" is the largest difference of a seed that both have, in the two decimals that are printed; a claim of which
    one side has no runs is left out.
    """
    others = {tuple(one[:4]): one for one in there}
    for one in here:
        other = others.get(tuple(one[:4]))
        if other is not None:
            pairs = zip(one[7].split(", "), other[7].split(", "), strict=False)
            most = max(abs(float(ours) - float(theirs)) for ours, theirs in pairs)
            yield [*one[:5], one[7], one[9], other[4], other[7], other[9], f"{most:.2f}" if most else "-"]


def summary(table: Sequence[Sequence[str]]) -> str:
    """What two sets of runs have in common, in a sentence."""
    same = sum(line[10] == "-" for line in table)
    words = sum(line[6] == line[9] for line in table)
    return f"{len(table)} claims: the figures of {same} are the same in every seed, and {words} say the same"
