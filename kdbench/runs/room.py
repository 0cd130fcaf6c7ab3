"""How many students fit on a GPU at once: measured, by a step of each that differs from the others."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from kdbench.engine.device import Placement, place, wants_graph
from kdbench.runs.stage import Stage, eval_sets, make_learner, train_batches, with_extension
from kdbench.runs.taught import TaughtBy

log = logging.getLogger(__name__)

USABLE = 0.8  # of the free memory: recorded graphs and fragments take the rest


class Need(NamedTuple):
    """Bytes that a student keeps (weights, optimizer state), and those that only its own step takes."""

    kept: int
    step: int


def parts(
    stages: Sequence[Stage], teacher: TaughtBy | None, max_members: int | None = None
) -> Iterator[Sequence[Stage]]:
    """Stages that share their batches, in lots that fit into the device's memory, each of at most `max_members`."""
    placement = place(stages[0].recipe.trainer)
    size = max_members or len(stages)
    if placement.device.type != "cuda" or len(stages) == 1:
        yield from (stages[i : i + size] for i in range(0, len(stages), size))
        return
    found: dict[str, Need] = {}
    for stage in stages:
        if memory_key(stage) not in found:
            found[memory_key(stage)] = measure(stage, teacher, placement)
    needs = [found[memory_key(stage)] for stage in stages]
    gc.collect()  # a training is freed by the cycle collector; what it held would count as taken
    torch.cuda.empty_cache()
    free = int(USABLE * torch.cuda.mem_get_info(placement.device)[0])
    recorded = wants_graph(stages[0].recipe.trainer, placement.device, stages[0].recipe.optimizer)
    for first, last in lots([_beside(need) for need in needs] if recorded else needs, free, size):
        yield stages[first:last]


def lots(needs: Sequence[Need], free: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` students whose kept bytes and largest step fit into `free`; none is empty.

    Students that step one after the other use the memory of their steps again: it does not add up.
    """
    first = kept = step = 0
    for position, need in enumerate(needs):
        too_much = kept + need.kept + max(step, need.step) > free
        if position > first and (too_much or position - first == size):
            yield first, position
            first, kept, step = position, 0, 0
        kept, step = kept + need.kept, max(step, need.step)
    yield first, len(needs)


def _beside(need: Need) -> Need:
    """Of a student whose steps are recorded: its step's memory is its own, for good. Its first ones are compared with
    plain ones of copies of it, which step one after the other."""
    return Need(4 * need.kept + need.step, need.step)


def memory_key(stage: Stage) -> str:
    """What the memory of a student in a cohort depends on. Seeds, learning rates and weight decays are not among it."""
    recipe = stage.recipe
    optimizer = replace(recipe.optimizer, lr=0.0, weight_decay=0.0)
    return repr((recipe.student.config, recipe.loss.name, recipe.loss.config, optimizer, recipe.trainer))


def measure(stage: Stage, teacher: TaughtBy | None, placement: Placement) -> Need:
    """What a student needs, by one step that nothing is kept of. Costs a second."""
    batches, sets = train_batches(stage, placement), eval_sets(stage.data, stage.recipe.trainer, placement)
    torch.cuda.synchronize(placement.device)
    before = torch.cuda.memory_allocated(placement.device)
    torch.cuda.reset_peak_memory_stats(placement.device)
    learner = make_learner(with_extension(stage, teacher), teacher, batches, sets, placement)
    learner.begin_epoch(0)
    batch = next(iter(batches.epoch(0, 1)))
    learner.step(batch, teacher.teacher(batch) if teacher else None)
    if learner.failure is not None:
        raise learner.failure
    torch.cuda.synchronize(placement.device)
    after = torch.cuda.memory_allocated(placement.device)
    peak = torch.cuda.max_memory_allocated(placement.device)
    return Need(after - before, peak - after)
