"""Training stages: a student under one loss, in one run folder, exactly once; several side by side as a cohort."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import Timeout

from kdbench import world
from kdbench.data.batches import EvaluationBatches, TrainingBatches
from kdbench.engine.checkpoint import CHECKPOINT, STUDENT, Checkpoints, resume_epoch, save_state, save_weights
from kdbench.engine.device import Placement, place
from kdbench.engine.evaluate import Evaluator
from kdbench.engine.graph import learns
from kdbench.engine.log import NoLog, ProgressView, RunLog
from kdbench.engine.loggers import About, Guarded
from kdbench.engine.trainer import Member, fit, remedies
from kdbench.errors import Busy, UserError, require, under
from kdbench.files import lock, read_object, remove_leftovers, write_json
from kdbench.losses.base import DistillationLoss
from kdbench.models.base import count_parameters, flops_of
from kdbench.models.weights import read_safetensors, weight_hash
from kdbench.results.result import NetworkResult, RunResult, as_part, is_finished, read_result
from kdbench.results.status import LOCK, START, note_failure
from kdbench.runs.folder import (
    LOSS,
    about_weights,
    clear,
    describe_git,
    describe_machine,
    describe_versions,
    save_config,
    save_network,
)
from kdbench.runs.identity import keep, refuse_other
from kdbench.runs.obtain import tell_of_chance
from kdbench.runs.recipe import Record
from kdbench.runs.serving import Served, serve
from kdbench.runs.stage import (
    SeenBy,
    Stage,
    Start,
    eval_sets,
    first_stage,
    identity_of,
    make_learner,
    train_batches,
    with_extension,
)
from kdbench.runs.taught import TaughtBy
from kdbench.teachers.constant import NoTeacher
from kdbench.types import Calibration

log = logging.getLogger(__name__)

RECENT = 60.0  # seconds after its last file that another machine may well be at work still


def run_stage(stage: Stage, teacher: TaughtBy | None) -> RunResult:
    """Train one student and return its result. A finished stage is not run again, an unfinished one continues.

    Raises Diverged if its loss became NaN, and Busy if another process is at work in the folder, UserError if it holds
    another run.
    """
    outcome = run_stages([stage], teacher)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_stages(stages: Sequence[Stage], teacher: TaughtBy | None) -> list[RunResult | Exception]:
    """Train several students side by side on one stream of batches and one teacher pass; results in their order."""
    failures: dict[Path, Exception] = {}
    todo = []
    with contextlib.ExitStack() as stack:
        for stage in stages:
            try:
                todo += [] if world.agreed(lambda: _done(stack, stage, teacher)) else [stage]  # noqa: B023
            except UserError as error:
                failures[stage.folder] = error
        todo = _ready(todo, teacher, failures)
        parts = [todo] if todo else []
        while parts:
            part = parts.pop(0)
            with contextlib.ExitStack() as closing:  # whatever one of the logs raises, all are closed
                training, failed = _begin(part, teacher, closing)
                if training is not None:
                    fit(training.members, *training.served, training.until, training.view)
                    failed |= _conclude(training, teacher)
            del training  # its memory goes to those that go on
            parts += _again(part, failed)
            for folder, failure in failed.items():
                note_failure(folder, failure)
            failures |= failed
    return [failures.get(stage.folder) or read_result(stage.folder) for stage in stages]


def _done(stack: contextlib.ExitStack, stage: Stage, teacher: TaughtBy | None) -> bool:
    """Whether there is nothing to do for a stage, whose folder is this process's from here on."""
    stack.enter_context(only_here(stage.folder))
    return finished(stage, teacher)


def _again(stages: Sequence[Stage], failures: dict[Path, Exception]) -> list[list[Stage]]:
    """Those for which the memory was too small, in one or two parts that go on from their last checkpoints; they have
    not failed yet."""
    short = [stage for stage in stages if isinstance(failures.get(stage.folder), torch.OutOfMemoryError)]
    if not short or len(stages) == 1:
        return []
    for stage in short:
        del failures[stage.folder]
    middle = len(short) if len(short) < len(stages) else len(short) // 2
    parts = [part for part in (short[:middle], short[middle:]) if part]
    sizes = " and ".join(str(len(part)) for part in parts)
    log.warning("memory was too small for %d of %d runs; they go on by %s", len(short), len(stages), sizes)
    gc.collect()
    torch.cuda.empty_cache()
    return parts


