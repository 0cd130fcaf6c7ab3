"""Running a command under Hydra: one run or a sweep; every mistake is a message, a failed run never ends the others."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.types import RunMode
from omegaconf import DictConfig

from kdbench.configure.check import check
from kdbench.configure.explain import explain
from kdbench.configure.naming import without_hydra
from kdbench.configure.register import register
from kdbench.errors import UserError, traced
from kdbench.paths import CONFIG_DIR

log = logging.getLogger(__name__)
failure_log = logging.getLogger("kdbench.failure")  # the run's log file only (configs/hydra/default.yaml)

Task = Callable[[DictConfig], Any]


def _with_path_quoted(word: str) -> str:
    """`key=path` with a path that is there in quotes: a run folder's name has commas, which would make it a sweep."""
    key, _, value = word.partition("=")
    plain = "," in value and "'" not in value and not word.startswith("-")
    return f"{key}='{value}'" if plain and os.path.exists(value) else word


def launch(
    task: Task,
    refuse: Task | None = None,
    config_name: str = "train",
    overrides: Sequence[str] = (),
    ended: Callable[[Sequence[Path]], None] | None = None,
) -> int:
    """Compose the command line (sys.argv) and run `task(cfg)` in its run folder; with -m, once for every point.

    `refuse(cfg)` may raise a UserError for what the task could not run: asked for every point of a sweep before the
    first one runs. `overrides` are a command's own, before the user's. `ended` is called once after a sweep, with the
    folders of the runs that did not fail. Returns the exit code: 1 if a run of a sweep failed. Raises UserError for a
    command line that cannot run; in a single run whatever the task raises.
    """
    arguments = [_with_path_quoted(word) for word in sys.argv[1:]]
    # argparse wants all overrides in one row: a -m between them would cut it in two.
    flags = [word for word in arguments if word in ("-m", "--multirun")]
    arguments = [*flags, *(word for word in arguments if word not in flags)]
    # Beside the user's: argparse takes the words that are no flags only in one piece.
    at = next((i for i, word in enumerate(arguments) if "=" in word and not word.startswith("-")), len(arguments))
    sys.argv = [sys.argv[0], *arguments[:at], *overrides, *arguments[at:]]
    register(arguments)
    failures: list[Exception] = []
    sweep = Sweep(refuse)
    try:
        with _hydra_raises(), sweep.watching():
            hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)(_job(task, failures))()
    except UserError:
        raise
    except Exception as error:
        sweep.report()  # a sweeper without a single result gives up
        message = explain(error, [*overrides, *arguments], config_name)
        if message is None:
            raise
        raise UserError(message) from error
    if failures:
        raise failures[0]
    if ended is not None and sweep.folders:
        ended(sweep.folders)
    return sweep.report()


def _job(task: Task, failures: list[Exception]) -> Task:
    """The task after its checks. A single run's exception goes into `failures`: Hydra would add lines of its own."""

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        out = Path(HydraConfig.get().runtime.output_dir)
        try:
            check(cfg)
            return task(cfg)
        except Exception as error:
            sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
            if sweeping:
                log.error("failed: %s", error)
            if sweeping and traced():
                traceback.print_exc()
            if isinstance(error, UserError):
                _tidy(out)
            else:
                failure_log.error("%s", "".join(traceback.format_exception(error)))
            if sweeping:
                raise
            failures.append(error)
            return None

    return job


class Sweep:
    """Sees every run of a sweep, whichever launcher and sweeper run it."""

    def __init__(self, refuse: Task | None) -> None:
        self.refuse = refuse
        self.runs = 0
        self.folders: list[Path] = []  # of the runs that did not fail
        self.failed: list[tuple[str, BaseException]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put this sweep between Hydra's sweepers and launchers."""
        plugins: Any = Plugins.instance()
        make = plugins.instantiate_launcher
        plugins.instantiate_launcher = lambda **context: _Watched(make(**context), self, **context)
        try:
            yield
        finally:
            del plugins.instantiate_launcher

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
        lines += [f"  {overrides}: {error}" for overrides, error in self.failed]
        print("\n".join(lines), file=sys.stderr)
        return 1


class _Watched:
    """A launcher whose jobs are all checked before the first one runs, and whose failed jobs are noted."""

    def __init__(self, launcher: Any, sweep: Sweep, *, hydra_context: Any, config: DictConfig, **_other: Any) -> None:
        self.launcher, self.sweep = launcher, sweep
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self._check(job_overrides)
        jobs = self.launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        for job in jobs:
            self.sweep.take(job)
        return jobs

    def _check(self, job_overrides: Sequence[Sequence[str]]) -> None:
        faults = []
        outer = HydraConfig.instance().cfg
        for overrides in job_overrides:
            cfg = self.loader.load_sweep_config(self.config, list(overrides))
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in a run's own values
            try:
                check(cfg, cfg)
                if self.sweep.refuse is not None:
                    self.sweep.refuse(without_hydra(cfg))
            except UserError as error:
                faults.append((" ".join(filter_overrides(overrides)), str(error)))
            finally:
                HydraConfig.instance().cfg = outer
        if len({message for _, message in faults}) == 1:
            raise UserError(faults[0][1])
        if faults:
            lines = "\n".join(f"  {overrides}: {message}" for overrides, message in faults)
            raise UserError(f"nothing was run, as {len(faults)} of {len(job_overrides)} runs cannot:\n{lines}")


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let Hydra raise its errors instead of printing them and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _tidy(out: Path) -> None:
    """Remove the folder of a run that was refused, if nothing was done in it yet."""
    if not out.is_dir() or out == Path.cwd():
        return
    if any(path.name not in (".hydra", ".lock") and path.suffix != ".log" for path in out.iterdir()):
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == out:
            handler.close()
    shutil.rmtree(out, ignore_errors=True)
    with suppress(OSError):
        out.parent.rmdir()  # the dataset's folder, if this was its only run
