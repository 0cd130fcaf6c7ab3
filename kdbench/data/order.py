"""Which samples an epoch shows, in which order, in which batches: a pure function of (seed, epoch)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench import world
from kdbench.data.augment.views import Augment
from kdbench.data.sampling import torch_generator
from kdbench.errors import UserError, require

Bounds = list[tuple[int, int]]  # the first place of each batch, and the one after its last


class Order:
    """The batches of n samples.

    With `repeats` r an epoch of the same length shows one r-th of the samples, each r times in a row in r views:
    repeated augmentation (Hoffer et al. 2020), as timm's RepeatAugSampler. With `copies` c each batch holds its samples
    c times, one copy after the other, each in views of its own: batches are c times as large, and as many as without.
    The last, smaller batch is kept unless drop_last is set, or it holds a single sample (batch-norm needs two).
    `bounds` are of whole batches; `own` what this process has of each, all of it if it is alone. Raises UserError if
    nothing is left, and for a batch that has not a row for each process.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, drop_last: bool = False, limit_steps: int | None = None,
        repeats: int = 1, copies: int = 1,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise UserError("schedule.batch_size", batch_size, "1 or more")
        if limit_steps is not None and limit_steps < 1:
            raise UserError("trainer.limit_steps", limit_steps, "1 or more, or null")
        if repeats > batch_size:
            raise UserError("schedule.repeats", repeats, f"at most {batch_size}, the batch size")
        tail = n % batch_size
        whole = n // batch_size
        steps = whole + (tail > 1 and not drop_last)
        if steps == 0:
            raise UserError("schedule.batch_size", batch_size, f"at most {n}, the number of training samples")
        self.seed, self.batch_size, self.repeats, self.copies = seed, batch_size, repeats, copies
        self.samples = n
        self.steps = min(steps, limit_steps or steps)
        self.used = min(n, self.steps * batch_size)  # samples that an epoch shows
        firsts, after = range(0, copies * self.used, copies * batch_size), copies * self.used
        self.bounds: Bounds = [(first, min(first + copies * batch_size, after)) for first in firsts]
        self.own: Bounds = self.bounds
        if world.size() > 1:
            self._divide()

    def _divide(self) -> None:
        processes, last = world.size(), self.bounds[-1][1] - self.bounds[-1][0]
        enough = f"at least {processes}, a row for each process of torchrun"
        require(self.batch_size >= processes, "schedule.batch_size", self.batch_size, enough)
        why = f"true with {processes} processes: an epoch's last batch has {last} rows"
        require(last >= processes, "trainer.drop_last", False, why)
        shares = [(first, world.own(last - first)) for first, last in self.bounds]
        self.own = [(first + begin, first + end) for first, (begin, end) in shares]

    def epoch(self, epoch: int, augment: Augment) -> tuple[Tensor, Tensor]:
        """Places in the split and views [copies x used] int64, on the CPU: its random streams are the same on every
        machine."""
        place = torch.randperm(self.samples, generator=torch_generator(self.seed, epoch, "order"))
        shown = -(-self.used // self.repeats)  # samples, each `repeats` times in a row
        place = place[:shown].repeat_interleave(self.repeats)[: self.used] if self.repeats > 1 else place[: self.used]
        generator = torch_generator(self.seed, epoch, "view")
        if self.copies == 1:
            return place, augment.draw(self.samples, generator)[: self.used]
        views = augment.draw(self.copies * self.samples, generator).view(self.copies, -1)[:, : self.used]
        return self._copied(place.expand(self.copies, -1)), self._copied(views)

    def _copied(self, values: Tensor) -> Tensor:
        """Of each copy [copies, used] the part of the first batch, then of each that of the second, ..."""
        return torch.cat([part.reshape(-1) for part in values.split(self.batch_size, 1)])

    def progress(self, epoch: int, epochs: int, device: torch.device) -> Tensor:
        """[steps] float32: how much of the training is done at the start of each step."""
        step = epoch * self.steps + torch.arange(self.steps, dtype=torch.float64)
        return (step / (epochs * self.steps)).to(torch.float32).to(device)
