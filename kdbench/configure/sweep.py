"""Every run of a sweep, whichever launcher and sweeper run it: checked before the first one, waited for, counted."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kdbench import world
from kdbench.configure.check import check
from kdbench.configure.compose import tell_left_out
from kdbench.configure.idle import idle, tell_idle
from kdbench.configure.lots import Lot, chunks, cohort_launcher, in_order
from kdbench.configure.naming import config_hash, without_hydra
from kdbench.errors import Busy, UserError, require, told
from kdbench.files import is_locked, lock
from kdbench.results.status import LOCK, note_points

log = logging.getLogger(__name__)

Task = Callable[[DictConfig], Any]
Finished = Callable[[DictConfig, Path], Callable[[], Any] | None]
Better = Callable[[DictConfig], int]
MOST_POINTS = 10_000
STEP = "a range with a step that is a number other than 0"
PAUSE = 1.0  # seconds between two looks at a run that another process trains


class Sweep:
    """What became of the runs of a sweep."""

    def __init__(self, refuse: Task | None, finished: Finished | None = None, better: Better | None = None) -> None:
        self.refuse, self.finished, self.better = refuse, finished, better
        self.begun = False
        self.runs = 0
        self.folders: list[Path] = []  # of the runs that did not fail
        self.failed: list[tuple[str, BaseException]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put this sweep between Hydra's sweepers and launchers."""
        plugins: Any = Plugins.instance()
        make, make_sweeper = plugins.instantiate_launcher, plugins.instantiate_sweeper
        plugins.instantiate_launcher = lambda **context: _Watched(make, self, **context)
        plugins.instantiate_sweeper = lambda **context: self._sweeper(make_sweeper, **context)
        try:
            yield
        finally:
            del plugins.instantiate_launcher, plugins.instantiate_sweeper

    def _sweeper(self, make: Callable[..., Any], config: DictConfig, **context: Any) -> Any:
        """Hydra's sweeper; one that optimises does so in the direction that is better, unless another was typed."""
        directed = self.directed(config)
        sweeper = make(config=directed, **context)
        if directed is not config:  # points are composed without what was changed, and Hydra 1.4 compares
            sweeper.setup(config=config, **context)
        sweeper.validate_batch_is_legal = lambda batch: None  # which composes every point: `_check` does that next
        return sweeper

    def directed(self, config: DictConfig) -> DictConfig:
        """The configuration with the better `direction` for a sweeper that has one.

        What was typed counts, with a warning where it looks for the worst.
        """
        sweeper = config.hydra.sweeper
        if self.better is None or "direction" not in sweeper:
            return config
        outer = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # as in a point's own task
        try:
            right = "maximize" if self.better(without_hydra(config)) > 0 else "minimize"
        finally:
            HydraConfig.instance().cfg = outer
        if any(str(word).startswith("hydra.sweeper.direction=") for word in config.hydra.overrides.hydra):
            if right not in str(sweeper.direction):
                log.warning("hydra.sweeper.direction=%s: %s is better the other way", sweeper.direction, config.monitor)
            return config
        changed = copy.deepcopy(config)
        with read_write(changed.hydra.sweeper):
            changed.hydra.sweeper.direction = right
        return changed

    def take(self, job: JobReturn) -> None:
        """Note a run that has ended. A failed one has no value from here on, so that sweepers go on with the rest."""
        self.runs += 1
        if job.status == JobStatus.FAILED:
            self.failed.append((" ".join(filter_overrides(job.overrides or [])), job._return_value))
            job.status, job.return_value = JobStatus.COMPLETED, None
        elif job.hydra_cfg is not None:
            self.folders.append(Path(job.hydra_cfg.hydra.runtime.output_dir))

    def report(self) -> int:
        """Print what failed; the exit code."""
        if not self.failed:
            return 0
        lines = [f"kdbench: {len(self.failed)} of {self.runs} runs failed. The same command runs only those again."]
        lines += [f"  {overrides}: {told(error)}" for overrides, error in self.failed]
        print("\n".join(lines), file=sys.stderr)
        return 1


