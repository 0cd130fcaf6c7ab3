"""A configuration made ready for timing: the objects of a training, with untrained networks, and nothing written."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kdbench.bench.timing import Contender
from kdbench.data.batches import EvaluationBatches, TrainingBatches
from kdbench.data.bundle import Bundle
from kdbench.engine.device import Placement, own_stream, place
from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.errors import require
from kdbench.models.base import count_parameters
from kdbench.runs.obtain import live_teacher, reading
from kdbench.runs.recipe import Recipe
from kdbench.runs.serving import open_table
from kdbench.runs.stage import Stage, eval_sets, make_learner, student_stage, train_batches, with_extension
from kdbench.runs.taught import TaughtBy
from kdbench.tables.feed import Fed
from kdbench.tables.store import Tables
from kdbench.teachers.constant import NoTeacher
from kdbench.types import Epochs, Teacher


@dataclass(frozen=True)
class Workbench:
    """Everything of one training but its run folder."""

    recipe: Recipe
    data: Bundle
    placement: Placement
    stage: Stage
    batches: TrainingBatches
    sets: dict[str, EvaluationBatches]
    teacher: TaughtBy | None

    def learner(self) -> Learner:
        """A fresh student under its loss."""
        return make_learner(self.stage, self.teacher, self.batches, self.sets, self.placement)

    def table(self) -> tuple[Epochs, Teacher] | None:
        """Batches and teacher of a run whose teacher's logits are in a table; None where no table can serve."""
        teacher, batches = self.teacher, self.batches
        if teacher is None or teacher.tables is None or self.stage.recipe.loss.make().needs:
            return None
        if batches.views is None:
            return None
        served = open_table(teacher, self.data, batches, self.placement)
        return Fed(batches, served), served

    def live(self) -> tuple[Epochs, Teacher]:
        """Batches and teacher of a run without a table."""
        return self.batches, self.teacher.teacher if self.teacher else NoTeacher()

    def steps(self, served: tuple[Epochs, Teacher], learners: Sequence[Learner]) -> Contender:
        """The training loop's own steps over the first batches of the first epoch, which a table knows after one turn.

        Each turn begins with one step outside of the measurement, so that what happens once an epoch stays out of it.
        """
        batches, teacher = served
        graph = cohort_graph(learners, self.placement.device)
        whole = batches.size // self.recipe.schedule.batch_size  # batches of the full size
        lead = 1 if whole > 1 else 0

        def part(steps: int) -> float:
            for learner in learners:
                learner.begin_epoch(0)
                learner.steps_done = 0
            stream = itertools.islice(batches.epoch(0, 1), lead + steps)
            with own_stream(self.placement.device):
                train_epoch(learners, itertools.islice(stream, lead), teacher, _nothing, graph)
                begin = time.perf_counter()
                train_epoch(learners, stream, teacher, _nothing, graph)
                return time.perf_counter() - begin

        def turn(steps: int) -> float:
            seconds = 0.0
            while steps:
                some = min(steps, max(1, whole - lead))
                seconds, steps = seconds + part(some), steps - some
            for learner in learners:
                if learner.failure is not None:
                    raise learner.failure
            return seconds

        return turn


def _nothing() -> None:
    pass


def prepare(recipe: Recipe, data: Bundle, scratch: Path) -> Workbench:
    """`scratch` is a folder for the teacher's table, to be removed afterwards."""
    allowed = "data of separate samples: the blocks of a running text are not timed"
    require(data.blocks is None, "dataset", data.name, allowed)
    placement = place(recipe.trainer)
    # A turn takes as many steps as it needs, whatever debug=short says: counted, they would have been made.
    silent = replace(recipe, trainer=replace(recipe.trainer, progress="none", limit_steps=None))
    stage = student_stage(silent, data, scratch)
    batches = train_batches(stage, placement)
    sets = eval_sets(data, recipe.trainer, placement)
    teacher = untrained(recipe, data, placement, scratch)
    return Workbench(recipe, data, placement, with_extension(stage, teacher), batches, sets, teacher)


def untrained(recipe: Recipe, data: Bundle, placement: Placement, scratch: Path) -> TaughtBy | None:
    """The recipe's teacher with random weights, and made-up answers on the evaluation sets."""
    spec = recipe.teacher
    if spec is None:
        return None
    torch.manual_seed(0)
    described = spec.origin.describe(recipe.catalogue)
    read = data.read_by_teacher()
    network = placement.put(described.make(read.info))
    live = live_teacher(network, recipe, read, placement)
    splits = {"val": data.val, "test": data.test}
    reference = {
        name: torch.randn(len(split), data.info.num_classes, device=placement.device)
        for name, split in splits.items()
        if split is not None
    }
    parameters = count_parameters(network)
    tables = Tables("on", scratch)
    taught = TaughtBy(described.name, live, network, parameters, "untrained", None, {}, reference, tables=tables)
    return reading(taught, data)
