"""Sequential distillation: each network is taught by the one before it (teacher assistants, Mirzadeh et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kdbench.engine.options import require
from kdbench.errors import UserError
from kdbench.results.result import RunResult
from kdbench.runs.given import GivenTeacher
from kdbench.runs.obtain import obtain_teacher
from kdbench.runs.recipe import LossSpec, NetworkSpec, Recipe
from kdbench.runs.series import Series, opened, seeds_apart, spec_named, top1


def sequential(
    recipe: Recipe,
    out: Path,
    chain: list[str] | None = None,
    losses: list[str | dict[str, Any]] | None = None,
    direct: bool = True,
) -> RunResult:
    """Distil along `chain`: its first network is the teacher, trained on labels like any other, its last the student.

    null: from `teacher=` to `student=` in one hop. `losses`: one for every hop, a name or a mapping of a name and
    options ({name: kl, tau: 2}); null: the recipe's for all. `direct`: also distil the first network into the last one
    in a single hop, with the recipe's loss and the same seeds as the last hop, as the run to compare with. The networks
    named by `teacher=` and `student=` keep the options typed for them; all others are as their YAML has them.

    The last hop has the recipe's seeds, each earlier one others, so that a chain may repeat a network.
    Raises UserError for a chain of fewer than two networks or another number of losses than hops.
    """
    specs, hops = _networks(recipe, chain), _losses(recipe, losses)
    allowed = "a list of at least two networks: the teacher, ..., the student"
    require(len(specs) >= 2, "procedure.chain", chain, allowed)
    hops = hops or [recipe.loss] * (len(specs) - 1)
    count = f"one loss a hop: {len(specs) - 1} for a chain of {len(specs)}"
    require(len(hops) == len(specs) - 1, "procedure.losses", losses, count)
    recipe = _headed(recipe, specs)
    with opened(recipe, out) as series:
        first = obtain_teacher(recipe, series.data)
        assert first is not None
        last, final = _along(series, first, specs[1:], hops)
        figures = top1(final.last, "chain")
        if direct:
            stage = series.stage(f"direct-{specs[-1].name}", teacher=first, student=specs[-1])
            alone = series.run(stage, first).last
            figures |= top1(alone, "direct")
            figures["gain/test/top1"] = final.last["test/top1"] - alone["test/top1"]
        return series.conclude(last, figures)


def _along(
    series: Series, first: GivenTeacher, specs: list[NetworkSpec], losses: list[LossSpec]
) -> tuple[Path, RunResult]:
    """The folder and result of the last hop."""
    teacher = first
    for hop, (spec, loss) in enumerate(zip(specs, losses, strict=True)):
        to_go = len(specs) - 1 - hop
        seeds = seeds_apart(series.recipe.seeds, to_go)
        stage = series.stage(f"{teacher.name}-{spec.name}", teacher=teacher, student=spec, loss=loss, seeds=seeds)
        result = series.run(stage, teacher)
        if to_go:
            teacher = series.taught(stage.folder)
    return stage.folder, result


def _networks(recipe: Recipe, chain: list[str] | None) -> list[NetworkSpec]:
    if chain is None:
        require(
            recipe.teacher is not None,
            "teacher",
            "none",
            "a network, or procedure.chain must name the teacher",
        )
        assert recipe.teacher is not None
        return [recipe.teacher.network, recipe.student]
    for key, place, end in (("teacher", 0, "begin"), ("student", -1, "end")):
        typed = next((entry.split("=", 1)[1] for entry in recipe.record.overrides if entry.startswith(f"{key}=")), None)
        if chain and typed is not None and typed != chain[place]:
            raise UserError(
                f"procedure.chain = {chain}: must {end} with {typed}, as {key}={typed} says; or leave {key}= out"
            )
    return [_spec(recipe, name, place == 0) for place, name in enumerate(chain)]


def _spec(recipe: Recipe, name: str, head: bool) -> NetworkSpec:
    if head and recipe.teacher is not None and name == recipe.teacher.network.name:
        return recipe.teacher.network
    return spec_named(recipe, name)


def _losses(recipe: Recipe, losses: list[str | dict[str, Any]] | None) -> list[LossSpec]:
    """The losses by name; the recipe's own keeps the options typed for it."""
    found = []
    for entry in losses or []:
        name, options = (entry, {}) if isinstance(entry, str) else _named(entry)
        same = name == recipe.loss.name and not options
        found.append(recipe.loss if same else recipe.catalogue.loss(name, options))
        found[-1].make()  # refuses values out of range before anything is trained
    return found


def _named(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(entry)
    if "name" not in options:
        raise UserError(f"procedure.losses: {entry} must have the key name, e.g. {{name: kl, tau: 4}}")
    return str(options.pop("name")), options


def _headed(recipe: Recipe, specs: list[NetworkSpec]) -> Recipe:
    """The recipe with the chain's ends as its teacher and student, so that the result says what was run.

    The teacher is `teacher=` with all its options if it is the chain's first network, or that network trained like it.
    """
    spec, student, record = recipe.teacher, specs[-1], recipe.record
    require(spec is not None, "teacher", "none", "a network: its schedule and optimizer train the chain's first")
    assert spec is not None
    if specs[0].name != spec.network.name:
        spec = replace(spec, network=specs[0], checkpoint=None, run=None, source=None)
    names = {field.name for field in fields(spec)}
    own = {key: value for key, value in record.tree.get("teacher", {}).items() if key in names}
    own |= {"checkpoint": spec.checkpoint, "run": spec.run}
    tree = {**record.tree, "teacher": {**own, **spec.network.config}, "student": dict(student.config)}
    choices = {**record.choices, "teacher": spec.network.name, "student": student.name}
    return replace(recipe, teacher=spec, student=student, record=replace(record, tree=tree, choices=choices))
