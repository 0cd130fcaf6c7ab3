"""result.json: what a finished run says of itself, as one type; written and read here alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdbench import world
from kdbench.errors import UserError, nearest, printable
from kdbench.files import read_json, write_json
from kdbench.results.metrics import TASKS, metric_of

RESULT = "result.json"
FILE_FORMAT = 2  # raise it when a field changes its meaning; 1 is the first edition's, which did not say so

Figures = Mapping[str, "float | None"]  # numbers by name; None: not defined in this run
Entry = TypeVar("Entry")


def lacking(kind: type, name: str, names: Sequence[str], hint: str) -> AttributeError:
    """The error for an attribute that a result has not, or not any more, with what comes nearest."""
    near = nearest(name, names, "Did you mean .{}? ")
    return AttributeError(f"{kind.__name__} has no attribute '{name}'. {near}{hint} It has {', '.join(names)}")


@dataclass(frozen=True)
class NetworkResult:
    """A network of a run: its student, its teacher, or a member of an ensemble that taught."""

    name: str = ""
    folder: str | None = None  # where it lies, if it is a run's or a file's
    parameters: int = 0
    weights: str = ""  # sha256 of names, shapes and bytes
    metrics: Figures = field(default_factory=dict)  # "test/top1", ...; an ensemble's also "members/test/top1": the mean
    members: Sequence[NetworkResult] = ()
    more: Mapping[str, object] = field(default_factory=dict)
    flops: int = 0  # of one input's forward pass; 0: not known


@dataclass(frozen=True)
class StageResult:
    """One training of a procedure that has several."""

    name: str = ""
    folder: str = ""  # from the run's own folder
    teacher: str | None = None
    student: str = ""
    formula: str = ""
    seed: int = 0
    seconds: float = 0.0
    metrics: Figures = field(default_factory=dict)
    more: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """A finished run. What must be there has no default; the first edition's files, and other programs', lack the rest.

    `more` are fields that this edition does not know: kept, and written again.
    """

    choices: Mapping[str, str]  # the option of each group
    config: Mapping[str, object]  # the resolved configuration under dotted keys
    student: NetworkResult
    last: Mapping[str, float]  # after the last epoch: "epoch", "test/top1", ...
    best: Mapping[str, float] | None = None  # at the best epoch by validation; None without a validation split
    teacher: NetworkResult | None = None
    name: str = ""
    kdbench: str = ""
    finished: str = ""  # UTC, ISO 8601
    hash: str = ""
    identity: Mapping[str, object] = field(default_factory=dict)  # what it is a result of (kdbench.runs.identity)
    overrides: Sequence[str] = ()
    tags: Sequence[str] = ()
    formula: str = ""
    seed: int = 0
    task: str = "classification"  # of kdbench.results.metrics.TASKS
    samples: str = "images"  # what the data are counted in
    figures: Figures = field(default_factory=dict)  # what a procedure or an ensemble found besides
    images: Mapping[str, int] = field(default_factory=dict)  # in each split
    device: str = ""
    precision: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # of training, evaluation left out
    images_per_second: float = 0.0
    cost: Figures = field(default_factory=dict)  # of training: cpu_seconds, gpu_seconds, energy (J)
    machine: Mapping[str, object] = field(default_factory=dict)  # host, processor, gpu, peak_memory, ...
    stages: Sequence[StageResult] = ()
    tables: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)  # a procedure's rows by name
    more: Mapping[str, object] = field(default_factory=dict)

    if not TYPE_CHECKING:  # which would then take any name

        def __getattr__(self, name: str) -> Any:
            """Only for what there is not: a notebook may know a result by other names."""
            if name.startswith("_"):  # pickle and copy ask for some
                raise AttributeError(name)
            hint = "Figures are had by name: .figure('last'), .figure('test/nll'); .figure_names() has them all."
            raise lacking(RunResult, name, [one.name for one in fields(RunResult)], hint)

    def figure(self, name: str) -> float | None:
        """A number by its name; None if this run has none of that name.

        "last" and "best" are the task's primary metric on the test set, after the last epoch and at the best one by
        validation; else a name of `last` or `figures` ("test/nll", "ensemble/3/test/top1"), of `best` as
        "best/val/top1", or of `cost` as "cost/energy"; "cost/flops" is the student's.
        """
        best = self.best or {}
        if name in ("last", "best"):
            return (self.last if name == "last" else best).get(TASKS[self.task].on("test"))
        if name.startswith("best/"):
            return best.get(name.removeprefix("best/"))
        if name.startswith("cost/"):
            return self._costs().get(name.removeprefix("cost/"))
        return self.last[name] if name in self.last else self.figures.get(name)

    def figure_names(self) -> list[str]:
        """The names that `figure` has a number for, "last" and "best" left out."""
        best, cost = (f"best/{name}" for name in self.best or {}), (f"cost/{name}" for name in self._costs())
        return [*self.last, *self.figures, *best, *cost]

    def _costs(self) -> dict[str, float | None]:
        known = {"memory": self.machine.get("peak_memory"), "gpu_memory": self.machine.get("peak_gpu_memory")}
        known["flops"] = self.student.flops or None
        return {**self.cost, **{name: value for name, value in known.items() if isinstance(value, (int, float))}}

    def monitored(self, name: str) -> float | None:
        """The figure that a sweeper optimises: `figure`, or for "auto" the primary metric on the validation set, on the
        training set without one. Raises UserError for a name that there is not."""
        if name == "auto":
            task = TASKS[self.task]
            return self.last.get(task.on("val"), self.last.get(task.on("train")))
        value = self.figure(name)
        if value is None:
            raise UserError("monitor", name, f"auto or one of {', '.join(self.figure_names())}")
        return value

    def write(self, folder: Path) -> None:
        """result.json, the last file of a run: a folder that has it is finished."""
        world.agreed(lambda: write_json(folder / RESULT, {"format": FILE_FORMAT, **as_json(self)}))


def as_part(result: RunResult, folder: Path, whole: Path) -> StageResult:
    """A finished stage in `folder` as an entry of the result of the run in folder `whole`."""
    tops = TASKS[result.task].primaries(result.last)
    return StageResult(
        folder.name,
        str(folder.relative_to(whole)),
        teacher=result.teacher.name if result.teacher else None,
        student=result.student.name,
        formula=result.formula,
        seed=result.seed,
        seconds=result.seconds,
        metrics=tops,
    )


def read_result(folder: Path) -> RunResult:
    """A run folder's result. Raises UserError naming the file if it is missing, damaged, foreign or too new."""
    path = folder / RESULT
    try:
        tree = read_json(path)
        tree = tree if _steers_nothing(path.read_bytes()) else _shown(tree)
    except RecursionError as error:
        raise UserError(f"{path}: no result of kdbench (nested too deeply)") from error
    required = [f.name for f in fields(RunResult) if f.default is MISSING and f.default_factory is MISSING]
    lacking = [name for name in required if not isinstance(tree, dict) or not isinstance(tree.get(name), dict)]
    if lacking:
        raise UserError(f"{path}: no result of kdbench (it lacks {', '.join(lacking)})")
    edition = tree.pop("format", 1)
    if not isinstance(edition, int) or edition > FILE_FORMAT:
        raise UserError(f"{path}: format {edition}, written by a newer kdbench; this one reads up to {FILE_FORMAT}")
    try:
        result = _made(RunResult, tree)
        if result.task not in TASKS:
            raise ValueError(f"task {result.task} is none of {', '.join(TASKS)}")
        for values in (result.last, result.best or {}):
            _numbers(values)
        return replace(
            result,
            student=_made(NetworkResult, tree["student"]),
            teacher=_network(tree.get("teacher")),
            stages=tuple(_made(StageResult, stage) for stage in tree.get("stages", ())),
        )
    except ValueError as error:
        raise UserError(f"{path}: no result of kdbench ({error})") from error


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a result; it is written last."""
    return world.agreed((folder / RESULT).exists)


def _steers_nothing(written: bytes) -> bool:
    """Whether no text in a JSON file can hold what steers a terminal: seen at once, where looking at each text takes a
    third of the time that a result is read in."""
    return b"\\" not in written and written.isascii() and written.decode().replace("\n", "").isprintable()


def _shown(value: Any) -> Any:
    """Every text in it as a terminal can show it: a result may be a stranger's."""
    if isinstance(value, dict):
        return {printable(key): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return printable(value) if isinstance(value, str) else value


# A field's type as it is written above, up to the bracket, and what JSON has for it.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "Mapping": dict, "Figures": dict, "Sequence": list,
    "NetworkResult": dict,
}  # fmt: skip


