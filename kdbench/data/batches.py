"""Batches of a split: order, inputs, augmentation, normalisation and mixing, without host sync in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdbench import world
from kdbench.data.augment.mix import Mixer
from kdbench.data.augment.views import Augment, copies_of
from kdbench.data.blocks import next_tokens
from kdbench.data.bundle import Bundle, Split, are_images
from kdbench.data.order import Bounds, Order
from kdbench.data.stream import FileInputs
from kdbench.errors import UserError
from kdbench.types import Batch, Target

_IN_CACHE = 2**17  # floats that a core's cache holds beside their source


@dataclass(frozen=True)
class Loading:
    """How a split becomes batches, whatever it holds. `seed`, `drop_last` and `limit_steps` are for training alone."""

    batch_size: int
    seed: int = 0
    device: torch.device | str = "cpu"
    channels_last: bool = False  # the memory layout of images; vectors and token ids have one only
    drop_last: bool = False
    limit_steps: int | None = None
    repeats: int = 1  # views of a sample in a row


# Inputs that are augmented at once. On a GPU the twenty to two hundred kernels of that are then launched once for many
# steps; on a CPU a batch at a time stays in the caches.
AHEAD = {"cuda": 1024}


def parts(bounds: Bounds, inputs: int) -> Iterator[Bounds]:
    """Batches that follow each other, together so many inputs or one batch."""
    steps = max(1, inputs // max((last - first for first, last in bounds), default=1))
    yield from (bounds[i : i + steps] for i in range(0, len(bounds), steps))


class InputSource(Protocol):
    """Where a split's inputs come from."""

    enumerable: bool  # whether an augmented input can be asked for by (place, view), in any order

    def epoch(self, place: Tensor, view: Tensor, bounds: Bounds) -> Iterator[Tensor]:
        """Inputs at places [n] of the split in views [n], both on the CPU, augmented, on the device, by `bounds`."""
        ...


class ResidentInputs:
    """Inputs that live in the device's memory. Sources made of one moved split (Split.to) share it."""

    enumerable = True

    def __init__(self, inputs: Tensor, augment: Augment | None, device: torch.device) -> None:
        self.inputs, self.augment = inputs.to(device), augment

    def at(self, place: Tensor, view: Tensor) -> Tensor:
        """Inputs at places [n] in views [n], both on the device."""
        inputs = self.inputs.index_select(0, place)
        return inputs if self.augment is None else self.augment(inputs, view)

    def epoch(self, place: Tensor, view: Tensor, bounds: Bounds) -> Iterator[Tensor]:
        # All that is random in an epoch goes to the device here, at once; a step only slices it.
        place, view = place.to(self.inputs.device), view.to(self.inputs.device)
        for part in parts(bounds, AHEAD.get(self.inputs.device.type, 1)):
            inputs = self.at(_within(place, part), _within(view, part))
            yield from inputs.split([last - first for first, last in part])


def _within(values: Tensor, bounds: Bounds) -> Tensor:
    """What lies within some bounds, one after the other."""
    return torch.cat([values[first:last] for first, last in bounds])


def scale_and_shift(mean: Sequence[float], std: Sequence[float], most: int) -> tuple[Tensor, Tensor]:
    """(input / most - mean) / std as input * scale + shift, two float32 [C]: two passes over the floats, not three."""
    shift, spread = (torch.tensor(numbers, dtype=torch.float64) for numbers in (mean, std))
    return (1 / (most * spread)).float(), (-shift / spread).float()


