"""Trial of a recipe: what cannot be trained, measured or taught shows before any work, and without memory."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from kdbench import world
from kdbench.arguments import locate
from kdbench.data.augment.mix import Mix
from kdbench.data.augment.views import Augment
from kdbench.data.bundle import Bundle
from kdbench.data.order import Order
from kdbench.engine.apart import APART, refuse_apart
from kdbench.engine.device import named_device, wants_graph
from kdbench.engine.optimizer import make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.errors import UserError, require, under
from kdbench.losses.base import DistillationLoss
from kdbench.losses.features import student_maps, teacher_maps
from kdbench.models.adopt import checkpoint_gradients
from kdbench.models.base import refuse_kind, sketched
from kdbench.models.interface import parts_of
from kdbench.results.metrics import EMBEDDING, METRICS, TASKS
from kdbench.results.result import RunResult, is_finished
from kdbench.runs.ensemble import Ensemble
from kdbench.runs.origin import Published, Trained
from kdbench.runs.recipe import (
    LossSpec,
    NetworkSpec,
    Recipe,
    extended,
)
from kdbench.runs.serving import refuse_table
from kdbench.runs.stage import refuse_views
from kdbench.types import MEMBERS, ImageInfo, Info


def refuse_pairs(recipe: Recipe, augment: Augment, mix: Mix | None) -> None:
    """Raise a UserError for options that do not go together, as far as they say so without data and networks."""
    loss, trainer, teacher = recipe.loss.make(), recipe.trainer, recipe.teacher
    name = recipe.loss.name
    if world.size() > 1:
        _refuse_several(trainer, recipe.loss, loss)
    if recipe.optimizer.name in APART:
        refuse_apart(recipe.optimizer, trainer, loss, name)
    pairs = f"1 with loss={name}, which sees {loss.views} views of an image at once"
    require(loss.views == 1 or trainer.accumulate == 1, "trainer.accumulate", trainer.accumulate, pairs)
    refuse_views(loss, name, augment, mix)
    one = f"none with loss={name}, which needs one class a sample"
    require(mix is None or not loss.needs_one_class, "dataset.mix.kind", mix and mix.kind, one)
    if teacher is not None and teacher.table == "on":
        refuse_table(loss, name, mix, augment)


def _refuse_several(trainer: TrainerOptions, loss: LossSpec, made: DistillationLoss) -> None:
    """Raise a UserError for what only a process by itself can train."""
    for key in ("cuda_graph", "compile"):
        if getattr(trainer, key) == "on":
            world.refuse_several(f"trainer.{key}", "on", "their steps are neither recorded nor compiled")
    if trainer.accumulate > 1:
        world.refuse_several("trainer.accumulate", trainer.accumulate, "each has its part of a batch already")
    if made.has_own("attach"):
        world.refuse_several(loss.key, loss.name, "it reads the networks' weights, whose gradients are parts there")
    if made.extends or made.surveyed or made.first_training is not None:
        world.refuse_several(loss.key, loss.name, "it makes the student, or learns of the teacher, before the training")


def try_networks(recipe: Recipe) -> None:
    """Build student and teacher without memory (on the meta device): what cannot be built shows before any training."""
    data = recipe.data()
    if world.size() > 1:
        _refuse_small_batches(recipe, data)
    named = {"student": recipe.student}
    if recipe.teacher is not None:
        named["teacher"] = recipe.teacher.origin.describe(recipe.catalogue)
        if isinstance(recipe.teacher.origin, Ensemble):
            recipe.refuse_features("an ensemble of teachers", (MEMBERS,))
    for key, spec in named.items():
        if "_target_" in spec.config:
            network = locate(spec.config["_target_"], f"{key}._target_")
            refuse_kind(network, key, spec.name, data.info, f"dataset={data.name}")
    loss, classes = recipe.loss.make(), data.info.num_classes
    _refuse_task(recipe, loss, data)
    images, wanted = isinstance(data.info, ImageInfo), recipe.trainer.channels_last is True
    require(images or not wanted, "trainer.channels_last", True, "auto or false for data that are not images")
    parts, half = recipe.trainer.accumulate, recipe.schedule.batch_size // 2
    allowed = f"at most {half}, half of schedule.batch_size: a part has two images or more"
    require(parts <= half or not images, "trainer.accumulate", parts, allowed)
    student = _sketch(recipe.student, "student", data.info)
    taught = named.get("teacher", recipe.student)
    read = data.read_by_teacher().info
    teacher = _sketch(taught, "teacher", read) if taught is not recipe.student else student
    _try_optimizer(recipe.optimizer, student, "optimizer")
    if recipe.trainer.grad_checkpointing:
        checkpoint_gradients(student)
    if recipe.teacher is not None and isinstance(recipe.teacher.origin, Trained):
        _try_optimizer(recipe.teacher.optimizer, teacher, "teacher.optimizer")
    allowed = f"another with {classes} classes: it gives no gradient for fewer than {loss.least_classes}"
    require(classes >= loss.least_classes, recipe.loss.key, recipe.loss.name, allowed)
    recipe.refuse_uncalibrated(data)
    wants_graph(recipe.trainer, named_device(recipe.trainer.device), recipe.optimizer)  # refuses, before any training
    if recipe.teacher is not None and recipe.teacher.table == "on":
        refuse_table(loss, recipe.loss.name, data.mix, data.augment)
    teacher = teacher if taught.single or MEMBERS in loss.needs else student
    with under(recipe.loss.key):
        for part in (loss, *([loss.first_training.loss] if loss.first_training else [])):
            _try_loss(part, student, teacher, recipe, data)


def _refuse_task(recipe: Recipe, loss: DistillationLoss, data: Bundle) -> None:
    """Refuse a loss of classes for data without any and the other way round, and a teacher to train without labels."""
    embeds = data.task is EMBEDDING
    those = "cosine, feature_mse, relational or a sum of them"
    allowed = f"{those}: {{}} has no classes" if embeds else "one for classes, which {} has"
    require(loss.of_embeddings == embeds, recipe.loss.key, recipe.loss.name, allowed.format(f"dataset={data.name}"))
    if embeds and recipe.teacher is not None and isinstance(recipe.teacher.origin, Trained):
        had = (
            "one that is trained: teacher=timm teacher.embedding=true teacher.pretrained=true (or teacher.checkpoint=)"
        )
        raise UserError("teacher", recipe.teacher.origin.network.name, had)
    if embeds and recipe.teacher is not None and isinstance(recipe.teacher.origin, Published):
        classifies = recipe.teacher.origin.network.config.get("embedding") is False
        require(not classifies, "teacher.embedding", False, f"true: dataset={data.name} asks for embeddings")


def _try_optimizer(options: OptimizerOptions, network: torch.nn.Module, key: str) -> None:
    """Refuse an optimizer that names parameters or layers which this network does not have."""
    if options.layer_decay is not None or options.no_decay:
        with under(key):
            make_optimizer(options, [network])


def _refuse_small_batches(recipe: Recipe, data: Bundle) -> None:
    """Raise a UserError for a batch that has not a row for each process."""
    trainer, teacher = recipe.trainer, recipe.teacher
    trained = [(data.transfer, recipe.schedule), *([(data.train, teacher.schedule)] if teacher else [])]
    for split, schedule in trained:
        Order(len(split), schedule.batch_size, 0, trainer.drop_last, trainer.limit_steps)


def _try_loss(
    loss: DistillationLoss, student: torch.nn.Module, teacher: torch.nn.Module, recipe: Recipe, data: Bundle
) -> None:
    """Refuse a loss that reads what these networks do not have, by its `setup`; most losses read logits alone."""
    if not (loss.needs or loss.student_needs or any(map(loss.has_own, ("attach", "extension", "setup")))):
        return
    loss.attach(parts_of(student), parts_of(teacher))
    try:
        infos = (data.info, data.info if teacher is student else data.read_by_teacher().info)
        outputs = [sketched(network, info) for network, info in zip((student, teacher), infos, strict=True)]
        by = loss.extension(*outputs)
        if by is not None:
            student = extended(recipe.student, by, recipe.catalogue).sketch(data.info)
            outputs[0] = sketched(student, data.info)
    except (RuntimeError, NotImplementedError):  # an operation that has no form on the meta device
        return
    loss.train_rows, loss.batch_size = data.num_rows, recipe.schedule.batch_size
    loss.setup(*outputs)
    student_maps(outputs[0], loss.student_needs)
    teacher_maps(outputs[1], loss.needs, type(loss).__name__)


def _sketch(spec: NetworkSpec, key: str, info: Info) -> torch.nn.Module:
    """The network without memory. Raises UserError for one that has nothing to train, or answers with no `Outputs`."""
    network = spec.sketch(info)
    target = spec.config.get("_target_", spec.name)
    allowed = "a network that has weights and returns kdbench.types.Outputs"
    fits = next(network.parameters(), None) is not None
    with suppress(RuntimeError, NotImplementedError):  # an operation that has no form on the meta device
        fits = fits and hasattr(sketched(network, info), "logits")
    require(fits, f"{key}._target_", target, allowed)
    return network


def check_monitor(name: str) -> None:
    """Raise a UserError for what no run has, before it is trained."""
    known = re.fullmatch(r"auto|(best/)?(train|val|test)/(?P<metric>\w+)", name)
    metric = known and known["metric"]
    fits = known and (metric is None or metric in METRICS or metric.startswith("loss_"))
    allowed = "auto, or a figure of result.json such as val/top1 or best/val/nll"
    require(bool(fits), "monitor", name, f"{allowed}; metrics: {', '.join(METRICS)}")


def refuse_unmeasured(monitor: str, data: Bundle) -> None:
    """Raise a UserError for a figure of a validation set where there is none, or of another task; the best epoch is one
    by validation."""
    leaf, own = monitor.rsplit("/", 1)[-1], [metric.name for metric in data.task.metrics]
    others = {metric.name for task in TASKS.values() for metric in task.metrics} - set(own)
    require(leaf not in others, "monitor", monitor, f"a figure of {data.task.name}: {', '.join(own)}")
    missing = data.val is None and re.match("best/|val/", monitor)
    require(not missing, "monitor", monitor, "a figure of train or test: dataset.validation = 0 leaves no other")


def refuse_no_result(result: object, out: Path) -> None:
    """Raise a UserError for a procedure of the user's own that ended without a result."""
    allowed = "a function that returns what run_stage or Series.conclude returned for its folder `out` (docs/own.md)"
    found = f"it returned a {type(result).__name__}, and {'a' if is_finished(out) else 'no'} result lies in {out}"
    require(isinstance(result, RunResult) and is_finished(out), "procedure._target_", found, allowed)
