"""Self-distillation: a student taught by its own past while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdbench.arguments.ranges import Inside
from kdbench.data.order import Order
from kdbench.engine.device import place
from kdbench.results.result import RunResult
from kdbench.runs.lifecycle import run_stage
from kdbench.runs.recipe import Recipe
from kdbench.runs.stage import Stage, student_stage
from kdbench.runs.taught import TaughtBy
from kdbench.teachers.past_self import PastSelf


def self_distillation(
    recipe: Recipe, out: Path, past: Literal["epoch", "average"] = "epoch", decay: Inside = 0.999
) -> RunResult:
    """Train `student=` under the recipe's loss with itself as the teacher; there is no `teacher=`.

    `past`: epoch, its weights at the end of the epoch before (Kim et al. 2021, PS-KD; use loss=pskd); average, the
    exponential moving average of its weights over steps, with `decay` (Tarvainen and Valpola 2017).
    """
    recipe.need_no_teacher("the student teaches itself")
    stage = student_stage(recipe, recipe.data(), out)
    itself = PastSelf(steps_in_epoch(stage), place(recipe.trainer).autocast, decay if past == "average" else None)
    return run_stage(stage, TaughtBy("itself", itself))


def steps_in_epoch(stage: Stage) -> int:
    """Batches in an epoch of the stage, without reading its images."""
    recipe, trainer = stage.recipe, stage.recipe.trainer
    size, seed = recipe.schedule.batch_size, recipe.seeds.data
    return Order(len(stage.split), size, seed, trainer.drop_last, trainer.limit_steps).steps
