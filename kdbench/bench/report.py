"""One benchmark: everything measured, as plain values for a file and as text for a person."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypedDict

from kdbench.bench.cost import Cost
from kdbench.bench.machine import describe, measure_roofline, peak_memory
from kdbench.bench.parts import time_parts
from kdbench.bench.timing import Contender, Figure, Race, race
from kdbench.bench.workbench import Workbench
from kdbench.models.base import count_parameters

NO_TEACHER = "no teacher"
TABLE, LIVE, PLAIN = "teacher's logits from a table", "teacher asked for every batch", "plain loop"
OWN, PACKED, LOADER = "kdbench", "kdbench, packed", "torchvision's transforms in a DataLoader"


class Spread(TypedDict):
    """A figure with its quartiles; n measurements."""

    median: float
    low: float
    high: float
    n: int


class Step(Spread):
    """Seconds of a step, or of a batch."""

    students: int
    images_per_second: float


class Ratio(Spread):
    """How many times as long; `times` runs against one cohort."""

    times: int


class About(TypedDict):
    """What was measured."""

    dataset: str
    images: list[int]  # the shape of the training set
    kind: str
    teacher: str | None
    teacher_parameters: int | None
    student: str
    student_parameters: int
    loss: str
    batch_size: int
    steps_per_epoch: int
    epochs: int


class Evaluation(TypedDict):
    seconds_an_image: Spread
    images: int


class Floor(TypedDict):
    """What the arithmetic of a step takes at the machine's best rate, and which part of the fastest step that is."""

    seconds: float
    reached: float


class Work(TypedDict):
    """`Cost` of a step."""

    flops: int
    moved: int


class Rates(TypedDict):
    """`Roofline` of the machine."""

    bandwidth: float
    rate: float
    dtype: str


class Data(TypedDict):
    """How fast batches are made."""

    batches: dict[str, Step]
    ratios: dict[str, Ratio]


class Benchmark(TypedDict):
    """Everything measured, as it is kept as JSON."""

    configuration: About
    machine: dict[str, object]
    steps: dict[str, Step]
    ratios: dict[str, Ratio]
    parts: dict[str, Spread]
    evaluation: Evaluation
    cost: dict[str, Work]
    roofline: Rates
    floor: Floor
    peak_memory: int


class Way(NamedTuple):
    """How kdbench trains: `served` is "table" or "live"."""

    served: str
    members: int


def ways(bench: Workbench, members: int) -> dict[str, Way]:
    """What can train this configuration: with a table (if one can serve), with the live teacher, and as a cohort."""
    names = {TABLE: "table"} if bench.table() is not None else {}
    names[LIVE if bench.teacher else NO_TEACHER] = "live"
    found: dict[str, Way] = {}
    for name, served in names.items():
        found[name] = Way(served, 1)
        if members > 1:
            found[cohort(name, members)] = Way(served, members)
    return found


def contender(bench: Workbench, way: Way) -> Contender:
    """A way to train, ready to take turns."""
    served = bench.table() if way.served == "table" else bench.live()
    assert served is not None
    return bench.steps(served, [bench.learner() for _ in range(way.members)])


def batches_alone(stream: Iterator[Any], wait: Callable[[], None], lead: int) -> Contender:
    """Batches of an endless stream, and nothing done with them. `lead`: how many may have been made between turns; they
    are taken before the clock starts."""

    def turn(batches: int) -> float:
        for _ in range(lead):
            next(stream)
        wait()
        begin = time.perf_counter()
        for _ in range(batches):
            next(stream)
        wait()
        return time.perf_counter() - begin

    return turn


def endless(epoch: Callable[[int], Iterable[Any]]) -> Iterator[Any]:
    """The batches of one epoch after the other."""
    for number in itertools.count():
        yield from epoch(number)


def measure_data(contenders: Mapping[str, Contender], batch: int, budget: float) -> Data:
    """How fast batches are made, each contender in turn, as `measure` has it for steps."""
    timed = race(contenders, budget, 0.0 if budget < 1 else min(2.0, budget / (4 * len(contenders))))
    slow = [*contenders][-1]  # what the others are compared with
    return {
        "batches": {name: _step(timed.step(name), batch, 1) for name in contenders},
        "ratios": {f"{slow} / {name}": _ratio(timed.ratio(slow, name), 1) for name in [*contenders][:-1]},
    }


