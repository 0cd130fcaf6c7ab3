"""What one training is made of: its data, student, loss and optimizer, and how they become batches and a learner."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench import world
from kdbench.data.augment.views import Augment, copies_of
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import Placement, evaluation_batch
from kdbench.engine.distiller import Distiller
from kdbench.engine.evaluate import evaluating
from kdbench.engine.learner import Learner
from kdbench.engine.options import TrainerOptions
from kdbench.engine.schedule import lr_factors
from kdbench.errors import require, under
from kdbench.losses.base import DistillationLoss
from kdbench.models.adopt import checkpoint_gradients
from kdbench.models.base import last_layer
from kdbench.runs.identity import Identity
from kdbench.runs.recipe import Recipe
from kdbench.runs.taught import TaughtBy


@dataclass(frozen=True)
class Start:
    """What a fresh student starts from in place of random numbers.

    weights: parameters and buffers by name, on any device; those that are not named keep their own values. frozen:
    paths of layers that are not trained.
    """

    weights: Mapping[str, Tensor]
    frozen: tuple[str, ...] = ()

    def apply(self, student: nn.Module) -> None:
        student.load_state_dict({**student.state_dict(), **self.weights})
        for layer in self.frozen:
            student.get_submodule(layer).requires_grad_(False)


@dataclass(frozen=True)
class Stage:
    """A recipe narrowed to one training: `recipe.student` under `recipe.loss` on one split, in one folder.

    Variations are made with `dataclasses.replace`, of the stage or of its recipe. Stages that agree in data, schedule
    length and teacher can run as a cohort.
    """

    recipe: Recipe
    folder: Path
    data: Bundle
    split: Split  # what it trains on
    stop_epoch: int | None = None
    start: Start | None = None


def student_stage(recipe: Recipe, data: Bundle, folder: Path) -> Stage:
    """The recipe's own student, on the transfer set."""
    return Stage(recipe, folder, data, data.transfer)


def identity_of(stage: Stage, teacher: TaughtBy | None = None) -> Identity:
    """What the stage's result is a result of; `teacher` None: there is none, or it is not there yet."""
    record = stage.recipe.record
    data = stage.data.content if record.alone else None
    return replace(record.identity, data=data, teacher=teacher.identity if teacher else "")


def refuse_views(loss: DistillationLoss, name: str, augment: Augment, mix: object) -> None:
    """Raise the UserError for a loss over several views of an image that batches do not hold, or hold mixed."""
    if loss.views == 1:
        return
    why = f"loss={name} compares {loss.views} views of each image"
    allowed = f"weak_strong, or another SideBySide of {loss.views} augmentations: {why}"
    require(copies_of(augment) == loss.views, "dataset/augment", type(augment).__name__, allowed)
    require(mix is None, "dataset.mix.kind", type(mix).__name__.lower(), f"none: {why}")
    require(world.size() == 1, "loss", name, f"another under torchrun: {why}, and a process has only some rows")


def train_batches(stage: Stage, placement: Placement) -> TrainingBatches:
    recipe, trainer = stage.recipe, stage.recipe.trainer
    loading = Loading(
        recipe.schedule.batch_size, recipe.seeds.data, placement.device, placement.channels_last, trainer.drop_last,
        trainer.limit_steps, recipe.schedule.repeats,
    )  # fmt: skip
    return TrainingBatches(stage.data, stage.split, loading)


def eval_sets(data: Bundle, trainer: TrainerOptions, placement: Placement) -> dict[str, EvaluationBatches]:
    """ "val" (where there is one) and "test", as batches on the device."""
    splits = {"val": data.val, "test": data.test}
    kept = {name: split for name, split in splits.items() if split is not None}
    size = evaluation_batch(trainer, placement.device, data.info)
    loading = Loading(size, device=placement.device, channels_last=placement.channels_last)
    return {name: EvaluationBatches(data, split, loading) for name, split in kept.items()}


def make_learner(
    stage: Stage,
    teacher: TaughtBy | None,
    batches: TrainingBatches,
    sets: Mapping[str, EvaluationBatches],
    placement: Placement,
) -> Learner:
    """A stage's student under its loss, with its optimizer, ready for the first step."""
    recipe = stage.recipe
    torch.manual_seed(recipe.seeds.init)
    student = recipe.student.make(stage.data.info)
    if stage.start is not None:
        stage.start.apply(student)
    if recipe.trainer.grad_checkpointing:
        checkpoint_gradients(student)
    if teacher is not None:
        teacher.teacher.attach(student)
    student = placement.put(student)
    loss = recipe.loss.make()
    refuse_views(loss, recipe.loss.name, stage.data.augment, stage.data.mix)
    with under(recipe.loss.key):
        loss.epochs = recipe.schedule.epochs
        _prepare_loss(loss, student, teacher, stage.data, sets, placement)
    distiller = Distiller(student, loss.to(placement.device), placement)
    factors, truth = lr_factors(recipe.schedule, batches.steps), _truth(stage)
    return Learner(distiller, recipe.optimizer, recipe.trainer, factors, batches.steps, recipe.seeds.init, truth)


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
    teacher: TaughtBy | None,
    data: Bundle,
    sets: Mapping[str, EvaluationBatches],
    placement: Placement,
) -> None:
    """Adapters from real shapes, for losses that have them. Costs two evaluation images through both networks."""
    loss.train_rows = data.num_rows
    loss.attach(student, teacher.network if teacher is not None else None, last_layer)
    if type(loss).setup is DistillationLoss.setup:
        return
    batch = next(iter(sets["test"]))
    small = batch._replace(input=batch.input[:2], view=batch.view[:2])
    with evaluating(student), placement.autocast():
        outputs = student(small.input)
    if teacher is None:
        loss.setup(outputs, None)
        return
    # A teacher that learns, or counts its student's steps, is asked here, but no step was made: it forgets this.
    before = copy.deepcopy(teacher.teacher.state())
    loss.setup(outputs, teacher.teacher(small))
    teacher.teacher.restore(before)