class Normalise:
    """(input - mean) / std as float32; pixels are first divided by 255. Inputs without a mean (token ids) stay as they
    are."""

    def __init__(self, data: Bundle, device: torch.device, channels_last: bool) -> None:
        inputs = data.train.inputs
        shape = [1, -1, *[1] * (len(inputs.shape) - 2)]
        scale, shift = scale_and_shift(data.mean, data.std, 255 if are_images(inputs) else 1)
        self.scale, self.shift = scale.view(shape).to(device), shift.view(shape).to(device)
        channels_last = channels_last and len(inputs.shape) == 4
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.needed = bool(data.mean)

    def __call__(self, inputs: Tensor) -> Tensor:
        if not self.needed:
            return inputs
        # Gray images have two layouts at once, and keep the strides that they have.
        if inputs.device.type == "cpu" and inputs.numel() > 8 * _IN_CACHE and inputs.shape[1] > 1:
            return self._by_parts(inputs)
        # A copy, always: what is resident must stay as it is.
        return inputs.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift).to(memory_format=self.layout)

    def _by_parts(self, inputs: Tensor) -> Tensor:
        """The same numbers, a few inputs at a time: three passes over what stays in the cache, then one into the batch,
        which turns floats and not bytes (0.07 ms an image of 224x224 on one core; turned as bytes 0.25, over the whole
        batch 0.31)."""
        made = torch.empty(inputs.shape, memory_format=self.layout)
        count = max(1, _IN_CACHE * len(inputs) // inputs.numel())
        for part, raw in zip(made.split(count), inputs.split(count)):
            part.copy_(raw.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift))
        return made


class _Batches:
    """What training and evaluation share: labels and rows on the device, the inputs' source, and normalisation."""

    def __init__(self, data: Bundle, split: Split, loading: Loading, augment: Augment | None) -> None:
        self.device = torch.device(loading.device)
        self.size = len(split)  # samples an epoch draws from
        self.labels, self.rows = split.labels.to(self.device), split.rows.to(self.device)
        self.source: InputSource = (
            ResidentInputs(split.inputs, augment, self.device)
            if isinstance(split.inputs, Tensor)
            else FileInputs(split.inputs, augment, self.device, data.workers)
        )
        self.normalise = Normalise(data, self.device, loading.channels_last)
        self.blocks = data.blocks
        self.predictions = 1 if data.blocks is None else data.blocks.predicted  # of an input
        padded = data.blocks is not None and bool((split.labels < 0).any())
        self._known = (split.labels >= 0).cpu() if padded else None  # [n, predicted]: which predictions count

    def _of_text(self, raw: Tensor, here: Tensor, view: Tensor, places: Tensor) -> Batch:
        """Blocks of a running text, of which every next token is predicted, at `places` [B] (the same as `here`, on the
        CPU): label and row are a prediction's own, and padding has none."""
        assert self.blocks is not None
        inputs, label = next_tokens(raw[:, : self.blocks.length], self.blocks.predicted)
        first = self.rows.index_select(0, here)[:, None]
        step = torch.arange(self.blocks.predicted, device=self.device)
        row = torch.where(first < 0, first, first * self.blocks.predicted + view[:, None] + step).flatten()
        progress = torch.ones((), device=self.device)
        if self._known is None:
            return Batch(inputs, view, Target(label, row, progress))
        # Counted where the labels lie on the CPU: no host sync.
        counted = self._known[places].flatten().nonzero()[:, 0].to(self.device)
        return Batch(inputs, view, Target(label[counted], row[counted], progress, counted))


