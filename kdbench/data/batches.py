"""Batches from images that live on the device: order, gather, augment, normalise, without host sync in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdbench.data.augment.mix import CutMix, Mixup
from kdbench.data.augment.views import Augment
from kdbench.data.bundle import Bundle, ImageFiles, Split
from kdbench.data.order import Order
from kdbench.data.prepare import Mixer, Normalise
from kdbench.data.stream import StreamBatches, StreamEval
from kdbench.errors import UserError
from kdbench.types import Batch, EvalBatches, Target, TrainBatches


class ResidentBatches:
    """Training batches of a split whose images are in the device's memory as uint8 (a TrainBatches).

    The same (seed, epoch) gives the same batches to the last bit. Move a split once (Split.to) and several of these
    share its memory. mix needs num_classes, makes labels [B, C] float, and takes the views' enumeration away.
    """

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
    ) -> None:
        if not isinstance(split.inputs, Tensor):
            raise TypeError("files stream: use make_train_batches, which chooses")
        self.device = torch.device(device)
        self.order = Order(len(split), batch_size, seed, drop_last, limit_steps)
        self.all_rows = split.rows.cpu()
        self.position = self._positions()
        split = split.to(self.device)
        self.inputs, self.labels, self.rows = split.inputs, split.labels, split.rows
        self.augment = augment
        self.normalise = Normalise(mean, std, self.device, dtype, channels_last)
        self.mixer: Mixer | None = None
        if mix is not None:
            if num_classes is None:
                raise TypeError("mix needs num_classes")
            self.mixer = Mixer(mix, num_classes, self.order, tuple(self.inputs.shape[2:]))  # type: ignore[arg-type,union-attr]
        self.size, self.steps = len(split), self.order.steps
        self.views = None if mix is not None else augment.views

    def _positions(self) -> Tensor:
        """[largest row + 1] int64 on the CPU: where an original row is in this split, -1 where it is not."""
        position = torch.full((int(self.all_rows.max()) + 1,), -1)
        position[self.all_rows] = torch.arange(len(self.all_rows))
        return position

    def plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Original rows and views that an epoch will ask for, in order: two int64 [images] on the CPU."""
        position, view = self.order.epoch(epoch, self.augment)
        return self.all_rows[position], view

    def images_at(self, rows: Tensor, view: Tensor) -> Tensor:
        """Original rows [n] and views [n], both on the CPU, as normalised images [n, C, H, W] on the device.

        Raises ValueError for a row that this split does not hold.
        """
        inside = (rows >= 0) & (rows < len(self.position))
        position = self.position[rows.clamp(0, len(self.position) - 1)]
        if not bool((inside & (position >= 0)).all()):
            raise ValueError("a row is asked for that is not in this split")
        return self._images(position.to(self.device), view.to(self.device))

    def _images(self, position: Tensor, view: Tensor) -> Tensor:
        assert isinstance(self.inputs, Tensor)
        return self.normalise(self.augment(self.inputs.index_select(0, position), view))

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0; epochs: the length of the training."""
        # All that is random in an epoch goes to the device here, at once; a step only slices it.
        position, view = (part.to(self.device) for part in self.order.epoch(epoch, self.augment))
        progress = self.order.progress(epoch, epochs, self.device)
        if self.mixer is not None:
            self.mixer.start(epoch, self.device)
        for step, (first, last) in enumerate(self.order.bounds):
            here, seen = position[first:last], view[first:last]
            images, label = self._images(here, seen), self.labels.index_select(0, here)
            if self.mixer is not None:
                images, label = self.mixer(step, images, label)
            yield Batch(images, seen, Target(label, self.rows.index_select(0, here), progress[step]))


class ResidentEval:
    """Un-augmented batches of a split in memory, always in the same order (an EvalBatches).

    view is `no_op`: the view of the training augmentation that leaves an image as it is, so that a table of training
    images can serve these batches too (-1: there is none).
    """

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        no_op: int = 0,
    ) -> None:
        if not isinstance(split.inputs, Tensor):
            raise TypeError("files stream: use make_eval_batches, which chooses")
        if batch_size < 1:
            raise UserError(f"trainer.eval_batch_size must be 1 or more, got {batch_size}")
        self.device, self.batch_size = torch.device(device), batch_size
        split = split.to(self.device)
        self.inputs, self.labels, self.rows = split.inputs, split.labels, split.rows
        self.normalise = Normalise(mean, std, self.device, dtype, channels_last)
        self.size = len(split)
        self.view = torch.full((min(batch_size, self.size),), no_op, device=self.device)
        self.progress = torch.ones((), device=self.device)

    def __iter__(self) -> Iterator[Batch]:
        assert isinstance(self.inputs, Tensor)
        for first in range(0, self.size, self.batch_size):
            here = slice(first, first + self.batch_size)
            label = self.labels[here]
            target = Target(label, self.rows[here], self.progress)
            yield Batch(self.normalise(self.inputs[here]), self.view[: len(label)], target)


def make_train_batches(
    bundle: Bundle,
    split: Split,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    drop_last: bool = False,
    limit_steps: int | None = None,
    augment: Augment | None = None,
) -> TrainBatches:
    """Batches of a split of the bundle, resident or streamed. augment: null takes the bundle's (the student's)."""
    augment = bundle.augment if augment is None else augment
    options = (batch_size, seed, device, dtype, channels_last, drop_last, limit_steps, bundle.mix, len(bundle.classes))
    if isinstance(split.inputs, ImageFiles):
        return StreamBatches(split, bundle.mean, bundle.std, augment, *options, workers=bundle.workers)
    return ResidentBatches(split, bundle.mean, bundle.std, augment, *options)


def make_eval_batches(
    bundle: Bundle,
    split: Split,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    augment: Augment | None = None,
) -> EvalBatches:
    """Un-augmented batches of a split of the bundle, resident or streamed; views count as in `augment`'s numbering."""
    no_op = (bundle.augment if augment is None else augment).no_op
    options = (batch_size, device, dtype, channels_last, no_op)
    if isinstance(split.inputs, ImageFiles):
        return StreamEval(split, bundle.mean, bundle.std, *options, workers=bundle.workers)
    return ResidentEval(split, bundle.mean, bundle.std, *options)
