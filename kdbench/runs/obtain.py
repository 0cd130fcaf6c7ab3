"""From a TeacherSpec to a teacher: read from a file or a run, or trained once and kept for every later run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor, nn

from kdbench.data.bundle import Bundle
from kdbench.engine.device import Placement, place
from kdbench.engine.evaluate import all_logits
from kdbench.engine.graph import graphed_teacher
from kdbench.engine.metrics import report
from kdbench.engine.options import require
from kdbench.errors import UserError
from kdbench.losses.ce import CE
from kdbench.models.base import count_parameters
from kdbench.models.fold import fold_batchnorm
from kdbench.models.weights import load_into, read_weights, weight_hash
from kdbench.results.result import is_finished
from kdbench.runs.folder import network_of_run
from kdbench.runs.given import GivenTeacher
from kdbench.runs.lifecycle import run_stage
from kdbench.runs.recipe import LossSpec, Recipe, Record, Seeds, TeacherSpec
from kdbench.runs.stage import Stage, eval_sets
from kdbench.tables.store import Tables
from kdbench.teachers.live import LiveTeacher, chunk_for, freeze

log = logging.getLogger(__name__)

STORE_FORMAT = 1  # raise it when a change of code changes what a stored teacher would be


def obtain_teacher(recipe: Recipe, data: Bundle) -> GivenTeacher | None:
    """The recipe's teacher, measured and printed; None for `teacher=none`.

    Raises UserError if its weights do not fit or if it is no better than chance.
    """
    if recipe.teacher is None:
        return None
    spec = recipe.teacher
    if spec.source is not None:
        return spec.source(spec, recipe, data)
    name, network, folder = _trained_network(spec, recipe, data)
    return introduced(make_given(name, network, folder, recipe, data), data, spec.allow_chance)


def make_given(name: str, network: nn.Module, folder: Path | None, recipe: Recipe, data: Bundle) -> GivenTeacher:
    """Freeze, place and measure a trained network."""
    placement = place(recipe.trainer)
    network = freeze(placement.put(network))
    reference, metrics = measure(network, recipe, data, placement)
    weights = weight_hash(network.state_dict())
    parameters, tables = count_parameters(network), _tables(folder, recipe)
    live = live_teacher(network, recipe, data, placement)
    return GivenTeacher(name, live, network, parameters, weights, folder, metrics, reference, tables=tables)


def introduced(
    given: GivenTeacher, data: Bundle, allow_chance: bool, longer: str = "teacher.schedule.epochs"
) -> GivenTeacher:
    """Print how good it is. Raises UserError if it is no better than chance, naming the key that trains it `longer`."""
    where = f", from {_shown(given.folder)}" if given.folder else ""
    log.info("teacher %s: %s%s", given.name, _accuracies(given.metrics), where)
    if not allow_chance:
        _refuse_chance(given, data, longer)
    return given


def live_teacher(network: nn.Module, recipe: Recipe, data: Bundle, placement: Placement) -> LiveTeacher:
    """What answers batches, and fills tables, in place of a trained network: a copy of it made quick."""
    quick = placement.cast(fold_batchnorm(network, data.info.image_size))
    chunk = chunk_for(placement.device, recipe.schedule.batch_size)
    return LiveTeacher(quick, chunk, placement.autocast, graphed_teacher(recipe.trainer, placement.device))


def _tables(folder: Path | None, recipe: Recipe) -> Tables:
    """Beside the teacher if it lies in the store, in the store's own folder for tables if not."""
    stored = folder is not None and recipe.teachers in folder.parents
    home = folder if stored and folder is not None else recipe.teachers
    return Tables(recipe.teacher.table if recipe.teacher else "auto", home / "tables")


