"""Runs of one sweep that share data and teacher, trained side by side: one batch, one teacher pass, many students."""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from kdbench import build
from kdbench.errors import require
from kdbench.results.report import show
from kdbench.results.result import is_finished, read_result
from kdbench.runs.lifecycle import run_stages
from kdbench.runs.obtain import obtain
from kdbench.runs.room import parts
from kdbench.runs.stage import Stage, student_stage
from kdbench.runs.trial import refuse_unmeasured, try_networks

log = logging.getLogger(__name__)

SINGLE = {"_target_": "kdbench.procedures.single.single"}  # the procedure that a cohort replaces
Outcome = float | None | Exception  # what a run's sweeper reads, or why it failed


class Run(NamedTuple):
    """One point of a sweep."""

    cfg: DictConfig  # the task's configuration
    out: Path
    overrides: list[str]
    choices: dict[str, str]


def plan(runs: Sequence[Run]) -> list[list[int]]:
    """Positions of the runs that go together, in the order of each group's first; a run by itself is a group of one.

    Together go runs of procedure=single with the same dataset, teacher, trainer and batch size that are not finished.
    """
    groups: dict[Hashable, list[int]] = {}
    folders: set[Path] = set()
    for position, run in enumerate(runs):
        # The same run twice: the second one goes by itself, and finds the first one's result.
        key = _family(run) if run.out not in folders else None
        folders.add(run.out)
        groups.setdefault(position if key is None else key, []).append(position)
    return list(groups.values())


def side_by_side(runs: Sequence[Run]) -> list[list[int]]:
    """`plan`, narrowed to runs that go through the same batches: what is best trained by one process."""
    groups: dict[Hashable, list[int]] = {}
    for number, group in enumerate(plan(runs)):
        for i in group:
            cfg = runs[i].cfg
            groups.setdefault((number, int(cfg.schedule.epochs), int(cfg.seeds.data)), []).append(i)
    return list(groups.values())


def train_together(runs: Sequence[Run], max_members: int | None = None) -> list[Outcome]:
    """Train runs that `plan` put together, and print their results; outcomes in their order.

    Runs of the same length and data seed share their batches too; the others share the data's memory, the teacher and
    its table, and train one cohort after the other. `max_members` is the largest cohort; None: as many as fit. A run
    that fails stops no other. Raises what stops all of them: a UserError for runs that `plan` would not put together,
    and what reading the data or getting the teacher raises.
    """
    _refuse_strangers(runs)
    recipes = [build.make_recipe(run.cfg, run.overrides, run.choices) for run in runs]
    data = recipes[0].data()
    outcomes: dict[Path, Outcome] = {}
    stages = []
    for recipe, run in zip(recipes, runs):
        try:  # as a run by itself does, before its teacher is trained
            recipe.refuse_untaught()
            refuse_unmeasured(run.cfg.monitor, data)
            try_networks(replace(recipe, data=lambda: data))
            stages.append(student_stage(recipe, data, run.out))
        except Exception as error:
            outcomes[run.out] = error
    teacher = obtain(recipes[0].teacher, recipes[0], data) if recipes[0].teacher and stages else None
    for cohort in _cohorts(stages):
        for members in parts(cohort, teacher, max_members):
            _announce(members)
            results = run_stages(members, teacher)
            outcomes |= {one.folder: result for one, result in zip(members, results) if isinstance(result, Exception)}
    return [outcomes.get(run.out) or _concluded(run) for run in runs]


def _family(run: Run) -> Hashable | None:
    """What runs must agree in to share a teacher; None for a run that goes by itself."""
    tree = build.plain(run.cfg)
    finished = is_finished(run.out) and not tree["force"]
    if finished or tree["procedure"] != SINGLE:
        return None
    return tuple(_shared(run).values())


def _shared(run: Run) -> dict[str, str]:
    """What the members of a cohort have in common, as text, by key."""
    tree = build.plain(run.cfg)
    found = {key: tree[key] for key in ("dataset", "trainer", "paths")}
    found["teacher"] = [run.choices.get("teacher"), tree["teacher"]]
    found["schedule.batch_size"] = int(run.cfg.schedule.batch_size)
    return {key: json.dumps(value, sort_keys=True, default=str) for key, value in found.items()}


def _refuse_strangers(runs: Sequence[Run]) -> None:
    """Raise a UserError for a run that would be trained on another one's data, under its teacher, or as single."""
    for run in runs:
        procedure = build.plain(run.cfg)["procedure"]
        require(procedure == SINGLE, "procedure", procedure, f"single for runs side by side ({run.out})")
    first, others = runs[0], runs[1:]
    common = _shared(first)
    for run in others:
        for key, value in _shared(run).items():
            same = f"that of {first.out}: runs side by side share it"
            require(value == common[key], key, f"that of {run.out}", same)


def _cohorts(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Stages that go through the same batches."""
    groups: dict[Hashable, list[Stage]] = {}
    for stage in stages:
        groups.setdefault((stage.recipe.schedule.epochs, stage.recipe.seeds.data), []).append(stage)
    yield from groups.values()


def _announce(members: Sequence[Stage]) -> None:
    if len(members) > 1:
        log.info("%d runs side by side, seeds.data=%d:", len(members), members[0].recipe.seeds.data)
        for stage in members:
            log.info("  %s", stage.folder.name)


def _concluded(run: Run) -> Outcome:
    try:
        result = read_result(run.out)
        show(result, run.out, already=False)
        return result.monitored(run.cfg.monitor)
    except Exception as error:  # a monitor that does not exist fails its own run alone
        return error
