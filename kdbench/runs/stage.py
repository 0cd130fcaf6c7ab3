"""What one training is made of: its data, student, loss and optimizer, and how they become batches and a learner."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench import world
from kdbench.data.augment.views import Augment, copies_of
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import Placement, evaluation_batch
from kdbench.engine.distiller import Distiller, may_trim
from kdbench.engine.evaluate import evaluating
from kdbench.engine.learner import Learner
from kdbench.engine.metrics import Meters
from kdbench.engine.options import TrainerOptions
from kdbench.engine.schedule import lr_factors
from kdbench.errors import require, under
from kdbench.losses.base import DistillationLoss, First
from kdbench.models.adopt import checkpoint_gradients
from kdbench.models.base import sketched
from kdbench.models.interface import parts_of
from kdbench.results.result import StageResult
from kdbench.runs.identity import Identity
from kdbench.runs.recipe import LossSpec, Recipe, extended
from kdbench.runs.taught import TaughtBy


@dataclass(frozen=True)
class Start:
    """What a fresh student starts from in place of random numbers.

    weights: parameters and buffers by name, on any device; those that are not named keep their own values. frozen:
    paths of layers that are not trained. loss: parameters and buffers of the loss likewise.
    """

    weights: Mapping[str, Tensor]
    frozen: tuple[str, ...] = ()
    loss: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, student: nn.Module) -> None:
        student.load_state_dict({**student.state_dict(), **self.weights})
        for layer in self.frozen:
            student.get_submodule(layer).requires_grad_(False)

    def apply_to_loss(self, loss: nn.Module) -> None:
        """What the loss lacks of it is passed over."""
        if self.loss:
            own = loss.state_dict()
            loss.load_state_dict({**own, **{name: value for name, value in self.loss.items() if name in own}})


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
    before: tuple[StageResult, ...] = ()  # trainings that it goes on from, for its result
    added: str = ""  # what its loss adds to the student, in words
    keeps_loss: bool = False  # whether what its loss learned is kept, too, for another stage to go on from


def with_extension(stage: Stage, teacher: TaughtBy | None) -> Stage:
    """The stage with the student that its loss makes of the recipe's; the stage itself for most losses."""
    loss, recipe = stage.recipe.loss.make(), stage.recipe
    if teacher is None or not loss.extends:
        return stage
    taught = teacher.trained()
    with torch.random.fork_rng(devices=[]):  # any weights will do: shapes are asked for
        student = recipe.student.make(stage.data.info)
    with under(recipe.loss.key):
        loss.attach(parts_of(student), parts_of(taught))
        infos = (stage.data.info, stage.data.read_by_teacher().info)
        by = loss.extension(*(sketched(network, info) for network, info in zip((student, taught), infos, strict=True)))
    if by is None:
        return stage
    own, plain = stage.start or Start({}), student.state_dict()
    recipe = replace(recipe, student=extended(recipe.student, by, recipe.catalogue))
    weights = own.weights
    if weights.keys() <= plain.keys():  # of a training before, whose student was not extended yet
        known = recipe.student.sketch(stage.data.info).state_dict()
        weights = {name: value for key, value in weights.items() if (name := f"network.{key}") in known}
    start = Start({**by.weights, **weights}, (*own.frozen, *by.frozen), own.loss)
    return replace(stage, recipe=recipe, start=start, added=by.text)


