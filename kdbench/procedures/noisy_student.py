"""Noisy student (Xie et al. 2020): a teacher labels images; a noised student learns them, and teaches the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdbench.data.bundle import Split
from kdbench.data.unlabelled import Pool, joined, make_pool, trusted
from kdbench.engine.options import require
from kdbench.results.result import RunResult
from kdbench.runs.given import GivenTeacher
from kdbench.runs.obtain import obtain_teacher
from kdbench.runs.recipe import NetworkSpec, Recipe
from kdbench.runs.series import Series, opened, seeds_apart, spec_named
from kdbench.teachers.constant import ConstantTeacher

Labels = Literal["soft", "hard"]


def noisy_student(
    recipe: Recipe, out: Path, iterations: int = 3, labelled: float | None = 0.1, labels: Labels = "soft",
    threshold: float = 0.0, per_class: int | None = None, students: list[str] | None = None,
) -> RunResult:  # fmt: skip
    """`teacher=` learns from the labelled images, labels all others, and teaches a student on both; that student is the
    next teacher, `iterations` times.

    The teacher is not noised: it sees clean images, in evaluation mode. The student's noise is the dataset's
    augmentation (dataset/augment=rand_augment) and its own dropout or stochastic depth (student.dropout, timm's
    drop_path_rate). `labelled`: share or number of the training images that keep their labels; null: all do, and the
    unlabelled images are the transfer set's (dataset.transfer.extra). `labels`: soft, the loss's distill term alone
    learns from unlabelled images; hard, they also count as labelled with the teacher's answer in its task term
    (loss=ce learns from these alone). `threshold` drops images the teacher is less sure of, `per_class` balances the
    predicted classes. `students`: one network an iteration, `student=` for all if null.

    The table `pseudo_labels` says how many were used and how many were right.
    """
    _check(recipe, iterations, labels, threshold, per_class, students)
    specs = [spec_named(recipe, name) for name in students or [recipe.student.name] * iterations]
    with opened(recipe, out) as opening:
        pool = make_pool(opening.data, labelled, recipe.seeds.data)
        series = replace(opening, data=pool.data(opening.data))
        teacher = obtain_teacher(recipe, series.data)
        assert teacher is not None
        rows = []
        for turn, spec in enumerate(specs, start=1):
            folder, row = _iterate(series, pool, teacher, spec, iterations - turn, labels, threshold, per_class)
            rows.append({"iteration": turn, **row})
            teacher = series.taught(folder) if turn < iterations else teacher
        return series.conclude(folder, {"labelled_images": float(len(pool.labelled))}, {"pseudo_labels": rows})


def _check(
    recipe: Recipe,
    iterations: int,
    labels: str,
    threshold: float,
    per_class: int | None,
    students: list[str] | None,
) -> None:
    require(recipe.teacher is not None, "teacher", "none", "a network: it labels the first images")
    require(iterations >= 1, "procedure.iterations", iterations, "at least 1")
    require(0 <= threshold < 1, "procedure.threshold", threshold, "in [0, 1)")
    require(per_class is None or per_class >= 1, "procedure.per_class", per_class, "null or at least 1")
    counted = students is None or len(students) == iterations
    require(counted, "procedure.students", students, f"null or {iterations} networks, one an iteration")
    require(labels in ("soft", "hard"), "procedure.labels", labels, "soft or hard")
    if labels == "soft":
        allowed = "a loss that learns from a teacher, or procedure.labels=hard"
        require(recipe.loss.make().uses_teacher, "loss", recipe.loss.name, allowed)


def _iterate(
    series: Series, pool: Pool, teacher: GivenTeacher, spec: NetworkSpec, to_go: int, labels: Labels, threshold: float,
    per_class: int | None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Label, choose, and train one student: its folder, and what the labels were like."""
    answers = series.answers(teacher, pool.unlabelled)
    rows = trusted(answers.softmax(1), threshold, per_class).cpu()
    allowed = f"lower: the teacher is that sure of none of the {len(pool.unlabelled)} images"
    require(len(rows) > 0, "procedure.threshold", threshold, allowed)
    answer = answers.argmax(1).cpu()
    chosen = pool.unlabelled.select(rows)
    if labels == "hard":
        chosen = replace(chosen, labels=answer[rows])
    known = pool.labelled
    fixed = ConstantTeacher(_table(series, [(known, series.answers(teacher, known)), (pool.unlabelled, answers)]))
    stage = series.stage(
        f"student{len(series.entries) + 1}-{spec.name}",
        teacher=teacher,
        student=spec,
        split=joined([replace(known, clean=None), chosen]),
        seeds=seeds_apart(series.recipe.seeds, to_go),
    )
    # A table of views is of no use here: every view of an image has the clean image's answer.
    series.run(stage, replace(teacher, ask=fixed, tables=None))
    truth = pool.truth[rows]
    right = (answer[rows] == truth)[truth >= 0].float()
    about = {"images": len(rows), "different": len(rows.unique()), "unlabelled": len(pool.unlabelled)}
    return stage.folder, {**about, "right": right.mean().item() if len(right) else None}


def _table(series: Series, parts: list[tuple[Split, Tensor]]) -> Tensor:
    """Logits [rows of the original training set, C], filled for the images of `parts`."""
    first = parts[0][1]
    table = torch.zeros(series.data.num_rows, first.shape[1], device=first.device)
    for split, logits in parts:
        table[split.rows.to(table.device)] = logits
    return table
