"""Noisy student (Xie et al. 2020): a teacher labels images; a noised student learns them, and teaches the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from kdbench.arguments import checked
from kdbench.arguments.ranges import Amount, Count, Text, from_to, within
from kdbench.data.bundle import Split
from kdbench.data.unlabelled import Pool, joined, make_pool, trusted
from kdbench.errors import require
from kdbench.results.result import RunResult
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.series import Series, opened, seeds_apart, specs_named
from kdbench.runs.taught import TaughtBy
from kdbench.teachers.constant import ConstantTeacher

Labels = Literal["soft", "hard"]
Threshold = Annotated[float, from_to(0, 1)]


@checked
@dataclass(frozen=True)
class Labelling:
    """Which images a teacher's answers are trusted for, and what becomes of them."""

    labels: Labels
    threshold: Threshold
    per_class: Count | None


def noisy_student(
    recipe: Recipe, out: Path, iterations: Annotated[int, within(1, 1000)] = 3, labelled: Amount | None = 0.1,
    labels: Labels = "soft", threshold: Threshold = 0.0, per_class: Count | None = None,
    students: list[Text] | None = None,
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
    spec = recipe.need_teacher("a network: it labels the first images")
    labelling = Labelling(labels, threshold, per_class)
    counted = students is None or len(students) == iterations
    require(counted, "procedure.students", students, f"null or {iterations} networks, one an iteration")
    if labels == "soft":
        recipe.need_taught_loss("a loss that learns from a teacher, or procedure.labels=hard")
    specs = specs_named(recipe, students or [recipe.student.name] * iterations, "procedure.students")
    recipe.need_classes("noisy_student")
    with opened(recipe, out) as opening:
        pool = make_pool(opening.data, labelled, recipe.seeds.data)
        series = replace(opening, data=pool.data(opening.data))
        teacher = obtain(spec, recipe, series.data)
        rows = []
        for turn, student in enumerate(specs, start=1):
            own = replace(series.recipe, student=student, seeds=seeds_apart(recipe.seeds, iterations - turn))
            folder, row = _iterate(series, pool, teacher, own, labelling)
            rows.append({"iteration": turn, **row})
            teacher = series.taught(folder) if turn < iterations else teacher
        return series.conclude(folder, {"labelled_images": float(len(pool.labelled))}, {"pseudo_labels": rows})


def _iterate(
    series: Series, pool: Pool, teacher: TaughtBy, recipe: Recipe, labelling: Labelling
) -> tuple[Path, dict[str, object]]:
    """Label, choose, and train one student: its folder, and what the labels were like."""
    answers = series.answers(teacher, pool.unlabelled)
    rows = trusted(answers.softmax(1), labelling.threshold, labelling.per_class).cpu()
    allowed = f"lower: the teacher is that sure of none of the {len(pool.unlabelled)} images"
    require(len(rows) > 0, "procedure.threshold", labelling.threshold, allowed)
    answer = answers.argmax(1).cpu()
    chosen = pool.unlabelled.select(rows)
    if labelling.labels == "hard":
        chosen = replace(chosen, labels=answer[rows])
    known = pool.labelled
    fixed = ConstantTeacher(_table(series, [(known, series.answers(teacher, known)), (pool.unlabelled, answers)]))
    stage = series.stage(f"student{len(series.entries) + 1}-{recipe.student.name}", teacher, recipe)
    stage = replace(stage, split=joined([replace(known, clean=None), chosen]))
    # A table of views is of no use here: every view of an image has the clean image's answer.
    series.run(stage, replace(teacher, teacher=fixed, tables=None))
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
