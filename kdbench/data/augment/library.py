"""Augmentations of timm and torchvision, an image at a time, each seeded by the image's view id."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdbench.arguments import checked, refuse_foreign
from kdbench.arguments.ranges import Share, Text, listed
from kdbench.data.augment.views import SEED
from kdbench.errors import UserError


@contextmanager
def _own_randomness() -> Iterator[Callable[[int], None]]:
    """Gives what seeds the global generators of Python, numpy and torch; afterwards they are as they were.

    The libraries draw from those, so that this is the one way to make their draws a function of (seed, epoch).
    """
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def seed(value: int) -> None:
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.default_generator.manual_seed(value)

    try:
        yield seed
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


class PerImage:
    """An augmentation of one image at a time, on the CPU: files are augmented by the processes that decode them.

    Images in memory are augmented in the training process, those of a GPU on a way over the host. An image of 32x32
    costs 0.1 ms on one core (AugMix: 0.6).
    """

    views = None
    no_op = -1

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(SEED, (n,), generator=generator)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        made = torch.empty(images.shape, dtype=torch.uint8)
        with _own_randomness() as seed:
            for place, (image, own) in enumerate(zip(images.cpu(), view.tolist())):
                seed(own)
                made[place] = self.changed(image)
        return made.to(images.device)

    def changed(self, image: Tensor) -> Tensor:
        """uint8 [C, H, W] -> the same, with draws from the global generators."""
        raise NotImplementedError


@checked
@dataclass(frozen=True)
class Torchvision(PerImage):
    """A transform of torchvision.transforms.v2 by its name, with its own arguments.

    AutoAugment (Cubuk et al. 2019), TrivialAugmentWide (Mueller and Hutter 2021), AugMix (Hendrycks et al. 2020),
    ColorJitter, and what else of it keeps an image's size. Raises UserError for arguments that it does not take.
    """

    name: Literal["AutoAugment", "TrivialAugmentWide", "AugMix", "ColorJitter", "RandomGrayscale", "RandomPerspective"]
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        self._made  # noqa: B018 - made now, to refuse what does not fit

    @cached_property
    def _made(self) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import v2

        options = dict(self.options)
        target: Callable[..., Callable[[Tensor], Tensor]] = getattr(v2, self.name)
        try:
            if self.name == "AutoAugment" and "policy" in options:
                options["policy"] = v2.AutoAugmentPolicy(options["policy"])
            refuse_foreign(target, options, self.name)
            made = target(**options)
        except UserError as error:
            error.move_under("options")
            raise
        except (TypeError, ValueError) as error:
            raise UserError("options", dict(self.options), f"what torchvision's {self.name} takes: {error}") from error
        return made

    def changed(self, image: Tensor) -> Tensor:
        return self._made(image)


def _mended(policy: Any) -> Any:
    """A policy of timm whose posterize takes 0 bits, which magnitudes near 10 ask for: Pillow 12 refuses them."""
    from timm.data.auto_augment import posterize

    groups = getattr(policy, "policy", None) or [policy.ops]
    for operation in (operation for group in groups for operation in group):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterized
    return policy


def _posterized(image: Any, bits: int, **options: Any) -> Any:
    from timm.data.auto_augment import posterize

    return posterize(image, bits, **options) if bits > 0 else image.point([0] * 256 * len(image.getbands()))  # black


# Of the sections of a policy. timm cuts magnitudes above 10 (or above its mmax); the scale of RandAugment ends at 30.
_NUMBERS = {
    ("rand", "m"): (0.0, 30.0),
    ("rand", "n"): (1.0, 14.0),
    ("rand", "p"): (0.0, 1.0),
    ("augmix", "m"): (0.0, 30.0),
    ("augmix", "w"): (1.0, 16.0),
    ("augmix", "d"): (1.0, 16.0),
}


@checked
@dataclass(frozen=True)
class Timm(PerImage):
    """A policy as timm's --aa writes it: rand-m9-mstd0.5-inc1, original-mstd0.5, v0, 3a, augmix-m5-w4-d2.

    `rand-m9-mstd0.5-inc1` is RandAugment (Cubuk et al. 2020) of magnitude 9 with a deviation of 0.5, whose operations
    grow with the magnitude: what DeiT (Touvron et al. 2021) and most recipes since train with. `3a` is the three
    changes of DeiT III (Touvron et al. 2022), without its colour jitter. Lengths and the colour of what comes in from
    outside follow timm's create_transform: shifts up to 0.45 of the shorter side, `mean` in [0, 1] a channel.
    Gray images go through as three equal channels. Raises UserError for a policy that timm does not read.
    """

    policy: Text = "rand-m9-mstd0.5-inc1"
    mean: Annotated[list[Share], listed(3, "three numbers in [0, 1]", most=3)] = field(
        default_factory=lambda: [0.485, 0.456, 0.406]
    )  # of ImageNet

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        self._made(32)

    @cached_property
    def _known(self) -> dict[int, Callable[[Any], Any]]:
        return {}

    def _made(self, side: int) -> Callable[[Any], Any]:
        """timm's transform of PIL images with so many pixels on the shorter side."""
        from timm.data import auto_augment  # imported when used: timm takes a second

        if side not in self._known:
            outside = tuple(round(255 * part) for part in self.mean)
            arguments: dict[str, object] = {"translate_const": int(side * 0.45), "img_mean": outside}
            kind, *sections = self.policy.split("-")
            make = auto_augment.auto_augment_transform
            if kind == "rand":
                make = auto_augment.rand_augment_transform
            elif kind == "augmix":
                arguments["translate_pct"], make = 0.3, auto_augment.augment_and_mix_transform
            try:
                self._refuse_sections(kind, sections)
                self._known[side] = _mended(make(self.policy, arguments))
            except UserError:
                raise
            except (AssertionError, ValueError, KeyError, TypeError) as error:
                words = "a policy that timm reads: rand-m9-mstd0.5-inc1, original-mstd0.5, v0, 3a, augmix-m5-w4-d2"
                raise UserError("policy", self.policy, words) from error
        return self._known[side]

    def _refuse_sections(self, kind: str, sections: Sequence[str]) -> None:
        """Raise a UserError for a number out of its range, which timm cuts or fails of as it trains, and a ValueError
        for a section without one, which timm would pass over."""
        for section in sections:
            named = re.fullmatch(r"t[a-z]+|([a-z]+)([\d.]+)", section)
            if named is None:
                raise ValueError(section)
            low, high = _NUMBERS.get((kind, named[1] or ""), (0.0, math.inf))
            if named[1] and not low <= float(named[2]) <= high:
                raise UserError(
                    "policy", self.policy, f"one with {named[1]} from {low:g} to {high:g}: it has {section}"
                )

    def changed(self, image: Tensor) -> Tensor:
        from PIL import Image

        pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        made = self._made(min(image.shape[1:]))(Image.fromarray(pixels))
        made = made.convert("L") if len(image) == 1 else made
        return torch.from_numpy(np.array(made)).reshape(*image.shape[1:], len(image)).permute(2, 0, 1)