def _ready(stages: Sequence[Stage], teacher: TaughtBy | None, failures: dict[Path, Exception]) -> list[Stage]:
    """The stages after what comes before their trainings; one that fails there stops nobody else."""
    found = []
    for stage in stages:
        try:
            found.append(_after_first(stage, teacher))
        except Exception as error:  # whatever a training raises
            failures[stage.folder] = error
    return found


def _after_first(stage: Stage, teacher: TaughtBy | None) -> Stage:
    """The stage as it goes on from the training that its loss has before the main one; that is a run in its folder.

    Raises what that training raises.
    """
    first = stage.recipe.loss.make().first_training
    if first is None:
        return stage
    own = first_stage(stage, first)
    log.info("%s: %d epochs of %s first", stage.folder, first.epochs, first.loss.formula, extra=_about(stage))
    result = run_stage(own, teacher)
    student = read_safetensors(own.folder / STUDENT)
    adapters = {first.place + key: value for key, value in read_safetensors(own.folder / LOSS).items()}
    given = stage.start or Start({})
    weights = {**given.weights, **student} if first.student else given.weights
    start = Start(weights, given.frozen, {**given.loss, **adapters})
    return replace(stage, start=start, before=(*stage.before, as_part(result, own.folder, stage.folder)))


def finished(stage: Stage, teacher: TaughtBy | None) -> bool:
    """Whether the folder holds this stage's whole result. Clears the folder if the stage is forced.

    Raises UserError if it holds another run, finished or not.
    """
    if stage.recipe.force:
        clear(stage.folder)
    refuse_other(stage.folder, identity_of(stage, teacher))
    return is_finished(stage.folder)


@contextlib.contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """A block in which no other process works in a run folder. Raises Busy if one does."""
    with contextlib.ExitStack() as stack:
        world.agreed(lambda: stack.enter_context(_locked(folder)))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder / LOCK, 0):
            remove_leftovers(folder)
            _doubt_the_lock(folder)
            yield
    except Timeout as error:
        raise Busy(str(folder)) from error


def _doubt_the_lock(folder: Path) -> None:
    """Say so if a process of another machine was at work here a moment ago: its lock may not reach this one."""
    if is_finished(folder) or not (folder / START).exists():
        return
    host = read_object(folder / START).get("host")
    ago = time.time() - max(path.stat().st_mtime for path in folder.iterdir() if path.name != LOCK)
    if host not in (None, socket.gethostname()) and ago < RECENT:
        log.warning(
            "%s: %s was at work here %.0f s ago. Unless it has just ended, the locks of this file system do not reach "
            "other machines, and both would train the same run", folder, host, max(ago, 0),
        )  # fmt: skip


class _Training(NamedTuple):
    """Students side by side, ready for the first step, or for the one after their last whole epoch."""

    stages: list[Stage]
    members: list[Member]
    served: Served
    until: int
    view: ProgressView
    samples: int  # predictions that an epoch draws from


def _begin(
    stages: Sequence[Stage], teacher: TaughtBy | None, closing: contextlib.ExitStack
) -> tuple[_Training | None, dict[Path, Exception]]:
    """What is needed to train stages side by side, None if none of them can start, and why some cannot. What they
    write to is closed by `closing`."""
    first, recipe = stages[0], stages[0].recipe
    placement = place(recipe.trainer)
    batches = train_batches(first, placement)
    sets = eval_sets(first.data, recipe.trainer, placement)
    started, members, failures = _members(stages, teacher, batches, sets, placement)
    if not members:
        return None, failures
    until = min(first.stop_epoch or recipe.schedule.epochs, recipe.schedule.epochs)
    done = min(m.epochs_done for m in members)
    title = started[0].recipe.student.name if len(started) == 1 else f"{len(started)} students"
    steps = until * batches.steps, done * batches.steps
    per_step = recipe.schedule.batch_size * batches.predictions
    view = ProgressView(title, *steps, per_step, recipe.trainer.progress, first.data.task, first.data.info.samples)
    for member in members:
        closing.callback(member.log.close)
    closing.callback(view.close)
    served = Served(batches, NoTeacher())
    if teacher is not None:
        students = [(s.recipe.loss.name, m.learner.distiller) for s, m in zip(started, members, strict=True)]
        served = serve(teacher, students, first.data, batches, placement, until - done)
    return _Training(started, members, served, until, view, batches.size * batches.predictions), failures


