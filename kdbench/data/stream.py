"""Batches of images that stay files: decoded by worker processes, augmented and normalised on the device.

Order, views and each image's own randomness are functions of (seed, epoch), drawn in the main process: how many workers
there are changes nothing, and a resumed run replays them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from kdbench.data.augment.mix import CutMix, Mixup
from kdbench.data.augment.strong import ResizedCrop
from kdbench.data.augment.views import Augment, Compose
from kdbench.data.bundle import ImageFiles, Split
from kdbench.data.decode import FileSet, Key, loader
from kdbench.data.order import Order
from kdbench.data.prepare import Mixer, Normalise
from kdbench.errors import UserError
from kdbench.types import Batch, Target


def random_crop(crop: ResizedCrop, size: int, pixels: Tensor, seed: int) -> Tensor:
    """The part of an image [C, H, W] that `crop` draws for this seed, resized (antialiased), maybe mirrored."""
    height, width = pixels.shape[-2:]
    left, top, wide, high, flip = (part.item() for part in crop.box(torch.tensor([seed]), width / height))
    wide, high = max(1, round(wide * width)), max(1, round(high * height))
    left, top = min(round(left * width), width - wide), min(round(top * height), height - high)
    part = resize_image(pixels[:, top : top + high, left : left + wide], [size, size], antialias=True)
    return part.flip(-1) if flip else part


class Keys:
    """A batch sampler whose keys are set anew for each epoch, so that the workers can stay alive between epochs."""

    def __init__(self) -> None:
        self.keys: list[list[Key]] = []

    def set(self, rows: Tensor, seeds: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        pairs = list(zip(rows.tolist(), seeds.tolist()))
        self.keys = [pairs[first:last] for first, last in bounds]

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Decoder:
    """Decoded batches on the device, in the order of their keys."""

    def __init__(self, files: ImageFiles, crop: ResizedCrop | None, device: torch.device, workers: int) -> None:
        self.keys, self.device = Keys(), device
        images = FileSet(files, None if crop is None else partial(random_crop, crop, files.size))
        self.loader = loader(images, self.keys, workers, pinned=device.type == "cuda")

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.loader:
            if isinstance(images, UserError):
                raise images
            # From pinned memory, without waiting: the host runs ahead of the device and queues this copy (a ms) early.
            yield images.to(self.device, non_blocking=True)


def split_augment(augment: Augment) -> tuple[ResizedCrop | None, Augment | None]:
    """What of an augmentation happens at decoding (a ResizedCrop that comes first), and what is left for the device."""
    if isinstance(augment, ResizedCrop):
        return augment, None
    if isinstance(augment, Compose) and isinstance(augment.parts[0], ResizedCrop):
        return augment.parts[0], augment
    return None, augment


class StreamBatches:
    """Training batches of a split of files (a TrainBatches); its views are not enumerable, so no teacher table."""

    views: int | None = None

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        drop_last: bool = False,
        limit_steps: int | None = None,
        mix: Mixup | CutMix | None = None,
        num_classes: int | None = None,
        workers: int = 0,
    ) -> None:
        if not isinstance(split.inputs, ImageFiles):
            raise TypeError("images in memory do not stream: use make_train_batches, which chooses")
        self.device = torch.device(device)
        self.order = Order(len(split), batch_size, seed, drop_last, limit_steps)
        self.augment = augment
        self.crop, self.rest = split_augment(augment)
        self.labels, self.rows = split.labels.to(self.device), split.rows.to(self.device)
        self.normalise = Normalise(mean, std, self.device, dtype, channels_last)
        self.decoder = Decoder(split.inputs, self.crop, self.device, workers)
        self.mixer = None
        if mix is not None:
            if num_classes is None:
                raise TypeError("mix needs num_classes")
            self.mixer = Mixer(mix, num_classes, self.order, (split.inputs.size, split.inputs.size))
        self.size, self.steps = len(split), self.order.steps

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0; epochs: the length of the training."""
        position, view = self.order.epoch(epoch, self.augment)
        self.decoder.keys.set(position, self._crop_seeds(view), self.order.bounds)
        position, view = position.to(self.device), view.to(self.device)
        progress = self.order.progress(epoch, epochs, self.device)
        if self.mixer is not None:
            self.mixer.start(epoch, self.device)
        for step, (images, (first, last)) in enumerate(zip(self.decoder, self.order.bounds)):
            here, seen = position[first:last], view[first:last]
            images, label = self.normalise(self._augmented(images, seen)), self.labels.index_select(0, here)
            if self.mixer is not None:
                images, label = self.mixer(step, images, label)
            yield Batch(images, seen, Target(label, self.rows.index_select(0, here), progress[step]))

    def _crop_seeds(self, view: Tensor) -> Tensor:
        return self.augment.split(view)[0] if isinstance(self.augment, Compose) else view

    def _augmented(self, images: Tensor, view: Tensor) -> Tensor:
        if self.rest is None:
            return images
        if self.crop is None or not isinstance(self.rest, Compose):
            return self.rest(images, view)
        for part, share in zip(self.rest.parts[1:], self.rest.split(view)[1:]):
            images = part(images, share)
        return images


class StreamEval:
    """Batches of the middle of each image, always in the same order (an EvalBatches)."""

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        no_op: int = -1,
        workers: int = 0,
    ) -> None:
        if not isinstance(split.inputs, ImageFiles):
            raise TypeError("images in memory do not stream: use make_eval_batches, which chooses")
        if batch_size < 1:
            raise UserError(f"trainer.eval_batch_size must be 1 or more, got {batch_size}")
        self.device, self.size = torch.device(device), len(split)
        self.bounds = [(first, min(first + batch_size, self.size)) for first in range(0, self.size, batch_size)]
        self.labels, self.rows = split.labels.to(self.device), split.rows.to(self.device)
        self.normalise = Normalise(mean, std, self.device, dtype, channels_last)
        self.decoder = Decoder(split.inputs, None, self.device, workers)
        rows = torch.arange(self.size)
        self.decoder.keys.set(rows, rows, self.bounds)
        self.view = torch.full((min(batch_size, self.size),), no_op, device=self.device)
        self.progress = torch.ones((), device=self.device)

    def __iter__(self) -> Iterator[Batch]:
        for images, (first, last) in zip(self.decoder, self.bounds):
            target = Target(self.labels[first:last], self.rows[first:last], self.progress)
            yield Batch(self.normalise(images), self.view[: last - first], target)
