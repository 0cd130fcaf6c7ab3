"""Augmentations of timm and torchvision: theirs is called, seeded by the view, and nothing else is touched."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, posterize, rand_augment_transform
from torchvision.transforms import v2
from torchvision.transforms.functional import erase

from kdbench.data.augment.library import Timm, Torchvision, _posterized
from kdbench.data.augment.strong import RandomErasing
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

ALL = [
    Timm(),
    Timm("3a"),
    Timm("augmix-m5-w4-d2"),
    Torchvision("AutoAugment", {"policy": "cifar10"}),
    Torchvision("TrivialAugmentWide"),
    Torchvision("ColorJitter", {"brightness": 0.4, "hue": 0.1}),
    RandomErasing(0.5),
]


def some(count=6, channels=3, size=16) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(1)).byte()


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_an_image_depends_on_its_view_alone(augment):
    images, view = some(), torch.tensor([5, 2**62, 7, 8, 9, 5])
    kept = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    made = augment(images, view)
    assert made.dtype == torch.uint8 and made.shape == images.shape and not torch.equal(made, images)
    assert torch.equal(augment(images.flip(0), view.flip(0)).flip(0), made)
    assert not torch.equal(augment(images, view + 1), made)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == kept[:2]
    assert torch.equal(torch.get_rng_state(), kept[2])
    assert augment(some(channels=1), view).shape == (6, 1, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(augment))(images, view), made) and augment.views is None


@pytest.mark.parametrize(
    "policy, make", [("rand-m7-mstd0.5-inc1", rand_augment_transform), ("original-mstd0.5", auto_augment_transform)]
)
def test_timms_policy_is_timms(policy, make):
    images, theirs = some(4), make(policy, {"translate_const": 7, "img_mean": (124, 116, 104)})
    made = Timm(policy)(images, torch.arange(4))
    for number, image in enumerate(images):
        random.seed(number)
        np.random.seed(number)
        expected = np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))
        assert np.array_equal(made[number].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("trivial_augment", v2.TrivialAugmentWide()),
        ("color_jitter", v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)),
    ],
)
def test_torchvisions_transform_is_torchvisions(name, theirs):
    """The option's own values, behind its crop and mirror."""
    own = yaml.safe_load((Path(CONFIG_DIR) / "dataset" / "augment" / f"{name}.yaml").read_text())["parts"][1]
    augment, images = Torchvision(own["name"], own["options"]), some(4)
    made = augment(images, torch.arange(4))
    for number, image in enumerate(images):
        torch.manual_seed(number)
        assert torch.equal(made[number], theirs(image))


def test_posterize_to_no_bits_is_black():
    image = Image.fromarray(some(1)[0].permute(1, 2, 0).numpy())
    assert _posterized(image, 0).getextrema() == ((0, 0),) * 3
    assert _posterized(image, 3).tobytes() == posterize(image, 3).tobytes()


def test_what_the_libraries_do_not_read_is_refused():
    with pytest.raises(UserError, match="policy = rand-x: must be a policy that timm reads"):
        Timm("rand-x")
    with pytest.raises(UserError, match="policy = rand-m99-inc1: must be one with m from 0 to 30: it has m99"):
        Timm("rand-m99-inc1")
    with pytest.raises(UserError, match=r"options\.light = 1: must be left out: ColorJitter takes brightness"):
        Torchvision("ColorJitter", {"light": 1})
    with pytest.raises(UserError, match=r"options = .*: must be what torchvision's ColorJitter takes"):
        Torchvision("ColorJitter", {"hue": 7.0})
    with pytest.raises(UserError, match="name = Resize: must be one of AutoAugment"):
        Torchvision("Resize")


def test_erased_rectangles_are_those_of_the_paper():
    view, shape = torch.arange(4000), torch.Size((4000, 3, 40, 60))
    top, left, height, width = RandomErasing(0.25, (0.02, 0.3), 0.3).box(view, shape)
    erased = height > 0
    assert abs(erased.float().mean() - 0.25) < 0.02
    area = (height * width)[erased] / 2400
    assert 0.015 < area.min() < 0.03 and 0.26 < area.max() < 0.32 and abs(area.mean() - 0.15) < 0.02
    ratio = (height / width)[erased].log()
    assert abs(ratio.mean()) < 0.1 and ratio.max() < 1.4
    assert (top + height <= 40).all() and (left + width <= 60).all() and left.max() > 40


def test_an_erased_rectangle_is_torchvisions_of_the_same_place():
    """dataset/augment=random_erasing: pixels beside the rectangle stay, those within are noise of mean 0.45."""
    own = yaml.safe_load((Path(CONFIG_DIR) / "dataset" / "augment" / "random_erasing.yaml").read_text())["parts"][1]
    augment = RandomErasing(**{key: value for key, value in own.items() if key != "_target_"} | {"probability": 1.0})
    images, view = some(64), torch.arange(64)
    made, inside = augment(images, view), []
    for image, erased, (i, j, h, w) in zip(images, made, torch.stack(augment.box(view, images.shape), 1).tolist()):
        own_noise = erased[:, i : i + h, j : j + w].clone()
        assert torch.equal(erase(image, i, j, h, w, own_noise), erased)
        inside.append(own_noise.flatten())
    values = torch.cat(inside).float() / 255
    assert abs(values.mean() - 0.45) < 0.01 and abs(values.std() - 0.225) < 0.01


def test_what_is_put_in_a_rectangle():
    images, view = torch.zeros(400, 3, 8, 8, dtype=torch.uint8), torch.arange(400)
    gray = RandomErasing(1.0, (0.1, 0.3), fill="gray")(images, view)
    assert set(gray.unique().tolist()) == {0, 115}
    noise, colour = (RandomErasing(1.0, (0.3, 0.3), fill=fill)(images, view).float() for fill in ("pixel", "colour"))
    held = noise[RandomErasing(1.0, (0.3, 0.3), fill="gray")(images, view) > 0]
    assert abs(held.mean() - 0.45 * 255) < 2 and abs(held.std() - 0.225 * 255) < 2
    assert all(len(image[0].unique()) <= 2 for image in colour) and len(noise[0, 0].unique()) > 5
    with pytest.raises(UserError, match="area"):
        RandomErasing(area=[0.5, 0.1])
