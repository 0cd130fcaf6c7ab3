"""A teacher obtained: had from its origin, measured, printed, and refused if it is no better than chance."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import Placement, place, wants_graph
from kdbench.engine.evaluate import all_logits, evaluate, logits_kept
from kdbench.engine.graph import MOST
from kdbench.engine.metrics import task_figures
from kdbench.errors import UserError
from kdbench.models.base import count_parameters, example_input
from kdbench.models.fold import align_rows, fold_batchnorm
from kdbench.models.interface import plain
from kdbench.models.weights import weight_hash
from kdbench.results.metrics import CLASSIFICATION, EMBEDDING, Task, metric_of
from kdbench.runs.recipe import Recipe, TeacherSpec
from kdbench.runs.stage import eval_sets
from kdbench.runs.taught import TaughtBy
from kdbench.tables.store import Tables
from kdbench.teachers.live import LiveTeacher, chunk_for, freeze

log = logging.getLogger(__name__)


def obtain(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
    """The teacher, measured and printed. Raises UserError if it cannot be had, or if it is no better than chance."""
    taught = reading(spec.origin.obtain(spec, recipe, data.read_by_teacher()), data)
    return introduced(taught, data, spec.allow_chance)


def reading(taught: TaughtBy, data: Bundle) -> TaughtBy:
    """A teacher that was obtained for `data.read_by_teacher()` answers batches of `data`, by their rows."""
    if data.reading is None or not isinstance(taught.teacher, LiveTeacher):
        return taught
    live = taught.teacher
    device = next(live.network.parameters()).device
    teacher = LiveTeacher(live.network, live.chunk, live.context, data.reading.inputs.to(device))
    return replace(taught, teacher=teacher, reads=data.read_by_teacher())


def measured(name: str, network: nn.Module, folder: Path | None, recipe: Recipe, data: Bundle) -> TaughtBy:
    """Freeze, place and measure a trained network."""
    placement = place(recipe.trainer)
    network = freeze(placement.put(network))
    reference, metrics = measure(network, recipe, data, placement)
    weights = weight_hash(plain(network).state_dict())
    parameters, tables = count_parameters(network), _tables(folder, recipe)
    live = live_teacher(network, recipe, data, placement)
    return TaughtBy(name, live, network, parameters, weights, folder, metrics, reference, tables=tables)


def introduced(given: TaughtBy, data: Bundle, allow_chance: bool, longer: str = "teacher.schedule.epochs") -> TaughtBy:
    """Print how good it is. Raises UserError if it is no better than chance, naming the key that trains it `longer`."""
    where = f", from {_shown(given.folder)}" if given.folder else ""
    log.info("teacher %s: %s%s", given.name, _primaries(given.metrics, data.task), where)
    if not allow_chance:
        _refuse_chance(given, data, longer)
    return given


def live_teacher(network: nn.Module, recipe: Recipe, data: Bundle, placement: Placement) -> LiveTeacher:
    """What answers batches, and fills tables, in place of a trained network: a copy of it made quick."""
    quick = placement.cast(align_rows(fold_batchnorm(network, example_input(data.info))))
    # Where steps are recorded the teacher is asked for many of them at once.
    ahead = wants_graph(recipe.trainer, placement.device, recipe.optimizer)
    chunk = chunk_for(placement.device, MOST if ahead else recipe.schedule.batch_size)
    return LiveTeacher(quick, chunk, placement.autocast)


def _tables(folder: Path | None, recipe: Recipe) -> Tables:
    """Beside the teacher if it lies in the store, in the store's own folder for tables if not."""
    stored = folder is not None and recipe.teachers in folder.parents
    home = folder if stored and folder is not None else recipe.teachers
    return Tables(recipe.teacher.table if recipe.teacher else "auto", home / "tables")


def measure(
    network: nn.Module, recipe: Recipe, data: Bundle, placement: Placement
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Logits on the validation and test sets, of those where they are few enough to be kept, and `evaluate` on each."""
    reference: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    for split, batches in eval_sets(data, recipe.trainer, placement).items():
        if logits_kept(batches, data.info.num_classes):
            reference[split], labels = all_logits(network, batches)
            found = task_figures(data.task, reference[split], labels, posterior=batches.posterior)
        else:
            found = evaluate(network, batches)
        metrics |= {f"{split}/{key}": value for key, value in found.items()}
    return reference, metrics


def _primaries(metrics: Mapping[str, float], task: Task) -> str:
    names = {task.on(split): split for split in ("val", "test")}
    return ", ".join(f"{metric_of(key).text(metrics[key])} on {names[key]}" for key in names if key in metrics)


def _counts(split: Split, data: Bundle) -> list[int]:
    """How many labels of each class a split has. Of embeddings the classes are those that its labels name."""
    labels, least = split.labels.flatten(), 0 if data.task is EMBEDDING else len(data.classes)
    return torch.bincount(labels[labels >= 0], minlength=least).tolist()


def _shown(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if here in folder.parents else folder


def tell_of_chance(name: str, values: Mapping[str, float], data: Bundle, advice: str) -> None:
    """Warn of a network that guesses at the end of its training, there and on the test set; `advice`: what to do."""
    if data.task is not CLASSIFICATION:
        return
    top1, parts = data.task.primary, {"train": data.transfer, "test": data.test}
    counts, training = {split: _counts(part, data) for split, part in parts.items()}, _counts(data.train, data)
    figures = {split: values.get(data.task.on(split)) for split in parts}
    guesses = {split: v for split, v in figures.items() if v is not None and any(counts[split])}
    if guesses and all(data.task.judge(v, counts[split], training) == "chance" for split, v in guesses.items()):
        shown = " and ".join(f"{top1.text(value)} on {split}" for split, value in guesses.items())
        log.warning("%s: %s is no better than guessing. %s", name, shown, advice)


def _refuse_chance(given: TaughtBy, data: Bundle, longer: str) -> None:
    """A teacher that is no better than guessing teaches nothing; with few test images it may only look so."""
    task = data.task
    value, show = given.metrics[task.on("test")], task.primary.text
    images, training = (_counts(split, data) for split in (data.test, data.train))
    judged, level = task.judge(value, images, training), show(task.chance(images, training))
    if judged == "unclear":
        log.warning(
            "teacher %s: %s on %d test %s may be a guess (%s would be one); about %d %s could tell",
            given.name, show(value), sum(images), data.info.samples, level, task.images_to_tell(value, images),
            data.info.samples,
        )  # fmt: skip
    if judged == "chance":
        advice = f"Check its weights and that its classes are this dataset's, or train it longer ({longer})"
        if task is EMBEDDING:
            advice = "Check its weights, and that dataset.probe has images enough of classes that differ to the eye"
        largest = "" if min(images) == max(images) else f", {task.guess}"
        raise UserError(
            f"teacher {given.name}: {show(value)} on test is no better than guessing ({level}{largest}). "
            f"{advice}. teacher.allow_chance=true goes on regardless."
        )
