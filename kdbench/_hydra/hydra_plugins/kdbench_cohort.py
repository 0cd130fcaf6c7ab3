"""hydra/launcher=cohort: the runs of a sweep that share data and teacher train side by side in one process.

Imported whenever Hydra starts, so nothing that takes time is imported before a sweep is launched. Hydra does so without
an entry in sys.modules, where dataclasses look up annotations that are text: so here they are not.
"""

import copy
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import unwrap
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    configure_log,
    env_override,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kdbench.arguments.ranges import Count

log = logging.getLogger(__name__)


@dataclass
class CohortConf:
    """Options of hydra/launcher=cohort."""

    _target_: str = "hydra_plugins.kdbench_cohort.CohortLauncher"
    max_members: int | None = None  # at most so many runs side by side; null: as many as fit into the device's memory
    devices: list[str] | None = None  # a process for each of them, e.g. [cuda:0,cuda:1]; null: this process alone


ConfigStore.instance().store(group="hydra/launcher", name="cohort", node=CohortConf, provider="kdbench")


@dataclass
class _Job:
    """A point of the sweep: its whole configuration, that of its task, and what it returns."""

    config: DictConfig
    task: DictConfig
    result: JobReturn

    @property
    def out(self) -> Path:
        return Path(self.config.hydra.runtime.output_dir)