def _made(kind: Callable[..., Entry], tree: Any) -> Entry:
    """A dataclass from JSON: what it does not know goes into `metrics` if it has such and it is a number, or `more`."""
    if not isinstance(tree, dict):
        raise ValueError(f"{kind.__name__} is {type(tree).__name__}, no mapping")
    written: dict[str, str] = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    known, metrics, more = {}, {}, {}
    for name, value in tree.items():
        if name in written and name not in ("metrics", "more"):
            known[name] = _fitting(name, value, written[name])
        elif "metrics" in written and "/" in name and (value is None or isinstance(value, (int, float))):
            metrics[name] = value
        else:
            more[name] = value
    return kind(**known, **({"metrics": metrics} if "metrics" in written else {}), more=more)


def _network(tree: Any) -> NetworkResult | None:
    if tree is None:
        return None
    made = _made(NetworkResult, tree)
    return replace(made, members=tuple(_made(NetworkResult, one) for one in tree.get("members", ())))


def _fitting(name: str, value: Any, written: str) -> Any:
    kind, _, optional = written.partition(" | ")
    fits = isinstance(value, _KINDS[kind.partition("[")[0]]) or (value is None and optional == "None")
    if not fits:
        raise ValueError(f"{name} is {type(value).__name__}, not {written}")
    return value


def _numbers(values: Mapping[str, object]) -> None:
    """Raises ValueError for a figure that is no number, or a share that no share can be."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {type(value).__name__}, no number")
        if abs(value) > sys.float_info.max and not isinstance(value, float):
            raise ValueError(f"{name} is a number of {len(str(value))} digits")
        if metric_of(name).unit == "%" and not 0 <= value <= 1.000001:  # float32 rounds
            raise ValueError(f"{name} is {value}, no share in [0, 1]")


def as_json(entry: Any) -> Any:
    """A dataclass as JSON has it: numbers by name beside the fields, as they were in the first edition's files."""
    if not isinstance(entry, (NetworkResult, StageResult, RunResult)):
        return [as_json(item) for item in entry] if isinstance(entry, (list, tuple)) else entry
    values = {f.name: getattr(entry, f.name) for f in fields(entry)}
    loose = {**values.pop("metrics", {}), **values.pop("more")}
    if not values.get("members", True):
        del values["members"]
    return {name: as_json(value) for name, value in values.items()} | loose
