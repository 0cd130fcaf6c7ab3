"""From the plain values of a dataset's YAML to a Bundle."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from kdbench.arguments import accepted, call, checked, keys, locate, of_keys
from kdbench.arguments.ranges import Amount, Seed, Text, above_to, listed, within
from kdbench.data import bundle as bundles
from kdbench.data.augment.mix import Mix, make_mix
from kdbench.data.augment.views import Augment, Identity, copies_of, refuse_no_augment
from kdbench.data.bundle import Bundle, Inputs, Source, Split, are_images, outside
from kdbench.data.corpus import corpus_bundle
from kdbench.data.decode import gray_or_colour
from kdbench.data.noise import make_noise, noisy
from kdbench.data.sampling import class_numbers, count_of, order_keys, rows_of, stratified
from kdbench.data.survey import survey
from kdbench.data.transfer import make_transfer
from kdbench.errors import UserError, require
from kdbench.results.metrics import EMBEDDING

log = logging.getLogger("kdbench")
_KINDS = {(torch.uint8, 4), (torch.float32, 2), (torch.int64, 2)}

# Channel statistics of pixels in 0..1; a set may be scaled otherwise, but not beyond what float32 still squares well.
Pixel = Annotated[float, within(-1e6, 1e6)]
Spread = Annotated[float, above_to(0, 1e6)]


TWO_CLASSES = "a list of two classes or more"


@checked
@dataclass(frozen=True)
class Dataset:
    """The keys of a dataset that are kdbench's own; configs/dataset/shared/base.yaml explains each.

    reader: dotted path of a function that returns a Source. It gets those of root, cache, download and channels that it
    has parameters for, and all keys that are not listed here. pad is there for augmentations to refer to.
    """

    name: Text
    reader: Text
    root: Text | None
    cache: Text
    download: bool = True
    validation: Amount = 0.0
    split_seed: Seed = 0
    subset: Amount | None = None
    classes: Annotated[list[str | int], listed(2, TWO_CLASSES)] | None = None
    channels: Literal[1, 3] | None = None
    mean: list[Pixel] | Pixel | None = None
    std: list[Spread] | Spread | None = None
    augment: Augment | None = None
    pad: Annotated[int, within(0, 1024)] = 4
    teacher_augment: Augment | None = None
    mix: Mapping[str, object] | None = None
    noise: Mapping[str, object] | None = None
    transfer: Mapping[str, object] | None = None
    workers: Annotated[int, within(0, 1024)] | None = None


@of_keys(Dataset)
def load_bundle(dataset: Dataset, options: Mapping[str, object]) -> Bundle:
    """Read a dataset and cut it as its YAML says; `options` are the reader's own.

    Raises UserError naming the key, or saying which file to put where.
    """
    source = survey(dataset.name, _read(dataset, options), dataset.cache)
    if source.blocks is not None:
        return corpus_bundle(dataset.name, source, dataset.subset, _of_samples(dataset))
    _tell_alike(source.classes)
    if source.task is EMBEDDING:
        _refuse_classes(dataset)
    if source.reading is not None and not isinstance(dataset.augment or Identity(), Identity):
        allowed = "none with dataset.teacher_tokenizer, since the teacher reads whole texts"
        raise UserError("dataset.augment", dataset.augment, allowed)
    train, val = _split(source, dataset)
    teacher, student = _labelled(train, source, dataset.noise or {})
    student, added = make_transfer(student, source, dataset.cache, dataset.transfer or {})
    mean, std = _normalisation(source, dataset)
    fingerprint, rows = _identity(source, added)
    augment, own = _augment(dataset.augment, "augment", source.inputs), dataset.teacher_augment
    return Bundle(
        name=dataset.name, classes=source.classes, mean=mean, std=std,
        train=teacher, transfer=student, val=val, test=outside(source.test_inputs, source.test_labels),
        fingerprint=fingerprint, num_rows=rows,
        augment=augment,
        teacher_augment=augment if own is None else _augment(own, "teacher_augment", source.inputs),
        mix=_mix(dataset.mix or {}, source.inputs),
        workers=min(os.cpu_count() or 1, 16) if dataset.workers is None else dataset.workers,
        resize=(source.files.resize or None) if source.files is not None else None,
        posterior=source.posterior, task=source.task, vocab_size=source.vocab_size, tokeniser=source.tokeniser,
        reading=source.reading, trim=source.trim, columns=source.columns,
    )  # fmt: skip


def _of_samples(dataset: Dataset) -> dict[str, object]:
    """The keys that say something of separate samples alone."""
    plain = ("validation", "classes", "mean", "std", "augment", "teacher_augment")
    given = {key: getattr(dataset, key) for key in plain}
    given |= {f"{key}.kind": (getattr(dataset, key) or {}).get("kind") for key in ("mix", "noise")}
    return given | {f"transfer.{key}": value for key, value in (dataset.transfer or {}).items() if key != "seed"}


def _refuse_classes(dataset: Dataset) -> None:
    """Raise the UserError for a key that says something of classes, of data without labels."""
    given: dict[str, object] = {"classes": dataset.classes, "noise.kind": (dataset.noise or {}).get("kind", "none")}
    own = dataset.transfer or {}
    given |= {f"transfer.{key}": own.get(key) for key in ("per_class", "classes", "omit", "only")}
    for key, value in given.items():
        none = "none" if key == "noise.kind" else "null"
        require(value in (None, none), f"dataset.{key}", value, f"{none}: {dataset.name} has no labels")


def _read(dataset: Dataset, options: Mapping[str, object]) -> Source:
    reader, channels = dataset.reader, dataset.channels
    function = locate(reader, "dataset.reader")
    given = {"channels": channels, "root": dataset.root, "cache": dataset.cache, "download": dataset.download}
    source = call(function, options, "dataset", accepted(function, given), beside=keys(Dataset))
    if not isinstance(source, Source):
        raise UserError("dataset.reader", reader, "a function that returns a kdbench.data.bundle.Source")
    for inputs in (source.inputs, source.test_inputs, *([source.val[0]] if source.val else [])):
        if isinstance(inputs, Tensor) and (inputs.dtype, inputs.ndim) not in _KINDS:
            found = f"It gives {inputs.dtype} {list(inputs.shape)}"
            kinds = "images uint8 [N, C, H, W], vectors float32 [N, D] or token ids int64 [N, L]"
            raise UserError("dataset.reader", reader, f"one that gives {kinds}", hint=found)
    if channels is not None and not are_images(source.inputs):
        raise UserError("dataset.channels", channels, "null for data that is not images")
    return _with_channels(source, channels)


def _tell_alike(classes: Sequence[str]) -> None:
    """Warn of classes whose names differ by case or space alone: one class, written in two ways, perhaps."""
    first: dict[str, str] = {}
    for name in classes:
        other = first.setdefault(" ".join(str(name).casefold().split()), name)
        if other != name:
            log.warning("the classes %r and %r differ by case or spaces alone: are they one?", other, name)


def _labelled(train: Split, source: Source, noise: Mapping[str, object]) -> tuple[Split, Split]:
    """What the teacher and what the student trains on: right or wrong labels, of the same images."""
    labels, whom = make_noise(source.labels, source.classes, noise)
    wrong = noisy(train, labels)
    return train if whom == "student" else wrong, train if whom == "teacher" else wrong


def _augment(value: Augment | None, key: str, inputs: Inputs) -> Augment:
    """null is no augmentation. Raises UserError, also for one that cannot take this data: it is tried on two rows, in
    all of the views that it shows side by side."""
    made = Identity() if value is None else value
    refuse_no_augment(made, f"dataset.{key}", value, "null or the _target_ of an augmentation")
    if isinstance(inputs, Tensor):
        some = torch.cat([inputs[:2]] * copies_of(made))
        try:
            fits = made(some, made.draw(len(some), torch.Generator())).shape == some.shape
        except (IndexError, RuntimeError, TypeError, ValueError):  # what arithmetic for images makes of other shapes
            fits = False
        if not fits:
            allowed = f"null, or an augmentation for data of shape {list(inputs.shape)}"
            raise UserError(f"dataset.{key}", type(made).__name__, allowed)
    return made


def _mix(options: Mapping[str, object], inputs: Inputs) -> Mix | None:
    mix = make_mix(options)
    if mix is not None and isinstance(inputs, Tensor) and not are_images(inputs):
        if not inputs.is_floating_point():
            raise UserError("dataset.mix.kind", mix.kind, "none for token ids")
        if mix.kind != "mixup":
            raise UserError("dataset.mix.kind", mix.kind, "none or mixup for vectors, which have no rectangles")
    return mix


def _with_channels(source: Source, channels: int | None) -> Source:
    """The source with all its images gray or all in colour; what the reader knew of other channels is forgotten."""
    if not isinstance(source.inputs, Tensor) or channels in (None, source.inputs.shape[1]):
        return source

    def changed(images: Inputs) -> Inputs:
        return gray_or_colour(images, channels) if isinstance(images, Tensor) else images

    val = None if source.val is None else (changed(source.val[0]), source.val[1])
    test = changed(source.test_inputs)
    return source._replace(inputs=changed(source.inputs), test_inputs=test, val=val, fingerprint=None, stats=None)


def _split(source: Source, dataset: Dataset) -> tuple[Split, Split | None]:
    """Validation takes the rows with the largest keys of a class, a subset those with the smallest: they never meet."""
    validation, subset, classes = dataset.validation, dataset.subset, dataset.classes
    whole = Split(source.inputs, source.labels, torch.arange(len(source.labels)))
    keys = order_keys(len(whole), dataset.split_seed, "split")
    val = None if source.val is None else outside(*source.val)
    count = count_of(validation, len(whole), "dataset.validation", whole=False)
    rest = torch.arange(len(whole))
    measured = source.task is not EMBEDDING or not count
    require(measured, "dataset.validation", validation, "0 without labels; dataset.probe may have val/ and test/")
    if count:
        chosen = stratified(whole.labels, count, -keys, leave=1)
        if len(chosen) < count:
            allowed = f"at most {len(chosen)}, to leave an image of each class to train on"
            raise UserError("dataset.validation", validation, allowed)
        val = whole.select(chosen)
        keep = torch.ones(len(whole), dtype=torch.bool)
        keep[chosen] = False
        rest = rest[keep]
    if subset is not None:
        count = count_of(subset, len(rest), "dataset.subset", whole=True)
        rest = rest[stratified(whole.labels[rest], count, keys[rest])]
    if classes is not None:
        numbers = class_numbers(classes, source.classes, "dataset.classes")
        require(len(numbers) > 1, "dataset.classes", classes, f"{TWO_CLASSES}, or null")
        rest = rest[rows_of(whole.labels[rest], numbers)]
    if len(rest) < 2:
        given = {"classes": classes, "subset": subset, "validation": validation or None, "root": dataset.root}
        key, value = next((key, value) for key, value in given.items() if value is not None)
        raise UserError(f"dataset.{key}", value, f"what leaves at least 2 images to train on: it leaves {len(rest)}")
    return whole.select(rest), val


def _normalisation(source: Source, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, one a channel or dimension; what is null is measured on the whole original training set."""
    mean, std = dataset.mean, dataset.std
    if isinstance(source.inputs, Tensor) and source.inputs.dtype == torch.int64:
        for key, value in (("mean", mean), ("std", std)):
            require(value is None, f"dataset.{key}", value, "null for token ids")
        return (), ()
    measured: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    if mean is None or std is None:
        assert source.stats is not None or isinstance(source.inputs, Tensor)  # a survey measures streamed images
        measured = source.stats or bundles.statistics(source.inputs)  # type: ignore[arg-type]
    channels, pixels, result = source.inputs.shape[1], are_images(source.inputs), []
    for key, value, own in (("mean", mean, measured[0]), ("std", std, measured[1])):
        given = value if isinstance(value, (list, tuple)) else own if value is None else [value]
        numbers = tuple(float(number) for number in given)
        numbers = numbers * channels if len(numbers) == 1 else numbers
        if len(numbers) != channels or not all(_possible(key, number, pixels) for number in numbers):
            of_pixels = ", above 0 and at most 1" if key == "std" else " in [0, 1]"
            many = f"{channels} number(s){of_pixels if pixels else ', above 0' if key == 'std' else ''}"
            raise UserError(f"dataset.{key}", value, f"{many}, or null to measure")
        result.append(numbers)
    return result[0], result[1]


def _possible(key: str, number: float, pixels: bool) -> bool:
    """Pixels are divided by 255, for what is measured too: numbers of another scale (123.68) are of whole pixels."""
    return math.isfinite(number) and (key == "mean" or number > 0) and (0 <= number <= 1 or not pixels)


def _identity(source: Source, added: Inputs | None) -> tuple[str, int]:
    """The training images' fingerprint and number; a table has rows for unlabelled extras too, so both include them."""
    own, rows = source.fingerprint or bundles.fingerprint(source.inputs), len(source.labels)
    if source.reading is not None:
        own = f"{own[:32]}{bundles.fingerprint(source.reading.inputs)[:32]}"
    return (own, rows) if added is None else (f"{own[:32]}{bundles.fingerprint(added)[:32]}", rows + added.shape[0])
