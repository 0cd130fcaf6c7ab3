"""What an experiment is made of, as plain numbers and factories: no configuration object goes below this floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from torch import nn

from kdbench.arguments import checked
from kdbench.arguments.code import Code
from kdbench.arguments.ranges import Count, Seed, from_to
from kdbench.counted import result_format
from kdbench.data.bundle import Bundle
from kdbench.engine.evaluate import KEPT
from kdbench.engine.loggers import Logger
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.schedule import ScheduleOptions
from kdbench.errors import UserError, require
from kdbench.losses.base import DistillationLoss, Extension
from kdbench.results.metrics import CLASSIFICATION
from kdbench.runs.identity import Identity, settings_of
from kdbench.runs.taught import TaughtBy
from kdbench.types import Info


@dataclass(frozen=True)
class NetworkSpec:
    """A network that can be built for any data: its name, its plain configuration and the function that builds it."""

    name: str
    config: Mapping[str, object]
    make: Callable[[Info], nn.Module]
    single: bool = True  # False: several networks that answer as one, with no layers and no classifier of its own

    @property
    def pretrained(self) -> bool:
        """Whether it comes with trained weights and a head for them."""
        return bool(self.config.get("pretrained")) and not self.config.get("new_head")

    def sketch(self, info: Info) -> nn.Module:
        """The network without memory (on the meta device): names and shapes, and what refuses to be built.

        Published weights are read into real memory.
        """
        with torch.device("cpu" if self.config.get("pretrained") else "meta"):
            return self.make(info)


def extended(spec: NetworkSpec, by: Extension, catalogue: Catalogue) -> NetworkSpec:
    """A network within another one that a loss puts around it."""
    pretrained = {"pretrained": spec.config["pretrained"]} if "pretrained" in spec.config else {}
    config = {**by.config, **pretrained, "network": json.dumps(dict(spec.config))}
    return replace(catalogue.network_from(spec.name, config), single=spec.single)


@dataclass(frozen=True)
class LossSpec:
    name: str
    config: Mapping[str, object]
    make: Callable[[], DistillationLoss]
    key: str = "loss"  # where the user typed it, for what is refused later


class Origin(Protocol):
    """Where a teacher comes from: kdbench.runs.origin and kdbench.runs.ensemble have those there are.

    Another one is a frozen dataclass with these two methods and a YAML in configs/teacher that names it as `_target_`
    and sets its fields.
    """

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        """What it will be, known before it is had. Raises UserError for what cannot be."""

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """The teacher, with its weights, measured (kdbench.runs.obtain). Raises UserError if it cannot be had."""


@checked
@dataclass(frozen=True)
class TeacherSpec:
    """A teacher to be had: its origin, how it is trained where it has to be, and how it is used."""

    origin: Origin
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    seed: Seed = 0
    stop_epoch: Count | None = None
    label_smoothing: Annotated[float, from_to(0, 1)] = 0.0
    allow_chance: bool = False
    trust: bool = False  # run what a run folder names, whatever it is
    table: Literal["auto", "on", "off"] = "auto"


TEACHER_KEYS = frozenset(field.name for field in fields(TeacherSpec)) - {"origin"}


@checked
@dataclass(frozen=True)
class Seeds:
    init: Seed
    data: Seed


class Catalogue(Protocol):
    """Parts by name, for procedures whose options name networks and losses."""

    def network(self, name: str, options: Mapping[str, object] | None = None, key: str = "student") -> NetworkSpec: ...

    def network_from(self, name: str, config: Mapping[str, object], source: str = "") -> NetworkSpec: ...

    def loss(self, name: str, options: Mapping[str, object] | None = None, key: str = "loss") -> LossSpec: ...


@dataclass(frozen=True)
class Record:
    """What result.json says of a run besides its figures."""

    hash: str
    choices: Mapping[str, str]
    tree: Mapping[str, object]  # the whole resolved configuration, plain
    overrides: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    named: Mapping[str, str] = field(default_factory=dict)  # what the files and runs hold that values name, by key
    code: Code = field(default_factory=dict)  # of the user's own that the configuration names
    alone: bool = True  # False: data and edition are spoken for by the hash, or by the run that this is a stage of

    @property
    def identity(self) -> Identity:
        """As far as it is known before data and teacher are there."""
        edition = result_format(self.tree) if self.alone else 0
        return Identity(self.hash, edition, self.named, self.code, settings=settings_of(self.choices, self.config))

    @property
    def config(self) -> dict[str, object]:
        """The configuration flat, under dotted keys; lists stay whole."""
        return flatten(self.tree)

    def section(self, name: str) -> Mapping[str, object]:
        """A group's node."""
        return section(self.tree, name)


def section(tree: Mapping[str, object], name: str) -> Mapping[str, object]:
    """The node of a group in a plain configuration; {} where it has none."""
    node = tree.get(name)
    return node if isinstance(node, Mapping) else {}


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted keys; an empty mapping stays as a value."""
    flat: dict[str, object] = {}
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
    logger: Callable[[], Logger] | None = None  # a service that is shown the rows

    def need_teacher(self, allowed: str) -> TeacherSpec:
        """Its teacher. Raises UserError for `teacher=none`; `allowed` says what must be there and why."""
        require(self.teacher is not None, "teacher", "none", allowed)
        assert self.teacher is not None
        return self.teacher

    def need_no_teacher(self, why: str) -> None:
        """Raises UserError for any teacher but `teacher=none`."""
        require(self.teacher is None, "teacher", self.record.choices.get("teacher"), f"none: {why}")

    def need_taught_loss(self, allowed: str) -> None:
        """Raises UserError for a loss that no teacher can change."""
        require(self.loss.make().uses_teacher, "loss", self.loss.name, allowed)

    def need_classes(self, procedure: str) -> None:
        """Raises UserError for data of another task than classification. Reads the data."""
        data = self.data()
        allowed = f"another with dataset={data.name}: it is for classes, and that is for {data.task.name}"
        require(data.task is CLASSIFICATION, "procedure", procedure, allowed)

    def refuse_uncalibrated(self, data: Bundle) -> None:
        """Raises UserError for a loss that chooses its own coefficients where there is too little to choose them by."""
        loss, name = self.loss.make(), self.loss.name
        if not loss.needs_calibration:
            return
        require(self.teacher is not None, "teacher", "none", f"a network, since loss={name} is fitted to one")
        require(data.val is not None, "dataset.validation", 0, f"above 0: loss={name} is fitted on a validation split")
        labelled = 0 if data.val is None else int((data.val.labels >= 0).sum())
        least = loss.least_calibration
        allowed = f"more: loss={name} is fitted on at least {least} labelled validation samples, there are {labelled}"
        require(labelled >= least, "dataset.validation", self.record.config.get("dataset.validation"), allowed)
        count = labelled * data.info.num_classes
        many = f"another: it is fitted on a teacher's logits, {count:,} for the validation set of dataset={data.name}"
        require(count <= KEPT, "loss", name, f"{many}; {KEPT:,} are the most")

    def refuse_features(self, teacher: str, given: Collection[str] = ()) -> None:
        """Raises UserError for a loss that reads features, of a teacher that has none but those `given`."""
        needed = [name for name in self.loss.make().needs if name not in given]
        if needed:
            allowed = f"a loss without features ({', '.join(needed)}): {teacher} has only logits"
            raise UserError("loss", self.loss.name, allowed)

    def refuse_untaught(self) -> None:
        """Raises UserError for a loss that learns from a teacher where there is none."""
        lonely = self.teacher is None and self.loss.make().uses_teacher
        require(not lonely, "teacher", "none", f"a network, since loss={self.loss.name} learns from one")