def data_text(result: Data, kind: str) -> str:
    """What `measure_data` found, for a terminal."""
    width = max(map(len, result["batches"]))
    lines = [f"{'':<{width}}  ms a batch, quartiles    n  {kind + '/s':>9}"]
    for name, one in result["batches"].items():
        low, high = 1e3 * one["low"], 1e3 * one["high"]
        spread = f"({low:.2f} to {high:.2f})  {one['n']:>3}"
        lines.append(f"{name:<{width}}  {1e3 * one['median']:9.2f} {spread}  {one['images_per_second']:>9,.0f}")
    return "\n".join([*lines, "", *_ratio_lines(result["ratios"])])


def cohort(name: str, members: int) -> str:
    return f"{members} students at once, {name}"


def measure(
    bench: Workbench, ours: Mapping[str, Contender], others: Mapping[str, Contender], budget: float, members: int = 1,
    quick: bool = False,
) -> Benchmark:  # fmt: skip
    """Time `ours` (kdbench's `ways`) and `others` (the plain loop, a peer) in turn for about `budget` seconds.

    `quick` measures almost nothing, for tests.
    """
    turn = 0.0 if quick else min(2.0, budget / (4 * (len(ours) + len(others))))
    timed = race({**ours, **others}, 0.0 if quick else budget, turn)
    # Where the time goes in the fastest way that one student has.
    served = bench.table() or bench.live()
    parts = time_parts(bench, served, 2 if quick else 7)
    roofline = measure_roofline(bench.placement, small=quick)
    uses_teacher = TABLE not in ours and bench.teacher is not None
    cost = parts.student + parts.teacher if uses_teacher else parts.student
    floor = roofline.floor(cost.flops, 0)
    batch = bench.recipe.schedule.batch_size
    return {
        "configuration": about(bench),
        "machine": describe(bench.placement),
        "steps": {name: _step(timed.step(name), batch, members if "at once" in name else 1) for name in timed.seconds},
        "ratios": _ratios(timed, ours, others, members),
        "parts": {name: _spread(value) for name, value in parts.seconds.items()},
        "evaluation": {"seconds_an_image": _spread(parts.evaluation), "images": bench.sets["test"].size},
        "cost": {"student": _work(parts.student), "teacher": _work(parts.teacher)},
        "roofline": {"bandwidth": roofline.bandwidth, "rate": roofline.rate, "dtype": roofline.dtype},
        "floor": {"seconds": floor, "reached": floor / timed.step(next(iter(ours))).median},
        "peak_memory": peak_memory(bench.placement),
    }


def about(bench: Workbench) -> About:
    recipe, data = bench.recipe, bench.data
    student = bench.stage.recipe.student.make(data.info)
    return {
        "dataset": data.name,
        "images": list(data.train.inputs.shape),
        "kind": data.info.samples,
        "teacher": bench.teacher.name if bench.teacher else None,
        "teacher_parameters": bench.teacher.parameters if bench.teacher else None,
        "student": recipe.student.name,
        "student_parameters": count_parameters(student),
        "loss": recipe.loss.name,
        "batch_size": recipe.schedule.batch_size,
        "steps_per_epoch": bench.batches.steps,
        "epochs": recipe.schedule.epochs,
    }


def _spread(figure: Figure) -> Spread:
    return {"median": figure.median, "low": figure.low, "high": figure.high, "n": figure.n}


def _ratio(figure: Figure, times: int) -> Ratio:
    return {**_spread(figure), "times": times}


def _work(cost: Cost) -> Work:
    return {"flops": cost.flops, "moved": cost.moved}


def _step(seconds: Figure, batch: int, students: int) -> Step:
    return {**_spread(seconds), "students": students, "images_per_second": batch * students / seconds.median}


def _ratios(timed: Race, ours: Iterable[str], others: Iterable[str], members: int) -> dict[str, Ratio]:
    """How many times as long the others take for the same training: so many students, so many of its runs."""
    found: dict[str, Ratio] = {}
    for other in others:
        for name in ours:
            times = members if "at once" in name else 1
            found[f"{other} / {name}"] = _ratio(timed.ratio(other, name, times), times)
    if members > 1:
        for name in ours:
            if cohort(name, members) in ours:
                figure = timed.ratio(name, cohort(name, members), members)
                found[f"one after the other / {cohort(name, members)}"] = _ratio(figure, members)
    return found


