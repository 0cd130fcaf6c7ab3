"""Who answers the students' batches: the live teacher, or a table of its logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from kdbench import world
from kdbench.data.augment.mix import Mix
from kdbench.data.augment.views import Augment
from kdbench.data.batches import Loading, TrainingBatches
from kdbench.data.blocks import Offset
from kdbench.data.bundle import Bundle
from kdbench.engine.device import Placement
from kdbench.engine.distiller import Distiller
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.models.base import flops_of
from kdbench.runs.taught import TaughtBy
from kdbench.tables.feed import Fed, Filler, TableTeacher
from kdbench.tables.key import table_key
from kdbench.tables.worth import Costs, choose, free_disk, free_memory
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Epochs, Teacher

log = logging.getLogger(__name__)


class Served(NamedTuple):
    batches: Epochs
    teacher: Teacher


def serve(
    teacher: TaughtBy, students: Sequence[tuple[str, Distiller]], data: Bundle, batches: TrainingBatches,
    placement: Placement, epochs: int,
) -> Served:  # fmt: skip
    """Choose between table and live teacher for `epochs` more epochs of `batches`; one log line says what and why.

    `students` are those that train side by side, with the names of their losses.
    Raises UserError for teacher.table=on where no table can serve.
    """
    live = Served(batches, teacher.teacher)
    if teacher.tables is None or teacher.tables.mode == "off" or epochs < 1:
        return live
    forced = teacher.tables.mode == "on"
    reason = _obstacle(teacher, students, data, batches)
    served = None
    if reason is None:
        try:
            weighed = world.agreed(lambda: _weigh(teacher, students, data, batches, placement, epochs, forced))
            pays, reason = weighed
            served = open_table(teacher, data, batches, placement) if pays else None
        except OSError as error:
            reason = f"its table cannot be kept ({error})"
    if served is not None:
        log.info("teacher %s: logits from the table %s (%s)", teacher.name, served.filler.table.path, reason)
        return Served(Fed(batches, served), served)
    if forced:
        raise _refusal(str(reason))
    log.info("teacher %s: asked anew for every batch, no table (%s)", teacher.name, reason)
    return live


def open_table(teacher: TaughtBy, data: Bundle, batches: TrainingBatches, placement: Placement) -> TableTeacher:
    """A teacher that answers from its table, which is made if there is none. Raises OSError."""
    assert teacher.tables is not None and isinstance(teacher.teacher, LiveTeacher)
    data, batches = _as_read(teacher, data, batches)
    live, weights = teacher.teacher, teacher.weights
    key, shape = world.agreed(lambda: table_key(live, weights, data, batches, placement.precision))
    with world.after_first():
        table, store = teacher.tables.open(key, shape, placement.device)
    return TableTeacher(Filler(table, teacher.teacher, batches), store)


def _as_read(teacher: TaughtBy, data: Bundle, batches: TrainingBatches) -> tuple[Bundle, TrainingBatches]:
    """Data and batches with what the teacher itself reads, where its tokenizer is another."""
    if teacher.reads is None:
        return data, batches
    loading = Loading(batches.order.batch_size, device=batches.device)
    return teacher.reads, TrainingBatches(teacher.reads, teacher.reads.train, loading)


def refuse_table(loss: DistillationLoss, loss_name: str, mix: Mix | None, augment: Augment) -> None:
    """Raise the UserError for a teacher.table=on that no table can serve, as far as it is known before any work."""
    reason = _too_much(loss, loss_name) or unservable(mix, augment)
    if reason is not None:
        raise _refusal(reason)


def _too_much(loss: DistillationLoss, name: str) -> str | None:
    if loss.needs:
        return f"loss={name} reads the teacher's features ({', '.join(loss.needs)}), and a table holds logits only"
    return None


def unservable(mix: Mix | None, augment: Augment) -> str | None:
    """Why no table can list the images that an augmentation makes; None if one can."""
    if mix is not None:
        return f"dataset.mix={mix.kind} makes new images in every epoch, which no table can list"
    if isinstance(augment, Offset):
        begin = "a text's blocks begin elsewhere in every epoch"
        return f"{begin}: a table would hold each token at each place in a block"
    if augment.views is None:
        return f"the views of dataset.augment ({type(augment).__name__}) cannot be listed"
    return None


def _refusal(reason: str) -> UserError:
    return UserError("teacher.table", "on", f"auto or off, since {reason}")


def _obstacle(
    teacher: TaughtBy, students: Sequence[tuple[str, Distiller]], data: Bundle, batches: TrainingBatches
) -> str | None:
    for name, student in students:
        reason = _too_much(student.loss, name)
        if reason is not None:
            return reason
    reason = unservable(data.mix, data.augment)
    if reason is not None:
        return reason
    if not isinstance(teacher.teacher, LiveTeacher):
        return f"teacher {teacher.name} is not a network"
    if batches.views is None:
        return "the images are streamed from their files"
    return None


def _weigh(
    teacher: TaughtBy, students: Sequence[tuple[str, Distiller]], data: Bundle, batches: TrainingBatches,
    placement: Placement, epochs: int, forced: bool,
) -> tuple[bool, str]:  # fmt: skip
    if forced:
        return True, "teacher.table=on"
    assert teacher.tables is not None and isinstance(teacher.teacher, LiveTeacher) and batches.views is not None
    key, shape = table_key(teacher.teacher, teacher.weights, *_as_read(teacher, data, batches), placement.precision)
    there = teacher.tables.open(key, shape, placement.device)[0].filled if teacher.tables.path(key).exists() else 0
    costs = Costs(
        epochs=epochs,
        images=len(batches.plan(0)[0]),
        views=batches.views // batches.order.copies,  # each copy of an image meets its own part of them
        filled=min(1.0, there / (batches.size * batches.views)),
        size=shape.bytes,
        teacher=flops_of(teacher.teacher.network, (teacher.reads or data).info),
        students=sum(flops_of(student.student, data.info) for _, student in students),
        disk=free_disk(teacher.tables.folder) + 4 * there * shape.words,
        memory=free_memory(),
    )
    return choose(costs)
