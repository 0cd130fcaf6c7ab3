"""Snapshot ensembles: several teachers from one training with warm restarts (Huang et al. 2017)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from kdbench.arguments.ranges import within
from kdbench.engine.schedule import ScheduleOptions
from kdbench.errors import require
from kdbench.models.ensemble import Ensemble, Mean, Tau
from kdbench.results.result import RunResult
from kdbench.runs.ensemble import ensemble_of
from kdbench.runs.obtain import introduced
from kdbench.runs.origin import Published, Trained, label_loss
from kdbench.runs.recipe import LossSpec, NetworkSpec, Recipe, Seeds, TeacherSpec
from kdbench.runs.series import Series, opened
from kdbench.runs.stage import Stage


def snapshot(
    recipe: Recipe,
    out: Path,
    cycles: Annotated[int, within(2, 1000)] = 3,
    keep: Annotated[int, within(2, 1000)] | None = None,
    mean: Mean = "arithmetic",
    tau: Tau = 1.0,
) -> RunResult:
    """Train `teacher=`'s network once with `teacher.schedule` cut into `cycles` equal ones, each a half cosine from the
    peak learning rate to its floor (SGDR, Loshchilov and Hutter 2017); the weights at the end of each are a member. The
    last `keep` members (null: all) teach `student=` as an ensemble, with `mean` at temperature `tau`.

    Every cycle is a stage of its own that starts from the weights of the one before. Momentum starts anew with it; at a
    restart it is the memory of steps near a learning rate of zero. The figures hold every snapshot's accuracy, the
    ensemble's, the members' mean and the share of the gain that the student keeps. With teacher.schedule.cycles the
    same learning rates train one teacher, the last snapshot.
    """
    spec, network = _checked(recipe, cycles, keep)
    recipe.refuse_features("an ensemble of teachers")
    with opened(recipe, out) as series:
        stages = [_cycle(series, spec, network, cycle, cycles) for cycle in range(cycles)]
        members = [series.finished(stage.folder) for stage in stages]
        figures: dict[str, float | None] = {}
        for number, member in enumerate(members, start=1):
            figures |= series.data.task.primaries(member.metrics, f"snapshot{number}")
        join = partial(Ensemble, mean=mean, tau=tau)
        teacher = ensemble_of(members[-(keep or cycles) :], join, recipe, series.data)
        introduced(teacher, series.data, spec.allow_chance)
        stage = series.stage("student", teacher)
        series.run(stage, teacher)
        return series.conclude(stage.folder, figures)


def _checked(recipe: Recipe, cycles: int, keep: int | None) -> tuple[TeacherSpec, NetworkSpec]:
    spec = recipe.need_teacher("a network: it is trained here")
    network = spec.origin.describe(recipe.catalogue)
    require(network.single, "teacher", network.name, "a single network: it is trained here")
    trained = isinstance(spec.origin, (Trained, Published))
    typed = {key: recipe.record.config.get(f"teacher.{key}") for key in ("run", "checkpoint")}
    key, given = next(((key, value) for key, value in typed.items() if value), ("run", network.name))
    require(trained, f"teacher.{key}", given, "null: the snapshots are of its training")
    epochs = spec.schedule.epochs
    fits = epochs % cycles == 0
    require(fits, "procedure.cycles", cycles, f"a divisor of teacher.schedule.epochs = {epochs}")
    require(keep is None or keep <= cycles, "procedure.keep", keep, f"null or from 2 to {cycles}")
    return spec, network


def cycle_schedule(schedule: ScheduleOptions, cycle: int, cycles: int) -> ScheduleOptions:
    """One of the equal parts of a schedule, as a schedule of its own; the warm-up belongs to the first."""
    warmup = schedule.warmup if cycle == 0 else 0
    return replace(schedule, epochs=schedule.epochs // cycles, shape="cosine", cycles=1, warmup=warmup)


def _cycle(series: Series, spec: TeacherSpec, network: NetworkSpec, cycle: int, cycles: int) -> Stage:
    smoothing = spec.label_smoothing
    config = {"weights": {"task": 1.0}, "label_smoothing": smoothing}
    own = replace(
        series.recipe,
        student=network,
        loss=LossSpec("ce", config, label_loss(spec).make),
        # Other data seeds, or every cycle would see the same batches in the same order.
        seeds=Seeds(spec.seed, spec.seed + cycle),
        schedule=cycle_schedule(spec.schedule, cycle, cycles),
        optimizer=spec.optimizer,
    )
    start = series.after(series.last) if cycle else None
    stage = replace(series.stage(f"snapshot{cycle + 1}", recipe=own), split=series.data.train, start=start)
    series.run(stage, None)
    return stage
