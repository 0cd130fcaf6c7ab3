"""One teacher, one student: the plain experiment."""

from __future__ import annotations

from pathlib import Path

from kdbench.results.result import RunResult
from kdbench.runs.lifecycle import run_stage
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.stage import student_stage


def single(recipe: Recipe, out: Path) -> RunResult:
    """Obtain the teacher, distil it into the student in folder `out`, return the result."""
    recipe.refuse_untaught()
    data = recipe.data()
    teacher = obtain(recipe.teacher, recipe, data) if recipe.teacher else None
    return run_stage(student_stage(recipe, data, out), teacher)
