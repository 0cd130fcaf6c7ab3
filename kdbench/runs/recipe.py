"""What an experiment is made of, as plain numbers and factories: no configuration object goes below this floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from kdbench.data.bundle import Bundle
from kdbench.engine.options import OptimizerOptions, ScheduleOptions, TrainerOptions
from kdbench.losses.base import DistillationLoss
from kdbench.runs.given import GivenTeacher
from kdbench.types import ImageInfo


@dataclass(frozen=True)
class NetworkSpec:
    """A network that can be built for any data: its name, its plain configuration and the function that builds it."""

    name: str
    config: Mapping[str, Any]
    make: Callable[[ImageInfo], nn.Module]

    @property
    def pretrained(self) -> bool:
        """Whether it comes with trained weights and a head for them."""
        return bool(self.config.get("pretrained")) and not self.config.get("new_head")


@dataclass(frozen=True)
class LossSpec:
    name: str
    config: Mapping[str, Any]
    make: Callable[[], DistillationLoss]


@dataclass(frozen=True)
class TeacherSpec:
    """Where a teacher comes from: a file, an earlier run, published weights, or its own training on first use."""

    network: NetworkSpec
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    checkpoint: str | None = None
    run: str | None = None
    seed: int = 0
    stop_epoch: int | None = None
    label_smoothing: float = 0.0
    allow_chance: bool = False
    table: Literal["auto", "on", "off"] = "auto"
    # A teacher that is no single network: who makes it, from this specification, the recipe and its data.
    source: Callable[[TeacherSpec, Recipe, Bundle], GivenTeacher] | None = None


@dataclass(frozen=True)
class Seeds:
    init: int
    data: int


class Catalogue(Protocol):
    """Parts by name, for procedures whose options name networks and losses."""

    def network(self, name: str, options: Mapping[str, Any] | None = None) -> NetworkSpec: ...

    def network_from(self, name: str, config: Mapping[str, Any]) -> NetworkSpec: ...

    def loss(self, name: str, options: Mapping[str, Any] | None = None) -> LossSpec: ...


@dataclass(frozen=True)
class Record:
    """What result.json says of a run besides its figures."""

    hash: str
    choices: Mapping[str, str]
    tree: Mapping[str, Any]  # the whole resolved configuration, plain
    overrides: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration flat, under dotted keys; lists stay whole."""
        return flatten(self.tree)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; an empty mapping stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    data: Callable[[], Bundle]
    student: NetworkSpec
    teacher: TeacherSpec | None
    loss: LossSpec
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    trainer: TrainerOptions
    seeds: Seeds
    record: Record
    catalogue: Catalogue
    teachers: Path  # the teacher store
    force: bool = False
