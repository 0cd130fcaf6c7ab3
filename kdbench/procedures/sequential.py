"""Sequential distillation: each network is taught by the one before it (teacher assistants, Mirzadeh et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from kdbench.arguments.ranges import Text, listed
from kdbench.errors import UserError, require
from kdbench.results.result import RunResult
from kdbench.runs.obtain import obtain
from kdbench.runs.origin import origin_of
from kdbench.runs.recipe import TEACHER_KEYS, LossSpec, NetworkSpec, Recipe, TeacherSpec
from kdbench.runs.series import Series, opened, seeds_apart, specs_named
from kdbench.runs.taught import TaughtBy

CHAIN = "a list of at least two networks: the teacher, ..., the student"
Entry = str | dict[str, object]  # a loss by name, or its name and options


def sequential(
    recipe: Recipe,
    out: Path,
    chain: Annotated[list[Text], listed(2, CHAIN)] | None = None,
    losses: list[Entry] | None = None,
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
    hops = hops or [recipe.loss] * (len(specs) - 1)
    count = f"one loss a hop: {len(specs) - 1} for a chain of {len(specs)}"
    require(len(hops) == len(specs) - 1, "procedure.losses", losses, count)
    spec = _head(recipe, specs[0])
    recipe = _headed(recipe, spec, specs[-1])
    with opened(recipe, out) as series:
        first = obtain(spec, recipe, series.data)
        last, final = _along(series, first, specs[1:], hops)
        task = series.data.task
        figures = task.primaries(final.last, "chain")
        if direct:
            stage = series.stage(f"direct-{specs[-1].name}", first, replace(series.recipe, student=specs[-1]))
            alone = series.run(stage, first).last
            figures |= task.primaries(alone, "direct")
            key = task.on("test")
            figures[f"gain/{key}"] = final.last[key] - alone[key]
        return series.conclude(last, figures)


def _along(series: Series, first: TaughtBy, specs: list[NetworkSpec], losses: list[LossSpec]) -> tuple[Path, RunResult]:
    """The folder and result of the last hop."""
    teacher = first
    for hop, (spec, loss) in enumerate(zip(specs, losses, strict=True)):
        to_go = len(specs) - 1 - hop
        own = replace(series.recipe, student=spec, loss=loss, seeds=seeds_apart(series.recipe.seeds, to_go))
        stage = series.stage(f"{teacher.name}-{spec.name}", teacher, own)
        result = series.run(stage, teacher)
        if to_go:
            teacher = series.taught(stage.folder)
    return stage.folder, result


def _networks(recipe: Recipe, chain: list[str] | None) -> list[NetworkSpec]:
    if chain is None:
        spec = recipe.need_teacher("a network, or procedure.chain must name the teacher")
        return [spec.origin.describe(recipe.catalogue), recipe.student]
    for key, place, end in (("teacher", 0, "begin"), ("student", -1, "end")):
        typed = next((entry.split("=", 1)[1] for entry in recipe.record.overrides if entry.startswith(f"{key}=")), None)
        if chain and typed is not None and typed != chain[place]:
            allowed = f"a list that {end}s with {typed}, as {key}={typed} says; or leave {key}= out"
            raise UserError("procedure.chain", chain, allowed)
    specs = specs_named(recipe, chain, "procedure.chain")
    own = recipe.teacher.origin.describe(recipe.catalogue) if recipe.teacher else None
    return [own, *specs[1:]] if own is not None and own.name == chain[0] else specs


def _losses(recipe: Recipe, losses: list[Entry] | None) -> list[LossSpec]:
    """The losses by name; the recipe's own keeps the options typed for it."""
    found = []
    for i, entry in enumerate(losses or []):
        key = f"procedure.losses[{i}]"
        name, options = (entry, {}) if isinstance(entry, str) else _named(entry, key)
        same = name == recipe.loss.name and not options
        found.append(recipe.loss if same else recipe.catalogue.loss(name, options, key))
        found[-1].make()  # refuses values out of range before anything is trained
    return found


def _named(entry: Mapping[str, object], key: str) -> tuple[str, Mapping[str, object]]:
    options = dict(entry)
    require("name" in options, key, options, "a loss's name, or a mapping with the key name: {name: kl, tau: 4}")
    return str(options.pop("name")), options


def _head(recipe: Recipe, network: NetworkSpec) -> TeacherSpec:
    """`teacher=` with all its options if it is the chain's first network, or that network trained like it."""
    spec = recipe.need_teacher("a network: its schedule and optimizer train the chain's first")
    same = network.name == spec.origin.describe(recipe.catalogue).name
    return spec if same else replace(spec, origin=origin_of(network))


def _headed(recipe: Recipe, spec: TeacherSpec, student: NetworkSpec) -> Recipe:
    """The recipe with the chain's ends as its teacher and student, so that the result says what was run."""
    record, network = recipe.record, spec.origin.describe(recipe.catalogue)
    node = dict(record.section("teacher"))
    if spec is not recipe.teacher:
        own = {key: value for key, value in node.items() if key in TEACHER_KEYS}
        node = {**own, "checkpoint": None, "run": None, **network.config}
    tree = {**record.tree, "teacher": node, "student": dict(student.config)}
    choices = {**record.choices, "teacher": network.name, "student": student.name}
    return replace(recipe, teacher=spec, student=student, record=replace(record, tree=tree, choices=choices))