class CohortLauncher(Launcher):
    """Groups the points of a sweep and runs each group in turn; a point that can share nothing runs as usual."""

    def __init__(self, max_members: Count | None = None, devices: Sequence[str] | None = None) -> None:
        self.max_members, self.devices = max_members, devices

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        points = [(initial_job_idx + i, overrides) for i, overrides in enumerate(job_overrides)]
        return self.run(points) if self.devices is None else self._on_devices(points, self.devices)

    def _on_devices(self, points: Sequence[tuple[int, Sequence[str]]], devices: Sequence[str]) -> list[JobReturn]:
        """A process for each device, with its share of the points; they share teachers and tables as any processes."""
        from joblib import Parallel, delayed

        from kdbench import world
        from kdbench.configure.lots import Lot, dealt
        from kdbench.engine.device import named_device
        from kdbench.errors import UserError

        if not devices:
            raise UserError("hydra.launcher.devices", [], "null or a list of at least one device, e.g. [cuda:0,cuda:1]")
        world.refuse_several("hydra.launcher.devices", list(devices), "a process has one device there")
        for device in dict.fromkeys(devices):  # before the first point
            named_device(device)
        hands = dealt(self.side_by_side(points), len(devices))
        lots = [
            [(points[i][0], [*points[i][1], f"trainer.device={device}"]) for i in hand]
            for hand, device in zip(hands, devices)
        ]
        lot = Lot(self.task, self.context, self.config, lots, self.max_members)
        log.info("Launching %d runs on %s", len(points), ", ".join(devices))
        run = delayed(lot.elsewhere)
        ends = Parallel(n_jobs=len(lots), backend="loky")(run(i, Singleton.get_state()) for i in range(len(lots)))
        found = {i: end for hand, part in zip(hands, ends) for i, end in zip(hand, part)}
        return [found[i] for i in range(len(points))]

    def side_by_side(self, points: Sequence[tuple[int, Sequence[str]]]) -> list[list[int]]:
        """Places of the points that share teacher and batches, by group."""
        from kdbench import cohort

        outer = HydraConfig.instance().cfg
        try:
            jobs = [self._job(overrides, number) for number, overrides in points]
            return (
                cohort.side_by_side([_run(job) for job in jobs]) if self._trains() else [[i] for i in range(len(jobs))]
            )
        finally:
            HydraConfig.instance().cfg = outer

    def run(self, points: Sequence[tuple[int, Sequence[str]]]) -> list[JobReturn]:
        """Train the points, each with its number and overrides, in this process."""
        setup_globals()
        self._log_launch()
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        outer = HydraConfig.instance().cfg
        try:
            jobs = [self._job(overrides, number) for number, overrides in points]
            groups = self._groups(jobs)
            log.info("Launching %d runs%s", len(jobs), _in_words([len(group) for group in groups]))
            for group in groups:
                for job in group:
                    words = " ".join(filter_overrides(job.result.overrides or []))
                    log.info("\t#%s : %s", job.config.hydra.job.num, words)
                self._together(group) if len(group) > 1 else self._alone(group[0])
                self._log_launch()
        finally:
            HydraConfig.instance().cfg = outer
        return [job.result for job in jobs]

    def _log_launch(self) -> None:
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)

    def _job(self, overrides: Sequence[str], number: int) -> _Job:
        """Compose one point, as Hydra's run_job would."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(config)
        folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = os.path.abspath(folder)
        HydraConfig.instance().set_config(config)
        task = copy.deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        result = JobReturn(list(config.hydra.overrides.task), task, copy.deepcopy(config), os.getcwd())
        return _Job(config, task, result)

    def _groups(self, jobs: Sequence[_Job]) -> list[list[_Job]]:
        if not self._trains():
            return [[job] for job in jobs]
        done = [job for job in jobs if _is_finished(job)]
        left = [job for job in jobs if all(job is not one for one in done)]
        if not left:  # no torch is loaded
            return [[job] for job in done]
        from kdbench import cohort

        return [*([job] for job in done), *([left[i] for i in group] for group in cohort.plan([*map(_run, left)]))]

    def _trains(self) -> bool:
        """Whether the sweep is of `kdbench train`."""
        from kdbench.commands.train import train

        return unwrap(self.task) is train

    def _alone(self, job: _Job) -> None:
        job.result = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _together(self, group: Sequence[_Job]) -> None:
        from kdbench import cohort

        with ExitStack() as stack:
            configure_log(_without_file(group[0].config.hydra.job_logging), group[0].config.hydra.verbose)
            stack.enter_context(env_override(group[0].config.hydra.job.env_set))
            files = [self._open(job, stack) for job in group]
            try:
                outcomes = cohort.train_together([_run(job) for job in group], self.max_members)
            except Exception as error:  # what they share cannot be made: each says so itself
                outcomes = [error] * len(group)
            for job, outcome, file in zip(group, outcomes, files):
                self._close(job, outcome, file)

    def _open(self, job: _Job, stack: ExitStack) -> logging.Handler | None:
        """A run folder as Hydra makes it: .hydra, a log file of its own, callbacks told."""
        HydraConfig.instance().set_config(job.config)
        job.out.mkdir(parents=True, exist_ok=True)
        subdirectory = job.config.hydra.output_subdir
        if subdirectory is not None:
            (job.out / subdirectory).mkdir(exist_ok=True)
            hydra, typed = job.result.hydra_cfg, job.config.hydra.overrides.task
            for name, part in {"config": job.task, "hydra": hydra, "overrides": typed}.items():
                (job.out / subdirectory / f"{name}.yaml").write_text(OmegaConf.to_yaml(part), encoding="utf-8")
        self.context.callbacks.on_job_start(config=job.config, task_function=self.task)
        return stack.enter_context(_own_log(job))

    def _close(self, job: _Job, outcome: Any, file: logging.Handler | None) -> None:
        HydraConfig.instance().set_config(job.config)
        job.result.status = JobStatus.FAILED if isinstance(outcome, Exception) else JobStatus.COMPLETED
        job.result.return_value, job.result.task_name = outcome, JobRuntime.instance().get("name")
        from kdbench.errors import Busy, told

        if isinstance(outcome, Exception) and not isinstance(outcome, Busy):
            log.error("%s failed: %s", job.out.name, told(outcome), extra={"run": str(job.out)})
            if file is not None:
                trace = "".join(traceback.format_exception(outcome))
                file.handle(logging.makeLogRecord({"name": __name__, "levelname": "ERROR", "msg": trace}))
        self.context.callbacks.on_job_end(config=job.config, job_return=job.result)


def _in_words(sizes: Sequence[int]) -> str:
    """How runs go in groups of these sizes: "" where each goes by itself, or ": 4 + 2 on shared data, 1 by itself"."""
    together, alone = [str(size) for size in sizes if size > 1], sum(size == 1 for size in sizes)
    rest = f", {alone} by {'itself' if alone == 1 else 'themselves'}" if alone else ""
    return f": {' + '.join(together)} on shared data{rest}" if together else ""


def _is_finished(job: _Job) -> bool:
    from kdbench.commands.train import finished

    HydraConfig.instance().set_config(job.config)
    return finished(job.task, job.out) is not None


def _run(job: _Job) -> Any:
    from kdbench.cohort import Run
    from kdbench.commands.train import chosen
    from kdbench.configure import flat

    # Only ${hydra:...} is another value for each run. All else is resolved where it is read, as in a run by itself: its
    # hash leaves out where things are kept, which a resolved value would not show any more.
    HydraConfig.instance().set_config(job.config)
    task = copy.deepcopy(job.task)
    for key, text in flat(task, resolve=False).items():
        if "${hydra:" in str(text):
            value = OmegaConf.select(task, key)
            OmegaConf.update(
                task, key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
    return Run(task, job.out, list(job.config.hydra.overrides.task), chosen())


def _without_file(job_logging: DictConfig) -> DictConfig:
    """The settings of the console alone: each run's file is opened by `_own_log`."""
    settings = copy.deepcopy(job_logging)
    with read_write(settings), open_dict(settings):
        settings.root.handlers = [name for name in settings.root.handlers if name != "file"]
    return settings


@contextmanager
def _own_log(job: _Job) -> Iterator[logging.Handler | None]:
    """The run's log file, as hydra.job_logging describes it: it takes the cohort's lines and the run's own."""
    settings = OmegaConf.to_container(job.config.hydra.job_logging, resolve=True) or {}
    file = settings.get("handlers", {}).get("file")  # type: ignore[union-attr]
    if not file or "filename" not in file:
        yield None
        return
    style = settings.get("formatters", {}).get(file.get("formatter"), {})  # type: ignore[union-attr]
    handler = logging.FileHandler(file["filename"], delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter(style.get("format")))
    handler.addFilter(lambda record: getattr(record, "run", str(job.out)) == str(job.out))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        handler.close()
