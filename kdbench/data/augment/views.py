"""Augmentation as batched tensor arithmetic on uint8 images, with a view id a row.

A view id says which augmentation an image got. Where there are finitely many (`views`), a teacher's logits over all of
them fit in a table. Where there are not (`views` is None), the id is a 63-bit seed of that image's own randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments import checked
from kdbench.arguments.ranges import listed, within
from kdbench.data.sampling import mixed
from kdbench.errors import UserError, require

SEED = 2**63 - 1  # view ids of what cannot be enumerated are drawn from [0, SEED)


class Augment(Protocol):
    """What an augmentation is. Equal parameters give an equal repr, so the repr may key a table."""

    @property
    def views(self) -> int | None:
        """How many views an image has; None if they cannot be enumerated."""
        ...

    @property
    def no_op(self) -> int:
        """The view that leaves an image as it is; -1 if there is none."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n view ids [n] int64, uniformly, on the generator's device."""
        ...

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """images uint8 [B, C, H, W], view int64 [B] -> uint8 [B, C, H, W], on the images' device, without host sync."""
        ...


_RENAMED = {"no_op": "identity"}  # hooks by the names that they had in earlier versions


def refuse_no_augment(made: object, key: str, value: object, allowed: str) -> None:
    """Raise a UserError for what is no augmentation, with the hooks that it lacks."""
    lacking = [name for name in ("views", "no_op", "draw", "__call__") if not hasattr(made, name)]
    if lacking:
        old = [f"{_RENAMED[name]} is called {name} now" for name in lacking if hasattr(made, _RENAMED.get(name, ""))]
        hint = "; ".join([f"{type(made).__name__} has no {', '.join(lacking)}", *old])
        raise UserError(key, value, allowed, hint)


def copies_of(augment: Augment) -> int:
    """How many times it shows an image in a batch: what `SideBySide` has parts, else once."""
    return getattr(augment, "copies", 1)


@dataclass(frozen=True)
class Identity:
    """No augmentation: one view."""

    views = 1
    no_op = 0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(n, dtype=torch.int64)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        return images