class _Watched:
    """A launcher whose jobs are all checked before the first one runs, and whose failed jobs are noted."""

    def __init__(
        self, make: Callable[..., Any], sweep: Sweep, *, hydra_context: Any, task_function: Task, config: DictConfig
    ) -> None:
        self.sweep, self.loader, self.config = sweep, hydra_context.config_loader, config
        self.members, own = _members(config)
        self.launcher = make(hydra_context=hydra_context, task_function=task_function, config=own)
        self.give = lambda task: self.launcher.setup(hydra_context=hydra_context, task_function=task, config=config)
        if own is not config:
            self.give(task_function)
        self.cohorts = lambda: cohort_launcher(task_function, hydra_context, config, self.members)
        sweep.begun = True
        launcher_name = str(config.hydra.launcher._target_).rpartition(".")[2]
        if launcher_name not in ("BasicLauncher", "CohortLauncher"):
            world.refuse_several("hydra/launcher", launcher_name, "they run one point after the other, or a cohort")
        if str(config.hydra.sweeper._target_).endswith("BasicSweeper"):  # others draw from a range
            refuse_many(_words(config))
            size = config.hydra.sweeper.get("max_batch_size")
            require(size is None or size > 0, "hydra.sweeper.max_batch_size", size, "null or at least 1")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        points = self._check(job_overrides, initial_job_idx)
        with _noted(Path(str(self.config.hydra.sweep.dir)), points):
            jobs = self._launch(job_overrides, initial_job_idx)
        for job in jobs:
            self.sweep.take(job)
        return jobs

    def _launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = self._start(job_overrides, initial_job_idx)
        while any(map(_passed_over, jobs)):
            for first, last in world.agreed(lambda: _free(jobs)):
                jobs[first:last] = self._start(job_overrides[first:last], initial_job_idx + first)
        return jobs

    def _start(self, words: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Let the launcher run points: a job for each, or for a lot of them that go together."""
        if self.members is None:
            return list(self.launcher.launch(words, initial_job_idx=first))
        cohorts = self.cohorts()
        points = [(first + i, typed) for i, typed in enumerate(words)]
        lots = chunks(cohorts.side_by_side(points), self.members)
        task = Lot(cohorts.task, cohorts.context, self.config, [[points[i] for i in lot] for lot in lots], self.members)
        log.info("%d runs as %d cohorts of up to %d", len(points), len(lots), self.members)
        self.give(task)
        ends = self.launcher.launch([words[lot[0]] for lot in lots], initial_job_idx=0)
        return in_order(lots, list(ends), words)

    def _check(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Path]:
        """The folders of the points. Raises UserError for those that cannot run."""
        faults, foreseen, unread = [], [], []
        outer = HydraConfig.instance().cfg
        points: dict[Path, tuple[str, str]] = {}
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            cfg = self.loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg.hydra.job):
                cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in a run's own values
            try:
                words, finished = " ".join(filter_overrides(overrides)), None
                if self.sweep.finished is not None:
                    folder = point_folder(cfg.hydra)
                    _refuse_shared(points, folder, words, cfg)
                    finished = self.sweep.finished(without_hydra(cfg), folder)
                if finished is None:
                    check(cfg, cfg)
                    unread.append(idle(cfg, overrides))
                    failure = self.sweep.refuse(without_hydra(cfg)) if self.sweep.refuse is not None else None
                    foreseen += [(words, failure)] if isinstance(failure, UserError) else []
                self.loader.keep(overrides, cfg)
            except UserError as error:
                faults.append((" ".join(filter_overrides(overrides)), str(error)))
            finally:
                HydraConfig.instance().cfg = outer
        if len({message for _, message in faults}) == 1:
            raise UserError(faults[0][1])
        if faults:
            lines = "\n".join(f"  {overrides}: {message}" for overrides, message in faults)
            raise UserError(f"nothing was run, as {len(faults)} of {len(job_overrides)} runs cannot:\n{lines}")
        if foreseen:
            lines = "\n".join(f"  {words}: {failure}" for words, failure in foreseen)
            count = len(foreseen), len(job_overrides)
            log.warning("%d of %d runs will fail, and the others are run:\n%s", *count, lines)
        tell_left_out(job_overrides)
        tell_idle(unread)
        return list(points)


def _members(config: DictConfig) -> tuple[int | None, DictConfig]:
    """hydra.launcher.members of any launcher, which does not know it itself, and the configuration without it."""
    if "members" not in config.hydra.launcher:
        return None, config
    own = copy.deepcopy(config)
    launcher = own.hydra.launcher
    with read_write(launcher), open_dict(launcher):
        members = launcher.pop("members")
    require(isinstance(members, int) and members > 0, "hydra.launcher.members", members, "a number of at least 1")
    name = str(launcher._target_).rpartition(".")[2]
    allowed = "given as hydra.launcher.max_members" if name == "CohortLauncher" else "left out of this launcher"
    require(name not in ("CohortLauncher", "BasicLauncher"), "hydra.launcher.members", members, allowed)
    return int(members), own


def point_folder(hydra: Any) -> Path:
    """The folder of a sweep's point. `hydra`: Hydra's node of the point's configuration."""
    return Path(str(hydra.sweep.dir), str(hydra.sweep.subdir)).absolute()


def _refuse_shared(points: dict[Path, tuple[str, str]], folder: Path, words: str, cfg: DictConfig) -> None:
    """Raise a UserError for a point that would fall into the folder of another one of this sweep."""
    try:
        own = config_hash(cfg)
    except Exception:  # its own check says what is wrong
        return
    known, other = points.setdefault(folder, (own, words))
    if known != own:
        place = "name it by what differs (hydra.sweep.subdir)"
        raise UserError(f"{folder}: would hold two runs, {other} and {words}; {place}")


def _words(config: DictConfig) -> list[str]:
    """What a sweeper reads as its values: those of hydra.sweeper.params, and those that were typed."""
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create(), resolve=False)
    typed = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(params, dict)
    return [*(f"{key!s}={value}" for key, value in params.items()), *map(str, typed or [])]