def text(result: Benchmark) -> str:
    """The whole result for a terminal."""
    lines = [*_head(result), "", *_steps(result), ""]
    if result["ratios"]:
        lines += [*_ratio_lines(result["ratios"]), ""]
    lines += [*_part_lines(result), "", *_cost_lines(result)]
    return "\n".join(lines)


def _head(result: Benchmark) -> list[str]:
    c, m = result["configuration"], result["machine"]
    taught = f"{c['teacher']} ({c['teacher_parameters']:,}) -> " if c["teacher"] else ""
    shape = "x".join(str(side) for side in c["images"][1:])
    kind = "channels_last" if m["channels_last"] else "channels_first"
    return [
        f"{taught}{c['student']} ({c['student_parameters']:,} parameters), loss {c['loss']}, {c['dataset']}: "
        f"{c['images'][0]:,} {c['kind']} of {shape}, batch {c['batch_size']}",
        f"{m['name']}: {m['device']}, {m['threads']} threads of {m['cores']} cores (load {m['load']}), "
        f"{m['precision']}, {kind}, torch {m['torch']}",
    ]


def _steps(result: Benchmark) -> list[str]:
    steps, epoch = result["steps"], result["configuration"]["steps_per_epoch"]
    width = max(map(len, steps))
    rate = f"{result['configuration']['kind']}/s"
    lines = [f"{'':<{width}}  ms a step, quartiles    n  {rate:>9}   an epoch"]
    for name, step in steps.items():
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(
            f"{name:<{width}}  {1e3 * step['median']:9.2f} ({low:.2f} to {high:.2f})  {step['n']:>3}"
            f"  {step['images_per_second']:>9,.0f}  {_duration(step['median'] * epoch):>8}"
        )
    return lines


def _ratio_lines(ratios: Mapping[str, Ratio]) -> list[str]:
    width = max(map(len, ratios))
    lines = ["how many times as long (median of the rounds, quartiles)"]
    for name, ratio in ratios.items():
        note = f", {ratio['times']} runs against one cohort" if ratio["times"] > 1 else ""
        spread = f"({ratio['low']:.2f} to {ratio['high']:.2f}), n = {ratio['n']}"
        lines.append(f"{name:<{width}}  {ratio['median']:6.2f} {spread}{note}")
    return lines


def _part_lines(result: Benchmark) -> list[str]:
    parts = result["parts"]
    whole = sum(part["median"] for part in parts.values())
    lines = ["where a step goes, part by part"]
    lines += [
        f"  {name:<22}{1e3 * part['median']:9.2f} ms  {100 * part['median'] / whole:5.1f} %"
        for name, part in parts.items()
    ]
    evaluation = result["evaluation"]
    seconds, kind = evaluation["seconds_an_image"]["median"], result["configuration"]["kind"]
    return [
        *lines,
        f"  evaluation of {evaluation['images']:,} {kind}: {_duration(seconds * evaluation['images'])}",
    ]


def _cost_lines(result: Benchmark) -> list[str]:
    cost, roofline, floor = result["cost"], result["roofline"], result["floor"]
    student, teacher = (Cost(one["flops"], one["moved"]) for one in (cost["student"], cost["teacher"]))
    busy = ": the machine had other work while its rate was measured" if floor["reached"] > 1 else ""
    return [
        f"cost of a step: student {_cost(student)}; teacher {_cost(teacher)}",
        f"this machine: copies {roofline['bandwidth'] / 1e9:,.1f} GB/s, multiplies matrices in {roofline['dtype']} at "
        f"{roofline['rate'] / 1e9:,.0f} GFLOP/s",
        f"at that rate the arithmetic alone takes {1e3 * floor['seconds']:.2f} ms, "
        f"{100 * floor['reached']:.0f} % of the fastest step above{busy}",
        f"peak memory {result['peak_memory'] / 2**20:,.0f} MiB",
    ]


def _cost(cost: Cost) -> str:
    return f"{cost.flops / 1e9:,.2f} GFLOP, {cost.moved / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