@checked
@dataclass(frozen=True)
class CropFlip:
    """Pad by `pad` pixels, crop back to the old size at a random offset, mirror left-right half of the time.

    The usual augmentation of 32x32 sets: pad 4 with zeros (Lee et al. 2015; He et al. 2016), or with reflection (Wide
    ResNet's published code). view = (dy * (2 pad + 1) + dx) * 2 + flip, with dy, dx in [0, 2 pad] the crop's corner
    in the padded image; without flip the last factor is left out. 162 views for pad 4 with flip.
    """

    pad: Annotated[int, within(0, 1024)] = 4  # pixels
    flip: bool = True
    padding: Literal["zeros", "reflect"] = "zeros"

    @property
    def views(self) -> int:
        return (2 * self.pad + 1) ** 2 * (2 if self.flip else 1)

    @property
    def no_op(self) -> int:
        return (self.pad * (2 * self.pad + 1) + self.pad) * (2 if self.flip else 1)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.views, (n,), generator=generator)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        flips, offset = (view % 2, view // 2) if self.flip else (None, view)
        images = self._crop(images, offset) if self.pad else images
        if flips is None:
            return images
        # Both, then choose: 0.4 us an image of 32x32; torch.where on bytes costs 2.9.
        both = torch.cat([images, images.flip(-1)])
        return both.index_select(0, torch.arange(len(images), device=view.device) + flips * len(images))

    def _crop(self, images: Tensor, offset: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        padded = self._padded(images).reshape(-1)
        across, down = width + 2 * self.pad, height + 2 * self.pad
        device, side = images.device, 2 * self.pad + 1
        plane = torch.arange(batch * channels, device=device).view(batch, channels, 1) * down
        row = torch.arange(height, device=device) + (offset // side)[:, None, None]
        start = (plane + row) * across + (offset % side)[:, None, None]
        # All windows of one image row's length, overlapping, as a view of the same memory: so a crop is a gather of
        # rows instead of pixels (0.7 us an image of 32x32 instead of 5).
        windows = padded.as_strided((padded.numel() - width + 1, width), (1, 1))
        return windows.index_select(0, start.view(-1)).view(batch, channels, height, width)

    def _padded(self, images: Tensor) -> Tensor:
        if self.padding == "zeros":
            return F.pad(images, (self.pad,) * 4)
        if self.pad >= min(images.shape[-2:]):
            side = min(images.shape[-2:])
            raise UserError("dataset.augment.pad", self.pad, f"below the image size, {side}, with padding=reflect")
        for dim in (2, 3):  # F.pad has no reflection for uint8
            last = images.shape[dim] - 1
            reach = torch.arange(-self.pad, last + self.pad + 1, device=images.device)
            images = images.index_select(dim, last - (last - reach.abs()).abs())
        return images


@checked
@dataclass(frozen=True)
class Turn:
    """Square images turned counter-clockwise by a number of right angles: one view."""

    quarters: Annotated[int, within(0, 3)]

    views = 1

    @property
    def no_op(self) -> int:
        return 0 if self.quarters == 0 else -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(n, dtype=torch.int64)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        if self.quarters % 2 and images.shape[-1] != images.shape[-2]:
            raise UserError("dataset.augment", "Turn", f"another for images of {images.shape[-2]} x {images.shape[-1]}")
        return images.rot90(self.quarters, (-2, -1)).contiguous()


@checked
def jitter(pixels: Annotated[int, within(0, 1024)] = 2) -> CropFlip:
    """Shift by up to `pixels` in both directions, black borders: Hinton et al. 2015, section 3 (MNIST)."""
    return CropFlip(pad=pixels, flip=False)


Jitter = jitter  # its name as a `_target_`: run folders, hashes and names of stored teachers hold it


@checked
@dataclass(frozen=True)
class Compose:
    """Augmentations one after the other.

    If all can be enumerated so can the whole (the view id counts the last one fastest); otherwise the view is a seed
    from which each part's own view is derived.
    """

    parts: Annotated[Sequence[Augment], listed(1, "a list of one augmentation or more")]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    @property
    def views(self) -> int | None:
        counts = [part.views for part in self.parts]
        return None if None in counts else prod(count for count in counts if count is not None)

    @property
    def no_op(self) -> int:
        if self.views is None:
            return -1
        view = 0
        for part in self.parts:
            view = view * (part.views or 1) + part.no_op
        return view

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.views or SEED, (n,), generator=generator)

    def split(self, view: Tensor) -> list[Tensor]:
        """Each part's own view ids [B]."""
        shares = []
        if self.views is None:
            for position, part in enumerate(self.parts):
                seed = mixed(view, position + 1) & SEED
                shares.append(seed if part.views is None else seed % part.views)
            return shares
        for part in reversed(self.parts):
            shares.append(view % (part.views or 1))
            view = view // (part.views or 1)
        return shares[::-1]

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        for part, share in zip(self.parts, self.split(view)):
            images = part(images, share)
        return images


@checked
@dataclass(frozen=True)
class SideBySide:
    """Each image once in the view of every part: a weak and a strong one, say, for losses over several views.

    A batch of B images holds all B in the first part's views, then all B in the second's, ... A view id is a part's own
    one times the number of parts, plus the part. A table of the teacher's logits serves if all parts can be enumerated.
    `alike`: an image's views have one draw, so that parts which differ in a turn alone show the same crop; with "flip"
    all or none of them are mirrored and each has a crop of its own. Parts with other numbers of views are refused, and
    for "flip" those that do not mirror by CropFlip alone.
    """

    parts: Annotated[Sequence[Augment], listed(2, "a list of two augmentations or more")]
    # Which draws there are; what a view id shows, and so a table, stays.
    alike: bool | Literal["flip"] = field(default=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        one = len({part.views for part in self.parts}) == 1
        require(one or not self.alike, "alike", self.alike, "false: its parts have different numbers of views")
        mirrored = self.alike != "flip" or all(map(_ends_with_flip, self.parts))
        allowed = "true or false: a part has no CropFlip with flip, or other views besides"
        require(mirrored, "alike", self.alike, allowed)

    @property
    def copies(self) -> int:
        return len(self.parts)

    @property
    def views(self) -> int | None:
        counts = [part.views for part in self.parts]
        return None if None in counts else len(counts) * max(count for count in counts if count is not None)

    @property
    def no_op(self) -> int:
        return self.copies * self.parts[0].no_op if self.parts[0].no_op >= 0 else -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n view ids: the first n / copies are the first part's, ..."""
        own = [part.draw(n // self.copies, generator) for part in self.parts[: 1 if self.alike is True else None]]
        if self.alike:
            own = own * self.copies if self.alike is True else [view - view % 2 + own[0] % 2 for view in own]
        largest = SEED // self.copies  # of seeds, such that an id has 63 bits
        return torch.cat([(view % largest) * self.copies + number for number, view in enumerate(own)])

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        whose, own = view % self.copies, view // self.copies
        shown = images
        for number, part in enumerate(self.parts):
            mine = whose == number
            if images.device.type == "cpu":
                place = mine.nonzero().squeeze(1)
                if len(place):
                    made = part(images.index_select(0, place), own.index_select(0, place))
                    shown = shown.index_copy(0, place, made)
            else:  # which they are is not known without a host sync: all, then choose
                made = part(images, own if part.views is None else own % part.views)
                shown = torch.where(mine.view(-1, *[1] * (images.dim() - 1)), made, shown)
        return shown


def _ends_with_flip(part: Augment) -> bool:
    """Whether the parity of its view id says that the image is mirrored."""
    varied = [inner for inner in part.parts if inner.views != 1] if isinstance(part, Compose) else [part]
    return len(varied) == 1 and isinstance(varied[0], CropFlip) and varied[0].flip
