"""Loggers beside metrics.jsonl and TensorBoard: a service that shows the same rows. None is imported unless asked for.

A logger is a class with `start`, `write` and `end`, and a YAML in configs/logger that names it as `_target_`. Rows go
out as they are written; where a service fails, the training goes on and it is said once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from kdbench.arguments import checked
from kdbench.errors import UserError
from kdbench.files import read_object, write_json

log = logging.getLogger(__name__)
KEPT = "logger.json"  # in the run's folder: what the service calls the run, to go on with it


class About(NamedTuple):
    """A run as a service shows it."""

    folder: Path
    config: Mapping[str, object]  # flat, under dotted keys
    tags: Sequence[str] = ()

    @property
    def fresh(self) -> str:
        """A name for a run that begins now."""
        return hashlib.sha256(f"{self.folder.resolve()} {time.time_ns()}".encode()).hexdigest()[:16]


class Logger(Protocol):
    """One run at a service."""

    def start(self, about: About, known: str | None) -> str:
        """Begin, or go on with the run that the service knows as `known`; what it calls the run."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None: ...

    def end(self, ok: bool) -> None: ...


class Guarded:
    """A logger whose failures end no training: the first is said, and no more is sent."""

    def __init__(self, logger: Logger, about: About, resumed: bool) -> None:
        self._logger: Logger | None = logger
        known = None
        if resumed:
            with suppress(UserError, OSError):
                known = read_object(about.folder / KEPT).get(type(logger).__name__)
        name = self._do("start", about, known)
        if name is not None:
            write_json(about.folder / KEPT, {type(logger).__name__: name})

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        self._do("write", epoch, values)

    def end(self, ok: bool) -> None:
        self._do("end", ok)
        self._logger = None

    def _do(self, what: str, *arguments: Any) -> Any:
        if self._logger is None:
            return None
        try:
            return getattr(self._logger, what)(*arguments)
        except Exception as error:  # a network that is gone, a service that refuses, a library that changed
            name = type(self._logger).__name__.lower()
            first = str(error).partition("\n")[0]
            log.warning("logger=%s: %s: %s; metrics.jsonl and TensorBoard go on", name, type(error).__name__, first)
            self._logger = None
            return None


def _need(package: str, extra: str) -> None:
    """Raise a UserError for a package that is not installed; it is not imported here."""
    if importlib.util.find_spec(package) is None:
        raise UserError("logger", extra, f"tensorboard, or have {package} installed: pip install 'kdbench[{extra}]'")


@checked
class Wandb:
    """Weights & Biases (wandb.init). mode "offline" writes below `folder` alone; `wandb sync` sends it later."""

    def __init__(
        self,
        project: str = "kdbench",
        entity: str | None = None,
        group: str | None = None,
        mode: Literal["online", "offline", "disabled"] = "online",
        folder: str = "outputs",
    ) -> None:
        _need("wandb", "wandb")
        self.project, self.entity, self.group, self.mode, self.folder = project, entity, group, mode, folder

    def start(self, about: About, known: str | None) -> str:
        import wandb

        Path(self.folder).mkdir(parents=True, exist_ok=True)
        name = known or about.fresh
        self.run = wandb.init(
            project=self.project, entity=self.entity, group=self.group, mode=self.mode, dir=self.folder, id=name,
            name=about.folder.name, tags=list(about.tags), config=dict(about.config), resume="allow",
            reinit="create_new", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        return name

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=epoch)

    def end(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)


@checked
class Mlflow:
    """MLflow tracking: a server's address, or a file of SQLite."""

    def __init__(self, uri: str, experiment: str = "kdbench") -> None:
        _need("mlflow", "mlflow")
        self.uri, self.experiment = uri, experiment

    def start(self, about: About, known: str | None) -> str:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=self.uri)
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return known
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(self.experiment)
        tags = {"mlflow.note.content": " ".join(about.tags), "folder": str(about.folder)}
        self.id = self.client.create_run(experiment, run_name=about.folder.name, tags=tags).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in about.config.items()]
        for first in range(0, len(params), 100):  # as many as a server takes at once
            self.client.log_batch(self.id, params=params[first : first + 100])
        return self.id

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self.client.log_batch(self.id, metrics=[Metric(key, float(v), now, epoch) for key, v in values.items()])

    def end(self, ok: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if ok else "FAILED")


@checked
class Trackio:
    """trackio: a local dashboard (`trackio show`), and with `space` one on Hugging Face."""

    def __init__(self, project: str = "kdbench", space: str | None = None) -> None:
        _need("trackio", "trackio")
        self.project, self.space = project, space

    def start(self, about: About, known: str | None) -> str:
        import trackio

        name = known or f"{about.folder.name[:60]}-{about.fresh[:6]}"
        self.run = trackio.init(
            project=self.project, name=name, config=dict(about.config), resume="allow", space_id=self.space,
            embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        return name

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=epoch)

    def end(self, ok: bool) -> None:
        self.run.finish()
