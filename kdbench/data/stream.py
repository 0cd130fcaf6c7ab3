"""Inputs of images that stay files: decoded by worker processes, augmented on the device.

Order, views and each image's own randomness are functions of (seed, epoch), drawn in the main process: how many workers
there are changes nothing, and a resumed run replays them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kdbench.data.augment.library import PerImage
from kdbench.data.augment.strong import ResizedCrop
from kdbench.data.augment.views import Augment, Compose
from kdbench.data.bundle import ImageFiles
from kdbench.data.decode import FileSet, Key, loader
from kdbench.data.order import Bounds
from kdbench.data.resize import resized
from kdbench.errors import UserError


def box(drawn: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width, height in pixels of the part that was drawn [5] (ResizedCrop.drawn) of an image.

    In float32, as ResizedCrop.box has it, but without torch: the twenty operations on one number each took 0.3 ms an
    image, as long as resizing it.
    """
    area, aspect, left, top, _ = drawn
    one, aspect = np.float32(1), aspect / np.float32(width / height)
    share, tall = min(np.sqrt(area * aspect), one), min(np.sqrt(area / aspect), one)
    wide, high = max(1, round(float(share) * width)), max(1, round(float(tall) * height))
    left, top = float(left * (one - share)), float(top * (one - tall))
    return min(round(left * width), width - wide), min(round(top * height), height - high), wide, high


def random_crop(crop: ResizedCrop, size: int, pixels: Tensor, drawn: np.ndarray) -> Tensor:
    """The part of an image [C, H, W] that `crop` has drawn [5], resized (antialiased), maybe mirrored."""
    height, width = pixels.shape[-2:]
    left, top, wide, high = box(drawn, width, height)
    part = resized(pixels[:, top : top + high, left : left + wide], [size, size])
    return part.flip(-1) if crop.flip and drawn[4] < 0.5 else part


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

    def __init__(self, files: ImageFiles, decoding: AtDecoding, device: torch.device, workers: int) -> None:
        self.keys, self.device = Keys(), device
        self.loader = loader(FileSet(files, decoding), self.keys, workers, pinned=device.type == "cuda")

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.loader:
            if isinstance(images, UserError):
                raise images
            # From pinned memory, without waiting: the host runs ahead of the device and queues this copy (a ms) early.
            yield images.to(self.device, non_blocking=True)


class AtDecoding:
    """The parts of an augmentation that the processes do that decode: a crop that comes first, which is cut out of the
    full resolution, and all up to the last that takes an image at a time."""

    def __init__(self, augment: Augment | None, files: ImageFiles) -> None:
        self.augment, self.size = augment, files.size
        self.parts: Sequence[Augment] = augment.parts if isinstance(augment, Compose) else [augment] if augment else []
        singly = [place for place, part in enumerate(self.parts) if isinstance(part, PerImage)]
        self.crops = bool(self.parts) and isinstance(self.parts[0], ResizedCrop)
        self.count = max(singly, default=0 if self.crops else -1) + 1

    def shares(self, view: Tensor) -> list[Tensor]:
        """Each part's own view ids [B]."""
        return self.augment.split(view) if isinstance(self.augment, Compose) else [view]

    def drawn(self, seeds: Sequence[int]) -> np.ndarray | None:
        """What is random of the crops of images with these seeds [B, 5]; None: they are not cropped."""
        crop = self.parts[0] if self.crops else None
        return crop.drawn(self.shares(torch.tensor(seeds))[0]).numpy() if isinstance(crop, ResizedCrop) else None

    def crop(self, pixels: Tensor, drawn: np.ndarray) -> Tensor:
        crop = self.parts[0]
        assert isinstance(crop, ResizedCrop)
        return random_crop(crop, self.size, pixels, drawn)

    def rest(self, pixels: Tensor, seed: int) -> Tensor:
        """What follows the crop, or a fitted image, as far as it is done here. pixels uint8 [C, size, size]."""
        if not self.count:
            return pixels
        first = int(self.crops)
        for part, share in list(zip(self.parts, self.shares(torch.tensor([seed]))))[first : self.count]:
            pixels = part(pixels[None], share)[0]
        return pixels

    def on_device(self, images: Tensor, view: Tensor) -> Tensor:
        """What is left: batches [B, C, size, size] with their views [B]."""
        if self.count < len(self.parts):
            for part, share in zip(self.parts[self.count :], self.shares(view)[self.count :]):
                images = part(images, share)
        return images


class FileInputs:
    """Images that stay files (an InputSource): what AtDecoding says is done at decoding, the rest is the device's.

    Its inputs cannot be listed, so no teacher table.
    """

    enumerable = False

    def __init__(self, files: ImageFiles, augment: Augment | None, device: torch.device, workers: int) -> None:
        self.device, self.decoding = device, AtDecoding(augment, files)
        self.decoder = Decoder(files, self.decoding, device, workers)

    def epoch(self, place: Tensor, view: Tensor, bounds: Bounds) -> Iterator[Tensor]:
        self.decoder.keys.set(place, view, bounds)
        view = view.to(self.device)
        for images, (first, last) in zip(self.decoder, bounds):
            yield self.decoding.on_device(images, view[first:last])
