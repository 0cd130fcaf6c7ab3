"""One teacher, one student: the plain experiment."""

from __future__ import annotations

from pathlib import Path

from kdbench.engine.options import require
from kdbench.results.result import RunResult
from kdbench.runs.lifecycle import run_stage
from kdbench.runs.obtain import obtain_teacher
from kdbench.runs.recipe import Recipe
from kdbench.runs.stage import student_stage


def single(recipe: Recipe, out: Path) -> RunResult:
    """Obtain the teacher, distil it into the student in folder `out`, return the result."""
    lonely = recipe.teacher is None and recipe.loss.make().uses_teacher
    require(not lonely, "teacher", "none", f"a network, since loss={recipe.loss.name} learns from one")
    data = recipe.data()
    return run_stage(student_stage(recipe, data, out), obtain_teacher(recipe, data))