def first_stage(stage: Stage, first: First) -> Stage:
    """The training that a stage's loss has before the main one, as a run in the stage's folder."""
    recipe, record = stage.recipe, stage.recipe.record
    spec = recipe.loss
    loss = replace(spec, name=f"{spec.name} first", make=lambda: _first_of(spec).loss)
    lr = recipe.optimizer.lr if first.lr is None else first.lr
    schedule = replace(
        recipe.schedule, epochs=first.epochs, shape="constant", warmup=0, milestones=[], cycles=1, floor=0.0
    )
    if first.falls:
        schedule = replace(schedule, shape="step", gamma=0.1, milestones=[f"{100 * share:g}%" for share in first.falls])
    trainer = replace(recipe.trainer, ema=None, evaluate_every=first.epochs)
    tree = {**record.tree, "schedule": asdict(schedule)}
    own = hashlib.sha256(f"{record.hash}/first".encode()).hexdigest()
    record = replace(record, hash=own, tree=tree, choices={**record.choices, "loss": loss.name}, alone=False)
    recipe = replace(
        recipe, loss=loss, schedule=schedule, trainer=trainer, optimizer=replace(recipe.optimizer, lr=lr), record=record
    )
    folder = stage.folder / "stages" / "1-first"
    return replace(stage, recipe=recipe, folder=folder, stop_epoch=None, before=(), keeps_loss=True)


def _first_of(spec: LossSpec) -> First:
    first = spec.make().first_training
    assert first is not None
    return first


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
    option = "weak_strong" if loss.views == 2 else "rotations"
    allowed = f"{option}, or another SideBySide of {loss.views} augmentations: {why}"
    require(copies_of(augment) == loss.views, "dataset/augment", type(augment).__name__, allowed)
    require(mix is None, "dataset.mix.kind", type(mix).__name__.lower(), f"none: {why}")
    require(world.size() == 1, "loss", name, f"another under torchrun: {why}, and a process has only some rows")


@dataclass(frozen=True)
class SeenBy:
    """A teacher's feature over the training set as it is: kdbench.losses.base.Seen."""

    network: nn.Module
    feature: str
    data: Bundle  # as the teacher reads it
    placement: Placement

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._of(self.data.train)

    def in_turn(self, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._of(self.data.train.select(places_in_turn(self.data.train.labels, classes)))

    def _of(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        loading = Loading(500, device=self.placement.device, channels_last=self.placement.channels_last)
        for batch in EvaluationBatches(self.data, split, loading) if len(split) else ():
            with evaluating(self.network):
                values = self.network(batch.input).features[self.feature]
            yield values, batch.target.label


def places_in_turn(label: Tensor, classes: int) -> Tensor:
    """Places of the first sample of every class, then of the second of every class, ...: [classes n], n samples of the
    smallest. label int64 [N], -1: none."""
    place = label.argsort(stable=True)[(label < 0).sum() :]
    counts = label[label >= 0].bincount(minlength=classes)[:classes]
    return place[(counts.cumsum(0) - counts) + torch.arange(int(counts.min()))[:, None]].flatten()


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
        loss.epochs, loss.batch_size = recipe.schedule.epochs, recipe.schedule.batch_size
        _prepare_loss(loss, student, teacher, stage.data, sets, placement)
    if stage.start is not None:
        stage.start.apply_to_loss(loss)
    distiller = Distiller(student, loss.to(placement.device), placement)
    distiller.trims = stage.data.trim and may_trim(student, loss, recipe.trainer, placement.device)
    factors = lr_factors(recipe.schedule, batches.steps)
    meters = Meters(placement.device, batches.steps, _truth(stage), stage.data.task)
    return Learner(distiller, recipe.optimizer, recipe.trainer, factors, meters, recipe.seeds.init)


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
    """Layers of the networks and adapters from real shapes, for losses that want them. Adapters cost two evaluation
    images through both networks."""
    loss.train_rows = data.num_rows
    if loss.has_own("attach") or loss.has_own("setup"):
        loss.attach(parts_of(student), parts_of(teacher.network) if teacher and teacher.network else None)
    if not loss.has_own("setup"):
        return
    batch = next(iter(sets["test"]))
    small = batch._replace(input=batch.input[:2], view=batch.view[:2], target=batch.target._replace(counted=None))
    with evaluating(student), placement.autocast():
        outputs = student(small.input)
    if teacher is None:
        loss.setup(outputs, None)
        return
    # A teacher that learns, or counts its student's steps, is asked here, but no step was made: it forgets this.
    before = copy.deepcopy(teacher.teacher.state())
    loss.setup(outputs, teacher.teacher(small))
    teacher.teacher.restore(before)
