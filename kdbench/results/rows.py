"""From runs to rows: what differs, mean and standard deviation over seeds, and what is not comparable."""

from __future__ import annotations

import functools
import itertools
import statistics
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kdbench.counted import as_before, counted, is_seed
from kdbench.errors import some
from kdbench.results.metrics import CLASSIFICATION, LANGUAGE_MODELLING, TASKS, Metric, Task, metric_of
from kdbench.results.read import Run
from kdbench.results.result import NetworkResult

_ORDER = ("dataset", "teacher", "student", "loss", "optimizer", "schedule", "procedure")
_counted, _is_seed = functools.cache(counted), functools.cache(is_seed)  # a thousand runs have nearly the same keys
# Groups that take values from another group's choice (optimizer.lr: ${schedule.lr}): those differences are explained.
_FOLLOWS = {"schedule": ("optimizer.", "teacher.schedule.", "teacher.optimizer."), "optimizer": ("teacher.optimizer.",)}


COSTS = ("cpu_seconds", "gpu_seconds", "energy", "flops", "latency")  # that tables show beside every figure


class Figure(NamedTuple):
    """A number over the n runs of one setting."""

    mean: float | None  # None: no run has it
    std: float | None  # sample standard deviation; None for fewer than two
    n: int

    @staticmethod
    def of(values: Iterable[Any]) -> Figure:
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else None
        return Figure(statistics.fmean(numbers) if numbers else None, spread, len(numbers))


class Row(NamedTuple):
    """One setting."""

    differs: dict[str, object]  # by column; a key that this setting lacks is absent
    teacher: Figure  # its primary metric on the test set
    metrics: dict[str, Figure]  # the student's, by the names asked for
    agreement: Figure  # of student and teacher on the test set
    seconds: Figure
    cost: dict[str, Figure]  # what its runs took, by the names of COSTS
    runs: list[Run]

    @property
    def task(self) -> Task:
        """What its runs are of."""
        return task_of(self.runs)


class Comparison(NamedTuple):
    columns: list[str]  # choices and keys that differ
    same: dict[str, object]  # choices that all runs share
    rows: list[Row]
    warnings: list[str]

    @property
    def task(self) -> Task:
        """What its runs are of: one task, for figures of several are not to be put in order."""
        return task_of([run for row in self.rows for run in row.runs])

    def metric(self, name: str) -> Metric:
        """What a figure of these runs measures."""
        return metric_of(name, self.task)


def task_of(runs: Sequence[Run]) -> Task:
    """The task of runs that share one; of no runs, classification."""
    return TASKS[runs[0].result.task] if runs else CLASSIFICATION


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs parted by their task."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run.result.task, []).append(run)
    return dict(sorted(parts.items()))


def compare(runs: Sequence[Run], metrics: Sequence[str] = ("last", "best")) -> Comparison:
    """Put runs that differ in nothing but seeds into one row each; the same run under two folders counts once.

    `metrics`: names of `RunResult.figure`; "last" or "best" for the primary metric of the runs' task on the test set
    after the last epoch, or at the best epoch by validation. The runs are of one task.
    """
    runs, twice = _once(runs)
    configs = [settings(run) for run in runs]
    choices = [named_choices(run) for run in runs]
    of = [_of(run) for run in runs]
    names = sorted({name for chosen in choices for name in chosen}, key=_rank)
    varied = [name for name in names if _distinct(choices, name) > 1]
    differing = [key for key in _keys(configs) if not _is_seed(key) and _distinct(configs, key) > 1]
    columns = varied + _unexplained(differing, configs, choices, varied)
    grouped: dict[Any, list[int]] = {}
    settled: dict[str, list[int]] = {}
    drawn: dict[Any, list[Any]] = {}  # data by setting and dataset.data_seed: of another seed they are others by intent
    for i, config in enumerate(configs):  # what all share tells nobody apart
        setting = repr([[choices[i].get(k, ...) for k in varied], [config.get(k, ...) for k in differing]])
        of[i] = _numbered(of[i], drawn.setdefault((setting, config.get("dataset.data_seed")), []))
        settled.setdefault(setting, []).append(i)
        grouped.setdefault((setting, repr(of[i])), []).append(i)
    apart = [_parted(members, of) for members in settled.values() if _several(of, members)]
    versions = {part[0]: letter for parts in apart for letter, part in zip(_letters(), parts)}
    columns += [VERSION] if versions else []
    rows = [_row([runs[i] for i in members], columns, metrics) for members in grouped.values()]
    for row, members in zip(rows, grouped.values()):
        row.differs.update({VERSION: versions[members[0]]} if members[0] in versions else {})
    shared = [name for name in names if runs and name in _ORDER and name not in varied]
    same: dict[str, object] = {name: choices[0].get(name) for name in shared}
    why = [_why_apart([runs[part[0]] for part in parts]) for parts in apart]
    return Comparison(columns, same, rows, twice + why + warnings(rows))


