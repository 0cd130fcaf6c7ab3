"""kdbench in Python: what notebooks and scripts call. Each function is a name of the package: kdbench.train."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig

from kdbench import configure
from kdbench.commands import train as command
from kdbench.configure.explain import explain
from kdbench.errors import UserError, require, split
from kdbench.results import read
from kdbench.results.metrics import TASKS
from kdbench.results.read import Run
from kdbench.results.result import read_result
from kdbench.results.rows import named_choices

if TYPE_CHECKING:
    from kdbench.deploy.student import Student

Words = str | Sequence[str]
# Threads take turns: Hydra's state, sys.argv, the loggers and torch's generator are the process's, and two trainings at
# once would take each other's configuration. A network that is loaded is first built, with numbers from that generator.
# For several at once: a cohort, or processes.
_turn = threading.RLock()


def compose(*words: Words) -> DictConfig:
    """The configuration that `kdbench train WORDS` runs with, e.g. compose("loss=dkd student=resnet8").

    Relative paths in it count from the current folder. Raises UserError for words that do not fit.
    """
    typed = _listed(words)
    with _turn:
        kept = Singleton.get_state()  # a notebook may have a Hydra of its own
        GlobalHydra.instance().clear()
        try:
            return configure.compose(typed)
        except HydraException as error:
            raise UserError(explain(error, typed) or str(error)) from error
        finally:
            Singleton.set_state(kept)


def train(*words: Words) -> Run:
    """`kdbench train WORDS`, e.g. train("loss=dkd seed=1"): its folder and its result. A finished run is read.

    Threads take turns. Raises UserError for what cannot run, before any work, and whatever ends the training.
    """
    typed = _listed(words)
    require(not {"-m", "--multirun"} & set(typed), "words", typed, "one run; kdbench.sweep runs several")
    found = _trained(typed)
    if len(found) != 1:  # --help, --cfg job: nothing was run
        raise UserError("words", typed, "a training")
    return found[0]


def sweep(*words: Words) -> list[Run]:
    """`kdbench train -m WORDS`, e.g. sweep("loss.tau=1,2,4 seed=0,1"): every run of it.

    Raises UserError for what cannot run, before any work, and at the end where runs failed.
    """
    return _trained(["-m", *_listed(words)])


def load(run: str | Path | Run, weights: str = "student.safetensors", trust: bool = False) -> Student:
    """The student of a finished run: `.network`, `.transform`, `.classes`, `.predict` (kdbench.deploy.student.Student).

    weights: also "best.safetensors", chosen on the validation split. trust: run the code that the folder names where it
    is not kdbench's own. Waits for another thread that trains. Raises UserError for a folder that holds no finished
    student.
    """
    from kdbench.deploy.student import load

    folder = run.folder if isinstance(run, Run) else Path(run)
    with _turn:
        return load(folder, trust) if weights == "student.safetensors" else load(folder / weights, trust)


def read_runs(*folders: str | Path) -> Any:
    """All finished runs in or below folders (default: outputs/runs), one row each: a pandas DataFrame where pandas is
    installed, a list of dictionaries otherwise.

    Columns: the choices (dataset, teacher, student, loss, ...), `config.` and every dotted key, every figure of
    result.json as it is there (shares as fractions), `best/` and the figures at the best epoch by validation.
    """
    found = read.read_runs([Path(folder) for folder in folders or ("outputs/runs",)]).runs
    rows = [_row(run) for run in found]
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows)


def _row(run: Run) -> dict[str, object]:
    result = run.result
    key = TASKS[result.task].on("test")
    theirs = result.teacher.metrics.get(key) if result.teacher else None
    about = {
        "folder": str(run.folder), **named_choices(run), "seed": result.seed, "formula": result.formula,
        "parameters": result.student.parameters, f"teacher/{key}": theirs,
    }  # fmt: skip
    figures = {name: result.figure(name) for name in result.figure_names()}
    timing = {"seconds": result.seconds, "images_per_second": result.images_per_second, "device": result.device}
    return about | figures | timing | {f"config.{key}": value for key, value in result.config.items()}


def _listed(words: Sequence[Words]) -> list[str]:
    """Words typed as one line, as several, or as lists of them."""
    return [word for part in words for word in (split("words", part) if isinstance(part, str) else part)]


def _trained(words: list[str]) -> list[Run]:
    folders: list[Path] = []

    def task(cfg: DictConfig) -> float | None:
        folders.append(Path(HydraConfig.get().runtime.output_dir))
        return command.train(cfg)

    def finished(cfg: DictConfig, out: Path) -> Any:
        left = command.finished(cfg, out)
        folders.extend([] if left is None else [out])
        return left

    def ended(all_of_them: Sequence[Path]) -> None:
        folders[:] = all_of_them
        command.ended(all_of_them)

    with _turn, _as_it_was():
        try:
            code = configure.launch(task, command.refuse, words=words, ended=ended, finished=finished)
        except SystemExit as stop:  # argparse's, of flags: it would end the caller's program
            raise UserError(f"{' '.join(words)}: cannot be read as keys and values, as was said above") from stop
    if code:
        raise UserError(
            f"{' '.join(words)}: runs of this sweep failed, as was said above; the same call runs only those"
        )
    return [Run(folder, read_result(folder)) for folder in folders]


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave the process as it was: its arguments, a Hydra of the caller's own, and how it logs."""
    arguments, hydra, job = sys.argv, GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    loggers = [logging.getLogger(), logging.getLogger("kdbench.failure")]
    kept = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    GlobalHydra.instance().hydra = None
    sys.argv = ["kdbench"]
    try:
        yield
    finally:
        sys.argv = arguments
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, job
        for one, handlers, level, propagate in kept:
            for handler in one.handlers:
                if handler not in handlers:
                    handler.close()
            one.handlers[:] = handlers  # Hydra's logging takes those of others away
            one.setLevel(level)
            one.propagate = propagate
