"""Seeded augmentations against torchvision, and mixing of pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from kdbench.data.augment.mix import CutMix, Mixup, Switch, make_mix, mixed_labels
from kdbench.data.augment.strong import OPERATIONS, Cutout, RandAugment, ResizedCrop
from kdbench.data.augment.views import SEED
from kdbench.errors import UserError


def smooth_images(count: int, size: int) -> torch.Tensor:
    coarse = torch.rand((count, 3, 4, 4), generator=torch.Generator().manual_seed(2)) * 255
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").to(torch.uint8)


def torchvisions(image: torch.Tensor, name: str, sign: float, strength: float) -> torch.Tensor:
    """The same operation as torchvision.transforms.RandAugment applies it."""
    size, factor = image.shape[-1], 1 + 0.9 * strength * sign
    shear, shift = math.degrees(math.atan(0.3 * strength * sign)), int(150 / 331 * size * strength) * int(sign)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return {
        "identity": lambda: image,
        "shear_x": lambda: tv.affine(image, **still | {"shear": [shear, 0.0]}, center=[0, 0]),
        "shear_y": lambda: tv.affine(image, **still | {"shear": [0.0, shear]}, center=[0, 0]),
        "translate_x": lambda: tv.affine(image, **still | {"translate": [shift, 0]}),
        "translate_y": lambda: tv.affine(image, **still | {"translate": [0, shift]}),
        "rotate": lambda: tv.rotate(image, 30 * strength * sign),
        "brightness": lambda: tv.adjust_brightness(image, factor),
        "color": lambda: tv.adjust_saturation(image, factor),
        "contrast": lambda: tv.adjust_contrast(image, factor),
        "sharpness": lambda: tv.adjust_sharpness(image, factor),
        "posterize": lambda: tv.posterize(image, 8 - round(4 * strength)),
        "solarize": lambda: tv.solarize(image, 255 * (1 - strength)),
        "autocontrast": lambda: tv.autocontrast(image),
        "equalize": lambda: tv.equalize(image),
    }[name]()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_operation_is_torchvisions(name, sign):
    images, magnitude = smooth_images(3, 32), 12
    got = RandAugment(magnitude=magnitude).apply(
        images, torch.full((3,), OPERATIONS.index(name)), torch.full((3,), sign)
    )
    difference = (got.int() - torchvisions(images, name, sign, magnitude / 30).int()).abs()
    # Floats are added up in another order: a level at most, and for geometry a pixel on the edge of two.
    assert (difference <= 1).float().mean() > 0.99, name
    assert name == "identity" or not torch.equal(got, images)


def test_operations_are_mixed_in_a_batch():
    images = smooth_images(1, 16).expand(200, -1, -1, -1)
    got = RandAugment(operations=1).__call__(images, torch.arange(200) * 7919)
    assert len({image.numpy().tobytes() for image in got}) > len(OPERATIONS)  # the signed ones come in two


def test_cutout_blanks_a_square():
    images, augment = torch.full((300, 1, 20, 20), 9, dtype=torch.uint8), Cutout(size=6, fill=0)
    hole = (augment(images, augment.draw(300, torch.Generator().manual_seed(0))) == 0)[:, 0]
    area = hole.sum((1, 2))
    assert area.max() == 36 and area.min() >= 9  # cut by the border on two sides at most
    assert torch.equal(area, hole.any(1).sum(1) * hole.any(2).sum(1))  # a rectangle


def test_resized_crop():
    images = smooth_images(4, 16)
    assert torch.equal(ResizedCrop(smallest=1.0, flip=False).box(torch.arange(4))[2].round(), torch.ones(4))
    view = torch.randint(SEED, (1000,), generator=torch.Generator().manual_seed(0))
    left, top, width, height, flips = ResizedCrop(smallest=0.25).box(view)
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1 + 1e-6
    area, aspect = width * height, width / height
    assert 0.22 < area.min() < 0.3 and area.max() > 0.9
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.34
    assert 400 < flips.sum() < 600
    got = ResizedCrop(smallest=0.25, flip=False)(images, view[:4])
    for i in range(4):  # against torchvision's bilinear resize of (nearly) the same pixels
        x, y, w, h = (round(float(part[i]) * 16) for part in (left, top, width, height))
        near = tv.resized_crop(images[i], y, x, h, w, [16, 16], antialias=False)
        assert (got[i].int() - near.int()).abs().float().mean() < 12


BOTH = Switch((Mixup(0.4), CutMix(1.0)))


@pytest.mark.parametrize("mix", [Mixup(0.4), CutMix(1.0), BOTH, replace(BOTH, probability=0.7)], ids=repr)
def test_labels_follow_the_pixels(mix):
    share, recipe = mix.shares(50, np.random.default_rng(0), (12, 12))
    images, partner = torch.ones(2, 1, 12, 12), torch.zeros(2, 1, 12, 12)
    for step in range(50):
        assert mix(images, partner, recipe[step]).mean().item() == pytest.approx(share[step].item(), abs=1e-6)
    assert 0.3 < share.mean() < 0.8 and share.std() > 0.1


def test_mixed_labels():
    got = mixed_labels(torch.tensor([0, 1, -1]), torch.tensor([1, 1, 2]), torch.tensor(0.75), 3)
    assert got.tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0.25]]


def test_both_ways_are_mixup_and_cutmix_each_in_its_share_of_the_batches():
    steps, shape = 4000, (12, 12)
    mix = make_mix({"kind": "both", "alpha": 0.8, "switch": 0.25, "probability": 0.6})
    share, recipe = mix.shares(steps, np.random.default_rng(0), shape)
    cut, mixed = (recipe[:, 1:] != 0).any(1), recipe[:, 0] != 1
    assert not (cut & mixed).any()
    assert (share[~cut & ~mixed] == 1).all()
    # A rectangle may be empty, and a share may be 1 to float32: both are rare.
    assert abs(cut.float().mean() - 0.6 * 0.25) < 0.03 and abs(mixed.float().mean() - 0.6 * 0.75) < 0.03
    images, partner = torch.rand(3, 1, *shape), torch.rand(3, 1, *shape)
    for step in (int(cut.nonzero()[0]), int(mixed.nonzero()[0])):
        one = CutMix() if cut[step] else Mixup()
        expected = one(images, partner, recipe[step, 1:] if cut[step] else recipe[step, 0])
        assert torch.equal(mix(images, partner, recipe[step]), expected)


def test_one_way_in_some_batches_leaves_the_others_as_they_are():
    mix = make_mix({"kind": "cutmix", "probability": 0.5})
    share, recipe = mix.shares(400, np.random.default_rng(0), (12, 12))
    assert mix.kind == "cutmix" and (recipe[:, 0] == 1).all() and 0.3 < (share < 1).float().mean() < 0.6


def test_mix_options():
    assert make_mix({}) is None
    assert make_mix({"kind": "cutmix", "alpha": 2}) == CutMix(2)
    for options, words in [
        ({"kind": "mixcut"}, "dataset.mix.kind = mixcut: must be one of none, mixup, cutmix, both. Did you mean mixup"),
        ({"kind": "mixup", "switch": 0.1}, "dataset.mix.switch = 0.1: must be 0.5 without kind=both"),
        ({"probability": 0.5}, "dataset.mix.probability = 0.5: must be 1.0 with kind=none"),
        ({"kind": "both", "probability": 0.0}, r"dataset.mix.probability = 0.0: must be in \(0, 1\]"),
        ({"kind": "mixup", "alpha": 0.0}, "dataset.mix.alpha = 0.0: must be above 0"),
        ({"beta": 1}, "dataset.mix.beta: there is no such key. Keys of dataset.mix: alpha, cutmix_alpha, kind, prob"),
    ]:
        with pytest.raises(UserError, match=words):
            make_mix(options)