def named_choices(run: Run) -> dict[str, str]:
    """The option of each group that counts; a library's network by its own name, a run that teaches by its network."""
    result, config = run.result, run.result.config
    chosen = {group: option for group, option in result.choices.items() if counted(group)}
    if result.teacher is not None and result.teacher.name and (config.get("teacher.run") or config.get("teacher.name")):
        chosen["teacher"] = result.teacher.name
    if config.get("student.name"):
        chosen["student"] = str(config["student.name"])
    return chosen


VERSION = "version"  # the column that tells rows of one setting apart, which are of other data or code
# Parts of an identity (kdbench.runs.identity) that no column shows, and what they are called.
_PARTS = {"format": "edition of kdbench", "named": "files and runs", "code": "own code", "data": "data"}


def _of(run: Run) -> dict[str, object]:
    """What a run is of besides its configuration; {} for runs of the first edition, which did not say."""
    return {part: run.result.identity[part] for part in _PARTS if part in run.result.identity}


def _numbered(of: dict[str, object], known: list[Any]) -> dict[str, object]:
    """`of` with the data's place among those that are known, which grows by them, for the data."""
    if "data" not in of:
        return of
    if of["data"] not in known:
        known.append(of["data"])
    return {**of, "data": known.index(of["data"])}


def _several(of: Sequence[Any], members: Sequence[int]) -> bool:
    return any(of[i] != of[members[0]] for i in members)


def _parted(members: Sequence[int], of: Sequence[Any]) -> list[list[int]]:
    """Runs of one setting by what they are of."""
    parts: dict[str, list[int]] = {}
    for i in members:
        parts.setdefault(repr(of[i]), []).append(i)
    return list(parts.values())


def _letters() -> Iterator[str]:
    """A, B, ..., Z, A1, B1, ...: what stands in the column of versions."""
    for count in itertools.count():
        yield from (f"{letter}{count or ''}" for letter in string.ascii_uppercase)


def _why_apart(runs: Sequence[Run]) -> str:
    """Why runs of one setting are in several rows; one run of each."""
    kinds = [_of(run) for run in runs]
    parts = [words for part, words in _PARTS.items() if any(kind.get(part) != kinds[0].get(part) for kind in kinds)]
    why = f"of other {' and other '.join(parts)}" if all(kinds) else "of which some do not say what they are of"
    folders = some(f"{VERSION}={letter} {run.folder}" for letter, run in zip(_letters(), runs))
    return f"Runs of one setting are in {len(runs)} rows, since they are {why}: {folders}"


