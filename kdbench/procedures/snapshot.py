"""Snapshot ensembles: several teachers from one training with warm restarts (Huang et al. 2017)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from kdbench.engine.options import ScheduleOptions, require
from kdbench.losses.ce import CE
from kdbench.models.ensemble import Mean
from kdbench.results.result import RunResult
from kdbench.runs.ensemble import EnsembleOptions, ensemble_of
from kdbench.runs.folder import network_of_run
from kdbench.runs.given import GivenTeacher
from kdbench.runs.recipe import LossSpec, Recipe, Seeds, TeacherSpec
from kdbench.runs.series import Series, opened, top1


def snapshot(
    recipe: Recipe,
    out: Path,
    cycles: int = 3,
    keep: int | None = None,
    mean: Mean = "arithmetic",
    tau: float = 1.0,
) -> RunResult:
    """Train `teacher=`'s network once with `teacher.schedule` cut into `cycles` equal ones, each a half cosine from the
    peak learning rate to its floor (SGDR, Loshchilov and Hutter 2017); the weights at the end of each are a member. The
    last `keep` members (null: all) teach `student=` as an ensemble, with `mean` at temperature `tau`.

    Every cycle is a stage of its own that starts from the weights of the one before. Momentum starts anew with it; at a
    restart it is the memory of steps near a learning rate of zero. The figures hold every snapshot's accuracy, the
    ensemble's, the members' mean and the share of the gain that the student keeps. With teacher.schedule.cycles the
    same learning rates train one teacher, the last snapshot.
    """
    spec = _checked(recipe.teacher, cycles, keep)
    options = EnsembleOptions([], "", mean, tau)
    with opened(recipe, out) as series:
        folders: list[Path] = []
        for cycle in range(cycles):
            folders.append(_cycle(series, spec, cycle, cycles, folders[-1] if folders else None))
        members = [series.finished(folder) for folder in folders]
        figures: dict[str, float | None] = {}
        for number, member in enumerate(members, start=1):
            figures |= top1(member.metrics, f"snapshot{number}")
        teacher = ensemble_of(members[-(keep or cycles) :], recipe, series.data, options, spec.allow_chance)
        stage = series.stage("student", teacher=teacher)
        series.run(stage, teacher)
        return series.conclude(stage.folder, figures)


def _checked(spec: TeacherSpec | None, cycles: int, keep: int | None) -> TeacherSpec:
    own = spec is not None and spec.source is None
    require(own, "teacher", "none or ensemble", "a network: it is trained here")
    assert spec is not None
    given = spec.run or spec.checkpoint
    require(given is None, "teacher.run or checkpoint", given, "null: the snapshots are of its training")
    require(cycles >= 2, "procedure.cycles", cycles, "at least 2")
    epochs = spec.schedule.epochs
    fits = epochs % cycles == 0
    require(fits, "procedure.cycles", cycles, f"a divisor of teacher.schedule.epochs = {epochs}")
    require(keep is None or 2 <= keep <= cycles, "procedure.keep", keep, f"null or from 2 to {cycles}")
    return spec


def cycle_schedule(schedule: ScheduleOptions, cycle: int, cycles: int) -> ScheduleOptions:
    """One of the equal parts of a schedule, as a schedule of its own; the warm-up belongs to the first."""
    warmup = schedule.warmup if cycle == 0 else 0
    return replace(schedule, epochs=schedule.epochs // cycles, shape="cosine", cycles=1, warmup=warmup)


def _cycle(series: Series, spec: TeacherSpec, cycle: int, cycles: int, before: Path | None) -> Path:
    smoothing = spec.label_smoothing
    config = {"weights": {"task": 1.0}, "label_smoothing": smoothing}
    loss = LossSpec("ce", config, lambda: CE({"task": 1.0}, smoothing))
    stage = series.stage(
        f"snapshot{cycle + 1}",
        student=spec.network,
        loss=loss,
        split=series.data.train,
        # Other data seeds, or every cycle would see the same batches in the same order.
        seeds=Seeds(spec.seed, spec.seed + cycle),
        schedule=cycle_schedule(spec.schedule, cycle, cycles),
        optimizer=spec.optimizer,
        adapt=None if before is None else _continues(series, before),
    )
    series.run(stage, None)
    return stage.folder


class _continues:
    """The adaptation of a fresh network that takes over the weights of a finished stage."""

    def __init__(self, series: Series, folder: Path) -> None:
        self.series, self.folder = series, folder

    def __call__(self, student: nn.Module, teacher: GivenTeacher | None) -> None:
        student.load_state_dict(network_of_run(self.folder, self.series.recipe.catalogue)[1].state_dict())
