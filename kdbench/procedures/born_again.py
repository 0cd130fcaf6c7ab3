"""Born-again networks: generations of students, each taught by the one before it (Furlanello et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from torch import nn

from kdbench.arguments.ranges import within
from kdbench.data.bundle import Bundle
from kdbench.engine.metrics import task_figures
from kdbench.errors import UserError, require
from kdbench.models.base import first_layer_name, last_layer_name
from kdbench.models.ensemble import ensemble_logits
from kdbench.results.metrics import EMBEDDING
from kdbench.results.result import RunResult
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import NetworkSpec, Recipe
from kdbench.runs.series import opened, seeds_apart
from kdbench.runs.stage import Start
from kdbench.runs.taught import TaughtBy
from kdbench.types import Info

Layer = Literal["first", "last"]


def born_again(
    recipe: Recipe, out: Path, generations: Annotated[int, within(1, 1000)] = 3, share: list[Layer] | None = None
) -> RunResult:
    """`generations` students in turn, each with its own seeds, taught by the one before; `teacher=` teaches the first.

    The result is the last generation's. Its figures: after each generation the ensemble of all so far (the mean of
    their predictions), without the first teacher and with it. `share`: layers of its teacher, "first" and "last", that
    every student keeps and does not train (BAN-ResNet: the first convolution and the last linear layer).
    Raises UserError for no teacher, and where a layer to share has another shape in student and teacher.
    """
    spec = recipe.need_teacher("a network: the first generation learns from it")
    layers = list(share or [])
    with opened(recipe, out) as series:
        student, first = recipe.student, spec.origin.describe(recipe.catalogue)
        pairs = shared_layers(student, first, layers, series.data.info)  # refused now, or never
        teacher = obtain(spec, recipe, series.data)
        family, figures = [teacher], dict[str, float]()
        for generation in range(1, generations + 1):
            own = replace(series.recipe, seeds=seeds_apart(recipe.seeds, generation))
            stage = series.stage(f"generation{generation}", teacher, own)
            stage = replace(stage, start=sharing(pairs, teacher.layers()) if pairs else None)
            series.run(stage, teacher)
            pairs = {mine: mine for mine in pairs}  # the next teacher is such a student
            next_one = series.taught if generation < generations else series.finished
            teacher = next_one(stage.folder)
            family.append(teacher)
            figures |= ensemble_figures(family[1:], series.data, f"ensemble/{generation}")
            figures |= ensemble_figures(family, series.data, f"ensemble_with_teacher/{generation}")
        return series.conclude(stage.folder, figures)


def ensemble_figures(members: Sequence[TaughtBy], data: Bundle, prefix: str) -> dict[str, float]:
    """Accuracy, likelihood and calibration of the members' mean prediction on the validation and test sets.

    None of embeddings, which predict nothing that could be averaged.
    """
    figures: dict[str, float] = {}
    if data.task is EMBEDDING:
        return figures
    keys = (data.task.primary.name, "nll", "ece")
    for name, split in (("val", data.val), ("test", data.test)):
        # Of a text with many words the logits are not kept: what several generations say together is left out.
        if split is not None and all(name in member.reference for member in members):
            logits = ensemble_logits([member.reference[name] for member in members])
            found = task_figures(data.task, logits, split.wanted.to(logits.device))
            figures |= {f"{prefix}/{name}/{key}": found[key] for key in keys}
    return figures


def shared_layers(student: NetworkSpec, teacher: NetworkSpec, layers: Sequence[Layer], info: Info) -> dict[str, str]:
    """The paths of layers in the student and in its teacher, by what both networks are; {} for no layers.

    Raises UserError where they have other shapes, where the teacher has no layers of its own, and where the student
    would have nothing left to train.
    """
    if not layers:
        return {}
    allowed = f"[], since teacher {teacher.name} is no single network whose layers could be shared"
    require(teacher.single, "procedure.share", list(layers), allowed)
    mine, theirs = student.sketch(info), teacher.sketch(info)
    found = {}
    for layer in layers:
        path_of = first_layer_name if layer == "first" else last_layer_name
        found[path_of(mine)] = path_of(theirs)
        _same_shapes(mine.get_submodule(path_of(mine)), theirs.get_submodule(path_of(theirs)), layer)
    for path in found:
        mine.get_submodule(path).requires_grad_(False)
    left = any(parameter.requires_grad for parameter in mine.parameters())
    require(left, "procedure.share", list(layers), "fewer layers: the student has no others that could be trained")
    return found


def sharing(pairs: Mapping[str, str], teacher: nn.Module) -> Start:
    """A student that has layers of its teacher, frozen, in place of its own: `pairs` by their paths in both."""
    weights = {
        f"{mine}.{name}": value
        for mine, theirs in pairs.items()
        for name, value in teacher.get_submodule(theirs).state_dict().items()
    }
    return Start(weights, tuple(pairs))


def _same_shapes(own: nn.Module, given: nn.Module, layer: str) -> None:
    mine, theirs = ({key: tuple(value.shape) for key, value in module.state_dict().items()} for module in (own, given))
    if mine != theirs:
        both = f"{mine} in the student and {theirs} in the teacher"
        raise UserError("procedure.share", said=f"the {layer} layers differ, {both}")
