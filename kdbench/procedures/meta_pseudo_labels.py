"""Meta pseudo labels: the teacher of unlabelled images is updated by the student's feedback (Pham et al. 2021)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from torch import nn

from kdbench import world
from kdbench.arguments.ranges import Amount, NotNegative, Positive, within
from kdbench.data.batches import Loading, TrainingBatches
from kdbench.data.unlabelled import Pool, make_pool
from kdbench.engine.checkpoint import resume_epoch
from kdbench.engine.device import place
from kdbench.engine.optimizer import make_optimizer
from kdbench.engine.options import OptimizerOptions
from kdbench.engine.schedule import MOST_EPOCHS
from kdbench.errors import UserError
from kdbench.results.result import RunResult
from kdbench.runs.obtain import measured, obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.series import Series, opened
from kdbench.runs.taught import TaughtBy
from kdbench.teachers.meta import MetaTeacher


def meta_pseudo_labels(
    recipe: Recipe, out: Path, labelled: Amount | None = 0.1, pseudo: Literal["sample", "argmax"] = "sample",
    teacher_lr: Positive = 0.01, supervised: NotNegative = 1.0,
    finetune_epochs: Annotated[int, within(0, MOST_EPOCHS)] = 5, finetune_lr: NotNegative | None = None,
) -> RunResult:  # fmt: skip
    """`teacher=` learns from the labelled images first, then labels the others for `student=` and is updated at every
    step, with `teacher_lr`, by what its labels did to the student's loss on labelled images and by `supervised` times
    its own loss on them (`teachers.meta`). The student sees pseudo-labels only; at the end it is fine-tuned on the
    labelled images for `finetune_epochs` (0: not at all) with `finetune_lr` (null: a tenth of the optimizer's).

    `labelled`: share or number of the training images that keep their labels. Left out of the paper's recipe are its
    augmentation of the teacher's images (UDA) and the moving average of the student's weights (trainer.ema has one).
    The figures hold the teacher's accuracy before and after.
    """
    world.refuse_several("procedure", "meta_pseudo_labels", "its teacher learns from a student at every step")
    spec = recipe.need_teacher("a network: it labels the images")
    recipe.need_taught_loss("a loss that learns from a teacher: loss=ban is cross-entropy with its labels")
    recipe.need_classes("meta_pseudo_labels")
    with opened(recipe, out) as opening:
        pool = make_pool(opening.data, labelled, recipe.seeds.data)
        series = replace(opening, data=pool.data(opening.data))
        given = obtain(spec, recipe, series.data)
        optimizer = replace(spec.optimizer, lr=teacher_lr)
        meta = _meta(series, given.layers(), optimizer, pseudo == "sample", supervised)
        stage = replace(series.stage("taught", given), split=pool.unlabelled)
        series.run(stage, replace(given, teacher=meta, tables=None))
        figures = series.data.task.primaries(given.metrics, "teacher_before")
        figures |= _teacher_after(series, stage.folder, given)
        last = stage.folder
        if finetune_epochs:
            last = _finetune(series, pool, stage.folder, finetune_epochs, finetune_lr)
        return series.conclude(last, figures)


def _meta(
    series: Series, network: nn.Module, optimizer: OptimizerOptions, sample: bool, supervised: float
) -> MetaTeacher:
    recipe, data = series.recipe, series.data
    placement = place(recipe.trainer)
    # As many labelled images a step as unlabelled ones, or all there are.
    size = min(recipe.schedule.batch_size, len(data.train))
    loading = Loading(size, recipe.seeds.data, placement.device, placement.channels_last)
    labelled = TrainingBatches(data, data.train, loading)
    network = placement.put(copy.deepcopy(network)).requires_grad_(True)
    moving = make_optimizer(optimizer, [network])
    return MetaTeacher(network, moving, labelled, placement.autocast, recipe.seeds.init, sample, supervised)


def _teacher_after(series: Series, folder: Path, given: TaughtBy) -> dict[str, float | None]:
    """The teacher's accuracy after its last update: its weights lie in the stage's checkpoint. Raises UserError if that
    was removed before the whole run was finished."""
    state = resume_epoch(folder)[1]
    if state is None:
        raise UserError(f"{folder}: its checkpoint is gone, which held the teacher; force=true trains both again")
    network = copy.deepcopy(given.layers())
    network.load_state_dict(state["teacher"]["network"])
    after = measured(given.name, network, folder, series.recipe, series.data)
    return series.data.task.primaries(after.metrics, "teacher_after")


def _finetune(series: Series, pool: Pool, start: Path, epochs: int, lr: float | None) -> Path:
    recipe = series.recipe
    own = replace(
        recipe,
        loss=recipe.catalogue.loss("ce"),
        schedule=replace(recipe.schedule, epochs=epochs, warmup=0),
        optimizer=replace(recipe.optimizer, lr=recipe.optimizer.lr / 10 if lr is None else lr),
    )
    stage = replace(series.stage("finetuned", recipe=own), split=pool.labelled, start=series.after(start))
    series.run(stage, None)
    return stage.folder