def _conclude(training: _Training, teacher: TaughtBy | None) -> dict[Path, Exception]:
    """The results of those that have not failed; why the others have."""
    failures = {}
    for stage, member in zip(training.stages, training.members, strict=True):
        if member.learner.failure is None:
            _finish(stage, member, teacher, training.samples)
        else:
            failures[stage.folder] = member.learner.failure
        member.log.end(member.learner.failure is None)
    return failures


def _members(
    stages: Sequence[Stage], teacher: TaughtBy | None, batches: TrainingBatches,
    sets: Mapping[str, EvaluationBatches], placement: Placement,
) -> tuple[list[Stage], list[Member], dict[Path, Exception]]:  # fmt: skip
    """The stages that can start, their members, and why the others cannot: one bad configuration stops nobody else."""
    made: list[tuple[Stage, Member]] = []
    failures: dict[Path, Exception] = {}
    for stage in stages:
        try:
            stage = with_extension(stage, teacher)
            made.append((stage, _member(stage, teacher, batches, sets, placement)))
        except Exception as error:  # whatever a network or a loss raises while it is built; the caller reports it
            failures[stage.folder] = error
    return [stage for stage, _ in made], [member for _, member in made], failures


def _member(
    stage: Stage,
    teacher: TaughtBy | None,
    batches: TrainingBatches,
    sets: Mapping[str, EvaluationBatches],
    placement: Placement,
) -> Member:
    epochs_done, state = world.agreed(lambda: resume_epoch(stage.folder))
    if epochs_done:
        log.info("%s: continues after epoch %d", stage.folder, epochs_done, extra=_about(stage))
    learner = make_learner(stage, teacher, batches, sets, placement)
    calibration = _calibrate(learner.distiller.loss, stage, teacher) if state is None else None
    if state is None and teacher is not None and (feature := learner.distiller.loss.surveyed):
        seen = SeenBy(teacher.trained(), feature, stage.data.read_by_teacher(), placement)
        with under(stage.recipe.loss.key):
            learner.distiller.loss.survey(seen)
    recipe, record = stage.recipe, stage.recipe.record
    begun = {"started": _now(), "epochs_done": epochs_done}
    about_run = {**begun, "choices": dict(record.choices), "config": record.config}
    keep(stage.folder, identity_of(stage, teacher), stage.data.stamp, about_run)
    save_config(stage.folder, record.tree)
    rows = None if state is None else state.get("rows")
    run_log = RunLog(stage.folder, epochs_done, rows, _shown(stage, epochs_done)) if world.first() else NoLog()
    if not epochs_done:
        _announce(run_log, stage, learner.distiller.loss, calibration)
    evaluator = Evaluator(sets, teacher.reference_on(sets) if teacher else {}, recipe.trainer.evaluate_every)
    average = recipe.trainer.ema is not None
    about = {**about_weights(recipe.student, stage.data, average), "hash": record.hash}
    checkpoints = Checkpoints(stage.folder, recipe.trainer.checkpoint_every, about)
    attached = teacher.teacher if teacher else None
    member = Member(learner, evaluator, checkpoints, run_log, recipe.schedule.epochs, stage.data.task, attached)
    save_network(stage.folder, recipe.student, stage.data, average)
    if state is not None:
        member.restore(state)
    return member


def _shown(stage: Stage, epochs_done: int) -> Guarded | None:
    """The service that is shown this run's rows."""
    recipe = stage.recipe
    if recipe.logger is None:
        return None
    return Guarded(recipe.logger(), About(stage.folder, recipe.record.config, recipe.record.tags), bool(epochs_done))


def _calibrate(loss: DistillationLoss, stage: Stage, teacher: TaughtBy | None) -> Calibration | None:
    """Let a loss choose its own coefficients on the validation split, and keep what it found in the run folder."""
    if not loss.needs_calibration:
        return None
    stage.recipe.refuse_uncalibrated(stage.data)
    require(teacher is not None, "teacher", "none", f"a network, since loss={stage.recipe.loss.name} is fitted to one")
    assert teacher is not None and stage.data.val is not None
    logits = teacher.reference["val"]
    found = loss.calibrate(logits, stage.data.val.wanted.to(logits.device))
    write_json(stage.folder / f"{found.name}.json", found.record | {"candidates": found.table})
    return found


