"""What one training is made of: its data, student, loss and optimizer, and how they become batches and a learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import Placement
from kdbench.engine.distiller import Distiller
from kdbench.engine.evaluate import evaluating
from kdbench.engine.learner import Learner
from kdbench.engine.options import OptimizerOptions, ScheduleOptions, TrainerOptions, require
from kdbench.engine.schedule import lr_factors
from kdbench.losses.base import DistillationLoss
from kdbench.runs.given import GivenTeacher
from kdbench.runs.recipe import LossSpec, NetworkSpec, Recipe, Record, Seeds


@dataclass(frozen=True)
class Stage:
    """All that one training is made of. Stages that agree in data, schedule length and teacher can run as a cohort."""

    folder: Path
    data: Bundle
    split: Split  # what it trains on
    student: NetworkSpec
    loss: LossSpec
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    trainer: TrainerOptions
    seeds: Seeds
    record: Record
    stop_epoch: int | None = None
    force: bool = False
    # Called once on the fresh student: shares, freezes or fills layers.
    adapt: Callable[[nn.Module, GivenTeacher | None], None] | None = None


def student_stage(recipe: Recipe, data: Bundle, out: Path) -> Stage:
    """The recipe's own student as a stage."""
    return Stage(
        folder=out,
        data=data,
        split=data.transfer,
        student=recipe.student,
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        trainer=recipe.trainer,
        seeds=recipe.seeds,
        record=recipe.record,
        force=recipe.force,
    )


def train_batches(stage: Stage, placement: Placement) -> TrainingBatches:
    trainer = stage.trainer
    loading = Loading(
        stage.schedule.batch_size, stage.seeds.data, placement.device, placement.channels_last, trainer.drop_last,
        trainer.limit_steps,
    )  # fmt: skip
    return TrainingBatches(stage.data, stage.split, loading)


def eval_sets(data: Bundle, trainer: TrainerOptions, placement: Placement) -> dict[str, EvaluationBatches]:
    """ "val" (where there is one) and "test", as batches on the device."""
    splits = {"val": data.val, "test": data.test}
    kept = {name: split for name, split in splits.items() if split is not None}
    loading = Loading(trainer.eval_batch_size, device=placement.device, channels_last=placement.channels_last)
    return {name: EvaluationBatches(data, split, loading) for name, split in kept.items()}


def make_learner(
    stage: Stage,
    teacher: GivenTeacher | None,
    batches: TrainingBatches,
    sets: Mapping[str, EvaluationBatches],
    placement: Placement,
) -> Learner:
    """A stage's student under its loss, with its optimizer, ready for the first step."""
    torch.manual_seed(stage.seeds.init)
    student = stage.student.make(stage.data.info)
    if stage.adapt is not None:
        stage.adapt(student, teacher)
    student = placement.put(student)
    loss = stage.loss.make()
    require(
        teacher is not None or not loss.uses_teacher,
        "teacher",
        "none",
        f"a network, since loss={stage.loss.name} learns from one",
    )
    _prepare_loss(loss, student, teacher, stage.data, sets, placement)
    distiller = Distiller(student, loss.to(placement.device), placement)
    factors = lr_factors(stage.schedule, batches.steps)
    truth = _truth(stage)
    return Learner(distiller, stage.optimizer, stage.trainer, factors, batches.steps, stage.seeds.init, truth)


def _truth(stage: Stage) -> Tensor | None:
    """The true label of every row of the training set, -1 where it is not known; None where labels are as they were."""
    if stage.split.clean is None:
        return None
    table = torch.full((stage.data.num_rows,), -1)
    table[stage.split.rows] = stage.split.clean
    return table


def _prepare_loss(
    loss: DistillationLoss,
    student: nn.Module,
    teacher: GivenTeacher | None,
    data: Bundle,
    sets: Mapping[str, EvaluationBatches],
    placement: Placement,
) -> None:
    """Adapters from real shapes, for losses that have them. Costs two evaluation images through both networks."""
    loss.train_rows = data.num_rows
    if type(loss).setup is DistillationLoss.setup:
        return
    batch = next(iter(sets["test"]))
    small = batch._replace(input=batch.input[:2], view=batch.view[:2])
    with evaluating(student), placement.autocast():
        outputs = student(small.input)
    loss.setup(outputs, teacher.ask(small) if teacher else None)