def _once(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Runs without repeated ones (the same identity in another folder), and what to say of those."""
    first: dict[str, Run] = {}
    kept, said = [], []
    for run in runs:
        known = first.setdefault(f"{run.result.hash} {_of(run)}", run) if run.result.hash else run
        if known is run:
            kept.append(run)
        else:
            same = known.result.student.weights == run.result.student.weights
            other = "" if same else ", though its weights are others"
            said.append(f"{run.folder} is the run of {known.folder} once more and is not counted{other}.")
    return kept, said


def settings(run: Run) -> dict[str, object]:
    """What a run was set to, without what changes no result; values inside its own `paths` are made neutral."""
    config = run.result.config
    places = [(v, k) for k, v in config.items() if k.startswith("paths.") and isinstance(v, str) and v]
    places.sort(key=lambda item: -len(item[0]))
    counted = ((key, value) for key, value in as_before(config).items() if _counted(key))
    return {key: neutral(value, places) if isinstance(value, (str, float)) else value for key, value in counted}


def metric_names(runs: Sequence[Run]) -> list[str]:
    """All the metrics that some run has."""
    return ["last", "best", *sorted({name for run in runs for name in run.result.figure_names()}, key=_best_last)]


def _best_last(name: str) -> tuple[bool, str]:
    return name.startswith("best/"), name


def warnings(rows: Sequence[Row]) -> list[str]:
    """What makes the rows not comparable, and what makes an n smaller than it looks."""
    found = []
    data = _sets(rows, lambda run: (run.result.choices.get("dataset"), *_counts(run)))
    if len(data) > 1:
        shown = ", ".join(f"{name} with {train} training and {test} test images" for name, train, test in data)
        found.append(f"The runs differ in their data ({shown}): their accuracies are not comparable.")
    for key in ("dataset.tokenizer", "dataset.vocab_size", "dataset.context"):
        values = _sets(rows, lambda run: str(run.result.config.get(key)))  # noqa: B023 - asked at once
        if len(values) > 1 and rows[0].task is LANGUAGE_MODELLING:
            found.append(f"The runs differ in {key} ({', '.join(values)}): their perplexities are not comparable.")
    epochs = _sets(rows, lambda run: run.result.last.get("epoch"))
    if len(epochs) > 1:
        found.append(f"The runs differ in length ({', '.join(f'{e:g}' for e in epochs)} epochs).")
    for name in _sets(rows, lambda run: _teacher(run).name):
        weights = [{_teacher(run).weights for run in row.runs} for row in rows if _teacher(row.runs[0]).name == name]
        if name and any(w != weights[0] for w in weights):
            count = len(set().union(*weights))
            found.append(f"Teacher {name} is not the same in all rows: {count} different sets of weights.")
    for row in rows:
        seeds = [tuple(sorted((k, v) for k, v in run.result.config.items() if _is_seed(k))) for run in row.runs]
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(str(run.folder) for run in row.runs)
            found.append(f"A seed is counted more than once in n = {len(seeds)}: {folders}")
    return found


def _row(runs: list[Run], columns: Sequence[str], metrics: Sequence[str]) -> Row:
    values = {**settings(runs[0]), **named_choices(runs[0])}
    return Row(
        differs={column: values[column] for column in columns if column in values},
        teacher=Figure.of(_teacher(run).metrics.get(task_of(runs).on("test")) for run in runs),
        metrics={name: Figure.of(run.result.figure(name) for run in runs) for name in metrics},
        agreement=Figure.of(run.result.last.get("test/agreement") for run in runs),
        seconds=Figure.of(run.result.seconds for run in runs),
        cost={name: Figure.of(run.cost(name) for run in runs) for name in COSTS},
        runs=runs,
    )


def _keys(configs: Sequence[Mapping[str, object]]) -> list[str]:
    return sorted({key for config in configs for key in config})


def _unexplained(
    differing: Sequence[str], configs: Sequence[Mapping[str, object]], choices: Sequence[Mapping[str, object]],
    varied: Sequence[str],
) -> list[str]:  # fmt: skip
    """Keys whose values differ for another reason than that an option of a group differs, which has its own column."""
    found: dict[str, list[Any]] = {}
    for key in differing:
        if key.endswith("_target_"):
            continue
        owners = [group for group in varied if key.startswith((f"{group}.", *_FOLLOWS.get(group, ())))]
        if any(_constant_within(configs, key, [chosen.get(group) for chosen in choices]) for group in owners):
            continue
        values = [config.get(key) for config in configs]
        leaf = key.rsplit(".", 1)[-1]
        if not any(other.rsplit(".", 1)[-1] == leaf and values == found[other] for other in found):
            found[key] = values  # optimizer.lr: ${schedule.lr} would only say the same again
    return sorted(found, key=lambda key: (key.startswith("teacher."), key))


def _constant_within(configs: Sequence[Mapping[str, object]], key: str, groups: Sequence[Any]) -> bool:
    seen: dict[Any, Any] = {}
    return all(
        seen.setdefault(group, config.get(key, ...)) == config.get(key, ...) for config, group in zip(configs, groups)
    )


def _distinct(mappings: Sequence[Mapping[str, object]], key: str) -> int:
    """How many values a key has; "not there" is one."""
    values = [mapping.get(key, ...) for mapping in mappings]
    if not values or all(type(value) is type(values[0]) and value == values[0] for value in values):
        return min(len(values), 1)  # most keys, and much quicker than their texts
    return len(set(map(repr, values)))


def _sets(rows: Sequence[Row], of: Callable[[Run], Any]) -> list[Any]:
    """The distinct values over all runs, in order of appearance."""
    return list(dict.fromkeys(of(run) for row in rows for run in row.runs))


def _counts(run: Run) -> tuple[Any, Any]:
    images = run.result.images
    return images.get("train"), images.get("test")


def _teacher(run: Run) -> NetworkResult:
    return run.result.teacher or NetworkResult()


def neutral(value: Any, places: Sequence[tuple[str, str]] = ()) -> Any:
    """A value as it counts: 4.0 is 4, and a path below one of the places begins with the key that stands beside it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        for place, key in places:
            if value.startswith(place) and (value == place or value[len(place)] == "/"):
                return f"<{key}>{value[len(place) :]}"
    return value


def _rank(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)
