"""Lots of points: a job of Ray, Slurm or joblib, or the process of a device, that trains many points as a cohort.

Whoever runs the job gets a function of the first point's configuration (`Lot`), which can be sent to another machine;
there the cohort launcher runs all points of the lot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.utils import get_class
from omegaconf import DictConfig

Point = tuple[int, Sequence[str]]  # its number in the sweep, and its overrides
COHORT = "hydra_plugins.kdbench_cohort.CohortLauncher"


@dataclass(frozen=True)
class Lot:
    """The task of jobs that train lots of points: how each of them ended, in the order of its lot."""

    task: Any
    context: Any
    config: DictConfig  # the sweep's
    lots: Sequence[Sequence[Point]]  # by the number of the job
    members: int | None = None  # at most so many side by side

    def __call__(self, cfg: DictConfig) -> list[JobReturn]:
        return self.run(int(HydraConfig.get().job.num))

    def run(self, job: int) -> list[JobReturn]:
        return cohort_launcher(self.task, self.context, self.config, self.members).run(self.lots[job])

    def elsewhere(self, job: int, singletons: Any) -> list[JobReturn]:
        """`run` in a new process."""
        setup_globals()
        Singleton.set_state(singletons)
        return self.run(job)


def cohort_launcher(task: Any, context: Any, config: DictConfig, members: int | None = None) -> Any:
    launcher = get_class(COHORT)(members)
    launcher.setup(hydra_context=context, task_function=task, config=config)
    return launcher


def chunks(groups: Sequence[Sequence[int]], members: int) -> list[list[int]]:
    """Points that go together, in lots of at most `members`."""
    return [list(group[i : i + members]) for group in groups for i in range(0, len(group), members)]


def dealt(groups: Sequence[Sequence[int]], hands: int) -> list[list[int]]:
    """Points that go together, dealt out: each group evenly, more to hands that have fewer. None is empty-handed."""
    found: list[list[int]] = [[] for _ in range(hands)]
    for group in groups:
        begin = 0
        for number, hand in enumerate(sorted(found, key=len)):
            count = len(group) // hands + (number < len(group) % hands)
            hand += group[begin : begin + count]
            begin += count
    return [hand for hand in found if hand]


def in_order(
    lots: Sequence[Sequence[int]], ends: Sequence[JobReturn], words: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """How each point ended, in the order of the sweep; all of a lot failed if its job did."""
    found: list[JobReturn] = [JobReturn(overrides=list(typed)) for typed in words]
    for lot, end in zip(lots, ends, strict=True):
        for place, point in enumerate(lot):
            if end.status == JobStatus.COMPLETED:
                found[point] = end.return_value[place]
            else:
                found[point].status, found[point].return_value = JobStatus.FAILED, end._return_value
    return found
