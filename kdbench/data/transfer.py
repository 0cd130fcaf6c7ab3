"""The student's own training set: subsets of the teacher's, and unlabelled extras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from kdbench.arguments import call, checked
from kdbench.arguments.ranges import Amount, Seed, Text, above, above_to, within
from kdbench.data.augment.strong import ResizedCrop
from kdbench.data.augment.views import SEED
from kdbench.data.bundle import ImageFiles, Inputs, Source, Split, are_images
from kdbench.data.cache import cached_images
from kdbench.data.files import find_images
from kdbench.data.sampling import class_numbers, mixed, order_keys, rows_of, smallest, torch_generator
from kdbench.errors import UserError


@checked
@dataclass(frozen=True)
class Transfer:
    """What `dataset.transfer` holds; configs/dataset/shared/base.yaml explains each key."""

    fraction: Annotated[float, above_to(0, 1)] | None = None
    per_class: Annotated[Amount, above(0)] | None = None
    classes: Annotated[float, above_to(0, 1)] | list[str | int] | None = None
    omit: list[str | int] | None = None
    only: list[str | int] | None = None
    extra: Text | None = None
    crops: Annotated[int, within(0, 10**9)] = 0
    noise_images: Annotated[int, within(0, 10**9)] = 0
    seed: Seed = 0


def make_transfer(
    split: Split, source: Source, cache: str, options: Mapping[str, object]
) -> tuple[Split, Inputs | None]:
    """What the student trains on, from what the teacher trains on, and the unlabelled images that were added.

    `options` is what `dataset.transfer` holds. Extra images are read as those of the source are. Raises UserError.
    """
    wanted = call(Transfer, options, "dataset.transfer")
    if wanted == Transfer(seed=wanted.seed):
        return split, None
    kept = _classes(source.classes, wanted)
    part = split if len(kept) == len(source.classes) else split.select(rows_of(_true(split), kept))
    part = _share(part, wanted) if len(part) else part
    if len(part) < 2:
        raise UserError("dataset.transfer", said=f"it leaves {len(part)} images to train on, and 2 are the least")
    added = _extras(part.inputs, source.files, cache, wanted)
    if added is None:
        return part, None
    count, rows = added.shape[0], len(source.labels)  # the first row of an extra image
    unlabelled = torch.full((count,), -1)
    clean = None if part.clean is None else torch.cat([part.clean, unlabelled])
    all_rows = torch.cat([part.rows, torch.arange(rows, rows + count)])
    return Split(_joined([part.inputs, added]), torch.cat([part.labels, unlabelled]), all_rows, clean), added


def _true(split: Split) -> Tensor:
    return split.labels if split.clean is None else split.clean


def _classes(names: tuple[str, ...], wanted: Transfer) -> list[int]:
    """The classes that the student sees."""
    classes, omit, only = wanted.classes, wanted.omit, wanted.only
    kept = set(range(len(names)))
    if isinstance(classes, (int, float)):
        number = max(1, int(classes * len(names) + 0.5))
        kept = set(torch.argsort(order_keys(len(names), wanted.seed, "transfer classes"))[:number].tolist())
    elif classes is not None:
        kept &= set(class_numbers(classes, names, "dataset.transfer.classes"))
    if only is not None:
        kept &= set(class_numbers(only, names, "dataset.transfer.only"))
    if omit is not None:
        kept -= set(class_numbers(omit, names, "dataset.transfer.omit"))
    if not kept:
        key, value = ("omit", omit) if omit else ("only", only)
        allowed = "what leaves a class: with classes, only and omit none is left"
        raise UserError(f"dataset.transfer.{key}", value, allowed)
    return sorted(kept)


def _share(split: Split, wanted: Transfer) -> Split:
    """`fraction` of all images, whatever their class; then `per_class`, a share or a number of each class's images."""
    fraction, per_class, most = wanted.fraction, wanted.per_class, int(split.rows.max()) + 1
    keys = order_keys(most, wanted.seed, "transfer")[split.rows]  # of the original row: nested subsets
    if fraction is not None:
        rows = torch.argsort(keys)[: int(fraction * len(split) + 0.5)].sort().values
        split, keys = split.select(rows), keys[rows]
    if per_class is None:
        return split
    if per_class > 1 and per_class != int(per_class):
        raise UserError("dataset.transfer.per_class", per_class, "a share in (0, 1] or a whole number of images")
    labels, sizes = torch.unique(_true(split), return_counts=True)
    take = [max(1, int(per_class if per_class > 1 else per_class * n + 0.5)) for n in sizes.tolist()]
    if any(number > size for number, size in zip(take, sizes.tolist())):
        smallest_class = int(sizes.min())
        raise UserError("dataset.transfer.per_class", per_class, f"at most {smallest_class}, the smallest class")
    return split.select(smallest(_true(split), labels.tolist(), take, keys))