def measure(
    network: nn.Module, recipe: Recipe, data: Bundle, placement: Placement
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Logits on the validation and test sets, and the report on each."""
    reference: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for split, batches in eval_sets(data, recipe.trainer, placement).items():
        reference[split], labels = all_logits(network, batches)
        metrics |= {f"{split}/{k}": v for k, v in report(reference[split], labels).items()}
    return reference, metrics


def _accuracies(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{100 * metrics[f'{s}/top1']:.2f} % on {s}" for s in ("val", "test") if f"{s}/top1" in metrics)


def _shown(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if here in folder.parents else folder


def _refuse_chance(given: GivenTeacher, data: Bundle, longer: str) -> None:
    """A guess is right with probability 1/C; three standard deviations above it are still a guess."""
    chance = 1 / len(data.classes)
    limit = chance + 3 * (chance * (1 - chance) / len(data.test.labels)) ** 0.5
    top1 = given.metrics["test/top1"]
    if top1 <= limit:
        raise UserError(
            f"teacher {given.name}: {100 * top1:.2f} % on test is no better than guessing "
            f"({100 * chance:.2f} %). "
            f"Check its weights and that its classes are this dataset's, or train it longer ({longer}). "
            "teacher.allow_chance=true goes on regardless."
        )


def _trained_network(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> tuple[str, nn.Module, Path | None]:
    require(not (spec.run and spec.checkpoint), "teacher.checkpoint", spec.checkpoint, "null when teacher.run is given")
    if spec.run:
        return _from_run(Path(spec.run), recipe, data)
    if spec.checkpoint:
        path = Path(spec.checkpoint)
        state = read_weights(path)
        network = spec.network.make(data.info)
        load_into(network, state, str(path))
        return spec.network.name, network, path
    if spec.network.pretrained:
        return spec.network.name, spec.network.make(data.info), None
    return _from_store(spec, recipe, data)


def _from_run(folder: Path, recipe: Recipe, data: Bundle) -> tuple[str, nn.Module, Path]:
    spec, network, info = network_of_run(folder, recipe.catalogue)
    if info.num_classes != data.info.num_classes or info.in_channels != data.info.in_channels:
        raise UserError(
            f"teacher.run = {folder}: its network has {info.num_classes} classes and {info.in_channels} channels, "
            f"dataset {data.name} has {data.info.num_classes} and {data.info.in_channels}"
        )
    return spec.name, network, folder


def _from_store(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> tuple[str, nn.Module, Path]:
    """Train on first use. A lock makes parallel runs wait for one training; an interrupted one continues."""
    stage = teacher_stage(spec, recipe, data)
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{stage.folder}.lock"):
        if not is_finished(stage.folder):
            log.info("teacher %s: trained now, once, and kept in %s", spec.network.name, stage.folder)
        run_stage(stage, None)
    return spec.network.name, network_of_run(stage.folder, recipe.catalogue)[1], stage.folder


def teacher_stage(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> Stage:
    """The teacher's own training: an ordinary run in the store, under cross-entropy."""
    key = store_key(spec, recipe, data)
    smoothing = spec.label_smoothing
    loss = LossSpec("ce", {"label_smoothing": smoothing}, lambda: CE({"task": 1.0}, smoothing))
    return Stage(
        folder=recipe.teachers / data.name / f"{_slug(spec.network.name)}-{key[:10]}",
        data=data.for_teacher(),
        split=data.train,
        student=spec.network,
        loss=loss,
        optimizer=spec.optimizer,
        schedule=spec.schedule,
        trainer=replace(recipe.trainer, ema=None),
        seeds=Seeds(spec.seed, spec.seed),
        stop_epoch=spec.stop_epoch,
        record=_teacher_record(spec, recipe.record, key),
    )


def store_key(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> str:
    """sha256 of all that a stored teacher's weights follow from."""
    trainer = recipe.trainer
    identity = {
        "format": STORE_FORMAT,
        "images": data.fingerprint[:32],  # the second half names unlabelled extras, which only the student sees
        "rows": _digest(data.train.rows),
        "labels": _digest(data.train.labels),
        "augment": repr(data.teacher_augment),
        "normalise": [list(data.mean), list(data.std)],
        "network": dict(spec.network.config),
        "optimizer": asdict(spec.optimizer),
        "schedule": asdict(spec.schedule),
        "label_smoothing": spec.label_smoothing,
        "seed": spec.seed,
        "stop_epoch": spec.stop_epoch,
        "precision": place(trainer).precision,
        "trainer": [trainer.clip, trainer.limit_steps, trainer.drop_last],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _teacher_record(spec: TeacherSpec, record: Record, key: str) -> Record:
    choices = {**record.choices, "teacher": "none", "student": spec.network.name, "loss": "ce", "procedure": "single"}
    tree: dict[str, Any] = {key: value for key, value in record.tree.items() if key in ("dataset", "trainer")}
    tree |= {"student": dict(spec.network.config), "loss": {"label_smoothing": spec.label_smoothing}}
    tree |= {"optimizer": asdict(spec.optimizer), "schedule": asdict(spec.schedule)}
    tree |= {"seed": spec.seed, "stop_epoch": spec.stop_epoch}
    return Record(hash=key, choices=choices, tree=tree)


def _slug(name: str) -> str:
    return name.replace("/", "_")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()
