"""Filling a teacher's table ahead of the runs that will read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdbench.engine.device import place
from kdbench.errors import UserError
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.serving import open_table, unservable
from kdbench.runs.stage import student_stage, train_batches

Watch = Callable[[int], AbstractContextManager[Callable[[int], None]]]


class Filled(NamedTuple):
    path: Path
    entries: int  # all (image, view) pairs of the recipe's training set
    computed: int  # of them now, by this process
    seconds: float  # for these


def fill_table(recipe: Recipe, watch: Watch) -> Filled:
    """Compute what the table of the recipe's teacher lacks for the recipe's training images, in all their views.

    `watch(total)` gives what is told how many more entries are there. May be stopped and started again at any time,
    and run in several processes at once. Raises UserError where no table can serve, before any work.
    """
    spec = recipe.need_teacher("a network, whose logits the table is to hold")
    data = recipe.data()
    reason = unservable(data.mix, data.augment)
    if reason is not None:
        raise UserError("teacher.table", said=f"none can be built, since {reason}")
    teacher = obtain(spec, recipe, data)
    placement = place(recipe.trainer)
    batches = train_batches(student_stage(recipe, data, Path()), placement)
    if batches.views is None:
        raise UserError("teacher.table", said="none can be built, since the images are streamed from their files")
    filler = open_table(teacher, data, batches, placement).filler
    entries = (data.transfer.rows[:, None].numpy() * batches.views + np.arange(batches.views)).reshape(-1)
    begin = time.perf_counter()
    with watch(len(entries)) as advance:
        filler.fill(entries, advance)
    return Filled(filler.table.path, len(entries), filler.computed, time.perf_counter() - begin)
