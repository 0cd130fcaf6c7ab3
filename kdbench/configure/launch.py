"""Running a command under Hydra: one run or a sweep; every mistake is a message, a failed run never ends the others."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kdbench.configure.check import check
from kdbench.configure.compose import register, tell_left_out, tell_stand_in
from kdbench.configure.explain import explain, typed_as
from kdbench.configure.idle import idle, tell_idle
from kdbench.configure.sweep import Better, Finished, Sweep, Task
from kdbench.configure.text import readable
from kdbench.errors import Busy, UserError, told, traced
from kdbench.paths import CONFIG_DIR

log = logging.getLogger(__name__)
failure_log = logging.getLogger("kdbench.failure")  # the run's log file only (configs/hydra/default.yaml)


def launch(
    task: Task,
    refuse: Task | None = None,
    own: Sequence[str] = (),
    words: Sequence[str] | None = None,
    ended: Callable[[Sequence[Path]], None] | None = None,
    finished: Finished | None = None,
    better: Better | None = None,
) -> int:
    """Compose a command line and run `task(cfg)` in its run folder; with -m, once for every point.

    `words` is the command line without the command (default: sys.argv's). `own` are the command's defaults as
    key=value: what is typed of these keys counts instead. `refuse(cfg)` may raise a UserError for what the task could
    not run: asked for every point of a sweep before the first one runs; one that it returns is what the point will fail
    with, which is said then, and stops no other. `finished(cfg, folder)` gives what is left to
    do for a run that was finished before, in place of all checks and the task; None for any other. `ended` is called
    once after a sweep, with the folders of the runs that did not fail. `better(cfg)` is 1 where more is better of what
    the task returns, or -1. Returns the exit code: 1 if a run of a sweep failed. Raises UserError for a command line
    that cannot run; in a single run whatever the task raises.
    """
    arguments = _in_hydras_order(own, [readable(word) for word in (sys.argv[1:] if words is None else words)])
    _refuse_folder()
    sys.argv = [sys.argv[0], *arguments]
    register(arguments)
    failures: list[Exception] = []
    sweep = Sweep(refuse, finished, better)
    job = _job(task, failures, finished)
    resolving = _resolving_first() if "--resolve" in arguments else nullcontext()
    with _in_own_words(sweep, arguments), _hydra_raises(), sweep.watching(), resolving:
        hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="train")(job)()
    if failures:
        raise failures[0]
    if sweep.begun and not sweep.runs:  # a glob that fits no option, for one
        raise UserError("-m", said="there is nothing to run: this sweep has no point")
    if ended is not None and sweep.folders:
        ended(sweep.folders)
    return sweep.report()


@contextmanager
def _in_own_words(sweep: Sweep, arguments: list[str]) -> Iterator[None]:
    """What goes wrong while Hydra composes, in words of our own."""
    try:
        yield
    except SystemExit:
        _say_how_keys_are_typed(arguments)
        raise
    except UserError:
        raise
    except Exception as error:
        sweep.report()  # a sweeper without a single result gives up
        message = explain(error, arguments)
        if message is None:
            raise
        raise UserError(message) from error


def _in_hydras_order(own: Sequence[str], words: Sequence[str]) -> list[str]:
    """Flags and keys as Hydra's argparse wants them: flags with their values first, and all overrides in one row."""
    flags: list[str] = []
    rest: list[str] = []
    known = get_args_parser()._option_string_actions
    for word, before in zip(words, ["", *words]):
        action = known.get(word.partition("=")[0]) if word.startswith("-") else None
        last = known.get(before)
        value = last is not None and (last.nargs is None or (last.nargs == "?" and word in (last.choices or ())))
        (flags if action or value else rest).append(word)
    typed = {key_of(word) for word in words}
    at = next((i for i, word in enumerate(rest) if "=" in word and not word.startswith("-")), len(rest))
    return [*flags, *rest[:at], *(word for word in own if key_of(word) not in typed), *rest[at:]]


def key_of(word: str) -> str:
    """The key of an override, without the signs in front of it."""
    return word.partition("=")[0].lstrip("+~")


def _say_how_keys_are_typed(arguments: Sequence[str]) -> None:
    """After argparse's own message, for what is a flag in other programs: --seed 3 and --seed=3 are seed=3."""
    _, unknown = get_args_parser().parse_known_args(list(arguments))
    for word, following in zip(arguments, [*arguments[1:], "-"]):
        if re.match("--?[a-z]", word) and word in unknown:
            value = word.partition("=")[2] or ("VALUE" if following.startswith("-") or "=" in following else following)
            print(f"kdbench: keys are typed without dashes: {typed_as(word.partition('=')[0], value)}", file=sys.stderr)


def _refuse_folder() -> None:
    """Hydra keeps the current folder's path in every configuration, where ${...} is an interpolation."""
    if "${" in os.getcwd():
        raise UserError(f"{os.getcwd()}: the current folder's path holds ${{, which Hydra would resolve; rename it")


def _job(task: Task, failures: list[Exception], finished: Finished | None) -> Task:
    """The task after its checks. A single run's exception goes into `failures`: Hydra would add lines of its own."""

    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        out = Path(hydra_config.runtime.output_dir)
        sweeping = hydra_config.mode == RunMode.MULTIRUN
        words: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        os.chdir(hydra_config.runtime.cwd)  # hydra.job.chdir: kdbench's paths count from where the command was typed
        try:
            left = finished(cfg, out) if finished else None
            if left is not None:
                return left()
            check(cfg)
            if not sweeping:
                tell_left_out([words])
                tell_idle([idle(cfg, words)])
            return task(cfg)
        except Exception as error:
            if isinstance(error, UserError):
                tell_stand_in(words, error)
            if sweeping and not isinstance(error, Busy):
                log.error("failed: %s", told(error))
            if sweeping and traced():
                traceback.print_exc()
            if not isinstance(error, UserError):
                failure_log.error("%s", "".join(traceback.format_exception(error)))
            elif not isinstance(error, Busy):
                _tidy(out)
            if sweeping:
                raise
            failures.append(error)
            return None

    return job


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


@contextmanager
def _resolving_first() -> Iterator[None]:
    """Of `--cfg hydra --resolve`: Hydra cuts its own node out before it resolves it, though its folders refer to
    kdbench's paths."""
    cut = Hydra.get_sanitized_hydra_cfg

    def resolved(cfg: DictConfig) -> DictConfig:
        point = cfg.hydra.sweep.subdir  # asks how sweep.dir is written, which is gone then
        OmegaConf.resolve(cfg.hydra)
        cfg.hydra.sweep.subdir = point
        return cut(cfg)

    Hydra.get_sanitized_hydra_cfg = staticmethod(resolved)  # type: ignore
    try:
        yield
    finally:
        Hydra.get_sanitized_hydra_cfg = staticmethod(cut)  # type: ignore


def _tidy(out: Path) -> None:
    """Remove the folder of a run that was refused, if it was made for this run alone and nothing was done in it.

    A lock says that somebody works or has worked here, and a folder that was typed may be anybody's: both stay.
    """
    about: Any = HydraConfig.get()
    place = about.sweep._get_node("subdir") if about.mode == RunMode.MULTIRUN else about.run._get_node("dir")
    if "${kd." not in str(place._value()) or not out.is_dir():
        return
    if any(path.suffix != ".log" for path in out.iterdir()):
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == out:
            handler.close()
    for path in out.glob("*.log"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        out.rmdir()
        out.parent.rmdir()  # the dataset's folder, if this was its only run