def _extra_files(images: Inputs, files: ImageFiles | None, folder: str) -> ImageFiles:
    """The images of a folder as files, to be read as the dataset's own are."""
    paths = find_images(folder, "dataset.transfer.extra")
    if isinstance(images, ImageFiles):
        return images.of(paths)
    own = files or ImageFiles(paths, 0, 0, 3)
    return replace(own, paths=paths, size=images.shape[-1], resize=images.shape[-1], channels=images.shape[1])


def _extras(images: Inputs, files: ImageFiles | None, cache: str, wanted: Transfer) -> Inputs | None:
    """Unlabelled images: those of a folder, crops of the split's own images, and random noise."""
    folder, crops, noise_images = wanted.extra, wanted.crops, wanted.noise_images
    tokens = isinstance(images, Tensor) and images.dtype == torch.int64
    for key, value, none in (("extra", folder, "null"), ("crops", crops, "0"), ("noise_images", noise_images, "0")):
        if value and not are_images(images) and (key != "noise_images" or tokens):
            raise UserError(f"dataset.transfer.{key}", value, f"{none} for data without images")
    unread = None if folder is None else _extra_files(images, files, folder)
    for name, count in (("crops", crops), ("noise_images", noise_images)):
        if count and isinstance(images, ImageFiles):
            raise UserError(f"dataset.transfer.{name}", count, "0 for a dataset that is streamed from files")
    if isinstance(images, ImageFiles):
        return unread
    added: list[Inputs] = []
    if unread is not None and folder is not None:
        read = cached_images(unread, folder, cache)
        read.marked.tell(folder, f"{len(read.images):,} images", unread.background)
        added.append(read.images)
    added += [_random_crops(images, crops, wanted.seed)] if crops else []
    added += [_noise_images(images, noise_images, wanted.seed)] if noise_images else []
    return _joined(added) if added else None


def _joined(parts: Sequence[Inputs]) -> Inputs:
    files = [part for part in parts if isinstance(part, ImageFiles)]
    if files:
        return files[0].of(np.concatenate([part.paths for part in files]))
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def _random_crops(images: Tensor, count: int, seed: int) -> Tensor:
    """Parts of 10 % to 100 % of a random image's area, resized to the full size, mirrored half of the time."""
    generator = torch_generator(seed, "transfer crops")
    rows = torch.randint(len(images), (count,), generator=generator)
    crop, chunk = ResizedCrop(smallest=0.1), 4096
    view = torch.randint(SEED, (count,), generator=generator)
    pieces = zip(rows.split(chunk), mixed(view, 1).bitwise_and(SEED).split(chunk))
    return torch.cat([crop(images[part], seeds) for part, seeds in pieces])


def _noise_images(images: Tensor, count: int, seed: int) -> Tensor:
    """Pixels drawn independently from all pixels of a channel (of up to 1,000 images)."""
    generator = torch_generator(seed, "transfer noise images")
    palette = images[:1000].transpose(0, 1).flatten(1)  # [C, pixels]
    place = torch.randint(palette.shape[1], (palette.shape[0], count, *images.shape[2:]), generator=generator)
    return torch.stack([palette[c][place[c]] for c in range(len(palette))], 1)
