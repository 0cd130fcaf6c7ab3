"""Inputs of images that stay files: decoded by worker processes, augmented on the device.

Order, views and each image's own randomness are functions of (seed, epoch), drawn in the main process: how many workers
there are changes nothing, and a resumed run replays them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from kdbench.data.augment.strong import ResizedCrop
from kdbench.data.augment.views import Augment, Compose
from kdbench.data.bundle import ImageFiles
from kdbench.data.decode import FileSet, Key, loader
from kdbench.data.order import Bounds
from kdbench.errors import UserError


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

    def set(self, place: Tensor, seeds: Tensor, bounds: Bounds) -> None:
        pairs = list(zip(place.tolist(), seeds.tolist()))
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


class FileInputs:
    """Images that stay files (an InputSource): a crop that comes first is cut at decoding, the rest is the device's.

    Its inputs cannot be listed, so no teacher table.
    """

    enumerable = False

    def __init__(self, files: ImageFiles, augment: Augment | None, device: torch.device, workers: int) -> None:
        self.augment, self.device = augment, device
        self.crop, self.rest = (None, None) if augment is None else split_augment(augment)
        self.decoder = Decoder(files, self.crop, device, workers)

    def epoch(self, place: Tensor, view: Tensor, bounds: Bounds) -> Iterator[Tensor]:
        seeds = self.augment.split(view)[0] if isinstance(self.augment, Compose) else view
        self.decoder.keys.set(place, seeds, bounds)
        view = view.to(self.device)
        for images, (first, last) in zip(self.decoder, bounds):
            yield self._augmented(images, view[first:last])

    def _augmented(self, images: Tensor, view: Tensor) -> Tensor:
        if self.rest is None:
            return images
        if self.crop is None or not isinstance(self.rest, Compose):
            return self.rest(images, view)
        for part, share in zip(self.rest.parts[1:], self.rest.split(view)[1:]):
            images = part(images, share)
        return images