class TrainingBatches(_Batches):
    """A split in the views and the mixtures of its data, in a new order every epoch.

    The same (seed, epoch) gives the same batches to the last bit, so that a resumed run replays them. `steps`: batches
    in one epoch. `views`: how many views an input has; None where they cannot be listed (files, mixtures, some
    augmentations), so that no table of a teacher's logits can hold them. Mixtures have labels [B, C] float.
    """

    def __init__(self, data: Bundle, split: Split, loading: Loading) -> None:
        super().__init__(data, split, loading, data.augment)
        self.augment = data.augment
        self.order = Order(
            len(split), loading.batch_size, loading.seed, loading.drop_last, loading.limit_steps, loading.repeats,
            copies_of(data.augment),
        )  # fmt: skip
        size = tuple(split.inputs.shape[2:])
        self.mixer = Mixer(data.mix, len(data.classes), self.order, size) if data.mix is not None else None
        self.steps = self.order.steps
        self.views = data.augment.views if self.source.enumerable and data.mix is None else None
        self._row_at = split.rows.cpu()
        self._place_of = torch.full((max(int(self._row_at.max()), -1) + 1,), -1)  # of an original row; -1: not in here
        self._place_of[self._row_at] = torch.arange(len(split))

    def plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Original rows and views that this process will ask for in an epoch, in order: int64 [samples] on the CPU."""
        place, view = self.order.epoch(epoch, self.augment)
        if world.size() > 1:
            place, view = _within(place, self.order.own), _within(view, self.order.own)
        return self._row_at[place], view

    def inputs_at(self, row: Tensor, view: Tensor) -> Tensor:
        """Original rows [n] and views [n], both on the CPU, as the network gets them, on the device.

        Raises ValueError for a row that this split does not hold, and where the inputs are streamed from files.
        """
        if not isinstance(self.source, ResidentInputs):
            raise ValueError("inputs that are streamed cannot be asked for by row")
        inside = (row >= 0) & (row < len(self._place_of))
        place = self._place_of[row.clamp(0, len(self._place_of) - 1)]
        if not bool((inside & (place >= 0)).all()):
            raise ValueError("a row is asked for that is not in this split")
        return self.normalise(self.source.at(place.to(self.device), view.to(self.device)))

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0; epochs: the length of the training."""
        place, view = self.order.epoch(epoch, self.augment)
        bounds = self.order.own if self.mixer is None else self.order.bounds  # a mixture is of a whole batch
        stream, places = self.source.epoch(place, view, bounds), place
        place, view = place.to(self.device), view.to(self.device)
        progress = self.order.progress(epoch, epochs, self.device)
        if self.mixer is not None:
            self.mixer.start(epoch, self.device)
        for step, (raw, (first, last)) in enumerate(zip(stream, bounds)):
            here = place[first:last]
            if self.blocks is not None:
                made = self._of_text(raw, here, view[first:last], places[first:last])
                yield made._replace(target=made.target._replace(progress=progress[step]))
                continue
            inputs, label = self.normalise(raw), self.labels.index_select(0, here)
            if self.mixer is not None:
                inputs, label = self.mixer(step, inputs, label)
            batch = Batch(inputs, view[first:last], Target(label, self.rows.index_select(0, here), progress[step]))
            yield batch if world.size() == 1 else self._among_others(batch, step, place)

    def _among_others(self, batch: Batch, step: int, place: Tensor) -> Batch:
        """This process's rows, which a mixture has still to be cut to, and the target of those of all."""
        (first, last), (begin, end) = self.order.bounds[step], self.order.own[step]
        target, there = batch.target, place[first:last]
        if self.mixer is None:
            labels, rows = self.labels.index_select(0, there), self.rows.index_select(0, there)
            return batch._replace(whole=target._replace(label=labels, row=rows))
        own = slice(begin - first, end - first)
        part = target._replace(label=target.label[own], row=target.row[own])
        return Batch(batch.input[own], batch.view[own], part, target)


class EvaluationBatches(_Batches):
    """A split as it is, not augmented, always in its own order; of images that are files, the middle of each.

    `view` is the view of the training augmentation that leaves an input as it is, so that a table of the training set
    can serve these batches too (-1: there is none). `posterior` [N, C]: the true probabilities, where they are known.
    """

    def __init__(self, data: Bundle, split: Split, loading: Loading) -> None:
        if loading.batch_size < 1:
            raise UserError("trainer.eval_batch_size", loading.batch_size, "1 or more")
        super().__init__(data, split, loading, None)
        self.bounds = [(k, min(k + loading.batch_size, self.size)) for k in range(0, self.size, loading.batch_size)]
        self.view = torch.full((min(loading.batch_size, self.size),), data.augment.no_op, device=self.device)
        self.progress = torch.ones((), device=self.device)
        self.task = data.task
        known = data.posterior_of(split)
        self.posterior = None if known is None else known.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        place = torch.arange(self.size)
        for raw, (first, last) in zip(self.source.epoch(place, place, self.bounds), self.bounds):
            if self.blocks is not None:
                here = place[first:last]
                yield self._of_text(raw, here.to(self.device), torch.zeros_like(here, device=self.device), here)
                continue
            target = Target(self.labels[first:last], self.rows[first:last], self.progress)
            yield Batch(self.normalise(raw), self.view[: last - first], target)
