"""One teacher, one student: the plain experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdbench.data.bundle import Bundle
from kdbench.engine.options import require
from kdbench.procedures.recipe import Recipe
from kdbench.procedures.stage import Stage
from kdbench.procedures.teacher import obtain_teacher
from kdbench.procedures.train import run_stage


def single(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Obtain the teacher, distil it into the student in folder `out`, return the result."""
    lonely = recipe.teacher is None and recipe.loss.make().uses_teacher
    require(not lonely, "teacher", "none", f"a network, since loss={recipe.loss.name} learns from one")
    data = recipe.data()
    return run_stage(student_stage(recipe, data, out), obtain_teacher(recipe, data))


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
