"""Born-again networks: generations of students, each taught by the one before it (Furlanello et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kdbench.data.bundle import Bundle
from kdbench.engine.metrics import report
from kdbench.engine.options import require
from kdbench.errors import UserError
from kdbench.models.base import first_layer_name, last_layer_name
from kdbench.models.ensemble import ensemble_logits
from kdbench.results.result import RunResult
from kdbench.runs.given import GivenTeacher
from kdbench.runs.obtain import obtain_teacher
from kdbench.runs.recipe import Recipe
from kdbench.runs.series import opened, seeds_apart

Layer = Literal["first", "last"]


def born_again(recipe: Recipe, out: Path, generations: int = 3, share: list[Layer] | None = None) -> RunResult:
    """`generations` students in turn, each with its own seeds, taught by the one before; `teacher=` teaches the first.

    The result is the last generation's. Its figures: after each generation the ensemble of all so far (the mean of
    their predictions), without the first teacher and with it. `share`: layers of its teacher, "first" and "last", that
    every student keeps and does not train (BAN-ResNet: the first convolution and the last linear layer).
    Raises UserError for no teacher, and where a layer to share has another shape in student and teacher.
    """
    require(recipe.teacher is not None, "teacher", "none", "a network: the first generation learns from it")
    require(generations >= 1, "procedure.generations", generations, "at least 1")
    layers = list(share or [])
    require(set(layers) <= {"first", "last"}, "procedure.share", layers, "a list of first and last, or []")
    with opened(recipe, out) as series:
        teacher = obtain_teacher(recipe, series.data)
        assert teacher is not None
        family, figures = [teacher], dict[str, float]()
        for generation in range(1, generations + 1):
            stage = series.stage(
                f"generation{generation}",
                teacher=teacher,
                seeds=seeds_apart(recipe.seeds, generation),
                adapt=sharing(layers) if layers else None,
            )
            series.run(stage, teacher)
            next_one = series.taught if generation < generations else series.finished
            teacher = next_one(stage.folder)
            family.append(teacher)
            figures |= ensemble_figures(family[1:], series.data, f"ensemble/{generation}")
            figures |= ensemble_figures(family, series.data, f"ensemble_with_teacher/{generation}")
        return series.conclude(stage.folder, figures)


def ensemble_figures(members: Sequence[GivenTeacher], data: Bundle, prefix: str) -> dict[str, float]:
    """Accuracy, likelihood and calibration of the members' mean prediction on the validation and test sets."""
    figures: dict[str, float] = {}
    for name, split in (("val", data.val), ("test", data.test)):
        if split is not None:
            logits = ensemble_logits([member.reference[name] for member in members])
            found = report(logits, split.labels.to(logits.device))
            figures |= {f"{prefix}/{name}/{key}": found[key] for key in ("top1", "nll", "ece")}
    return figures


class sharing:
    """The adaptation of a fresh student that takes over layers of its teacher, frozen."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def __call__(self, student: nn.Module, teacher: GivenTeacher | None) -> None:
        assert teacher is not None
        if teacher.network is None:
            raise UserError(
                f"procedure.share: the teacher {teacher.name} is no single network whose layers could be shared"
            )
        for layer in self.layers:
            name_of = first_layer_name if layer == "first" else last_layer_name
            _take(
                student.get_submodule(name_of(student)),
                teacher.network.get_submodule(name_of(teacher.network)),
                layer,
            )
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UserError("procedure.share: nothing is left to train, the student consists of the shared layers")


def _take(own: nn.Module, given: nn.Module, layer: str) -> None:
    mine, theirs = own.state_dict(), given.state_dict()
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"procedure.share: the {layer} layers differ, {shapes[0]} in the student and {shapes[1]} in the teacher"
        )
    with torch.no_grad():
        own.load_state_dict(theirs)
    own.requires_grad_(False)