def _announce(run_log: RunLog, stage: Stage, loss: DistillationLoss, calibration: Calibration | None) -> None:
    record = stage.recipe.record
    log.info("loss %s: %s", stage.recipe.loss.name, loss.formula, extra=_about(stage))
    if stage.added:
        log.info("student %s: keeps %s", stage.recipe.student.name, stage.added, extra=_about(stage))
    rows = "\n".join(f"| {key} | {value} |" for key, value in record.config.items())
    run_log.text("config", f"| key | value |\n|---|---|\n{rows}")
    run_log.text("formula", loss.formula)
    if not stage.folder.is_relative_to(stage.recipe.teachers):  # teachers would fill the tab with keys of their own
        plain = ("hydra", "paths", "trainer.progress")
        typed = " ".join(word for word in record.overrides if not word.startswith(plain))
        run_log.hparams_start(_hparams(record), trial=f"{record.hash[:8]} {typed}".strip())
    if calibration is not None:
        for name, figure in calibration.figures.items():
            run_log.figure(f"{calibration.name}/{name}", figure)


def _about(stage: Stage) -> dict[str, str]:
    """Marks a log line as one run's own: in a cohort it goes into that run's log file only."""
    return {"run": str(stage.folder)}


def _hparams(record: Record) -> dict[str, object]:
    """The choices, what was typed, and the numbers that sweeps are usually over."""
    prefixes = ("loss.", "schedule.", "optimizer.", "student.")
    numbers = {k: v for k, v in record.config.items() if k.startswith(prefixes) and isinstance(v, (bool, int, float))}
    typed: dict[str, object] = {k.lstrip("+"): v for k, _, v in (entry.partition("=") for entry in record.overrides)}
    typed = {k: record.config.get(k, v) for k, v in typed.items() if k not in record.choices}
    return {**record.choices, **numbers, **typed, "seed": record.config.get("seed")}


def _finish(stage: Stage, member: Member, teacher: TaughtBy | None, train_images: int) -> None:
    """Export the student and write result.json, the last file of a run."""
    learner, recipe, record = member.learner, stage.recipe, stage.recipe.record
    save_weights(stage.folder / STUDENT, learner.network, dict(member.checkpoints.about))
    if stage.keeps_loss:
        save_state(stage.folder / LOSS, learner.distiller.loss.state_dict(), {})
    predictions = member.evaluator.predictions(learner.network)
    if predictions is not None:
        predictions.write(stage.folder)
    data, last = stage.data, dict(member.last)
    if not stage.keeps_loss and recipe.trainer.limit_steps is None:
        tell_of_chance(recipe.student.name, last, data, remedies(learner.distiller.loss))
    images = {"train": train_images, "val": len(data.val.wanted) if data.val else 0, "test": len(data.test.wanted)}
    versions = describe_versions()
    RunResult(
        name=stage.folder.name, kdbench=versions["kdbench"], finished=_now(), hash=record.hash,
        identity=identity_of(stage, teacher).as_json(),
        choices=dict(record.choices), config=record.config, overrides=record.overrides,
        tags=record.tags, formula=learner.distiller.loss.formula, seed=recipe.seeds.init,
        task=data.task.name, samples=data.info.samples,
        teacher=teacher.record() if teacher else None,
        student=NetworkResult(
            recipe.student.name, parameters=count_parameters(learner.network),
            weights=weight_hash(learner.network.state_dict()), flops=flops_of(learner.network, data.info),
            more={"added": stage.added} if stage.added else {},
        ),
        cost=dict(member.cost or {}),
        machine=describe_machine(learner.distiller.placement.device) | {"recorded": learner.recorded},
        last=last, best=member.best, figures=teacher.recovered(last, data.task) if teacher else {}, images=images,
        device=str(learner.distiller.placement.device), precision=learner.distiller.placement.precision,
        versions=versions, stages=stage.before,
        seconds=round(member.seconds + sum(part.seconds for part in stage.before), 3),
        images_per_second=round(train_images * member.epochs_done / max(member.seconds, 1e-9), 1),
        more={"git": describe_git()},
    ).write(stage.folder)  # fmt: skip
    if teacher is None or not learns(teacher.teacher):  # what such a teacher has become lies in the checkpoint
        (stage.folder / CHECKPOINT).unlink(missing_ok=True)  # to go on from; twice the size of the weights, and more


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