def refuse_many(words: Sequence[str]) -> None:
    """Raise a UserError for a sweep of an interval, of no points, or of too many: Hydra makes a list of all before the
    first one runs, 10 million in a minute and 5 GB."""
    for one in _sweeping(words):
        if isinstance(one.value(), IntervalSweep):
            allowed = "values, as 1,2,4 or range(1,20): an interval is for hydra/sweeper=optuna"
            raise UserError(one.get_key_element().lstrip("+"), one.get_value_string(), allowed)
    counts = {one.key_or_group: (one.get_value_string(), _count(one)) for one in _sweeping(words)}
    for key, (value, count) in counts.items():
        require(count > 0, key, value, "one value or more to sweep over")
    points = math.prod(count for _, count in counts.values())
    if points > MOST_POINTS:
        key, (value, count) = max(counts.items(), key=lambda item: item[1][1])
        allowed = f"fewer values: this sweep has {points:,.0f} points, and {MOST_POINTS:,} is the most"
        raise UserError(key, value, allowed)


def _sweeping(words: Sequence[str]) -> list[Override]:
    return [one for one in OverridesParser.create().parse_overrides(list(words)) if one.is_sweep_override()]


def _count(override: Override) -> float:
    """How many values a sweep over one key has; infinity for a range without an end."""
    swept = override.value()
    if isinstance(swept, ChoiceSweep):
        return len(swept.list)
    if isinstance(swept, RangeSweep):
        low, high, step = (float(value or 0) for value in (swept.start, swept.stop, swept.step))
        require(step != 0 and math.isfinite(step), override.key_or_group, override.get_value_string(), STEP)
        return math.inf if math.isinf(high - low) else max(0, math.ceil((high - low) / step))
    return 1  # a glob has the options that there are


def _passed_over(job: JobReturn) -> bool:
    return job.status == JobStatus.FAILED and isinstance(job._return_value, Busy)


def _free(jobs: Sequence[JobReturn]) -> list[tuple[int, int]]:
    """Wait until another process has let go of some of the runs that it trains; their places, as [first, last)."""
    waiting = [i for i, job in enumerate(jobs) if _passed_over(job)]
    log.info("%d runs are being trained by another process: waiting for them", len(waiting))
    while not (free := [i for i in waiting if not is_locked(Path(jobs[i]._return_value.folder) / LOCK)]):
        time.sleep(PAUSE)
    rows = [list(row) for _, row in itertools.groupby(enumerate(free), lambda pair: pair[1] - pair[0])]
    return [(row[0][1], row[-1][1] + 1) for row in rows]


@contextmanager
def _noted(sweep: Path, points: Sequence[Path]) -> Iterator[None]:
    """A block in which `kdbench status` sees a sweep's points, and that somebody is at work on them."""
    with ExitStack() as stack:
        if world.first():
            with suppress(Timeout, OSError):  # another process has this folder, or it cannot be written: no matter
                sweep.mkdir(parents=True, exist_ok=True)
                note_points(sweep, points)
                stack.enter_context(lock(sweep / LOCK, 0))
        yield
