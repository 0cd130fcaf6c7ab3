"""Enumerable augmentation: every view against per-image PIL, numbering, and no host sync."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from kdbench.build import make_augment
from kdbench.data.augment.strong import Cutout, RandAugment, ResizedCrop
from kdbench.data.augment.views import Compose, CropFlip, Identity, SideBySide, Turn, copies_of, jitter
from kdbench.data.order import Order
from kdbench.data.sampling import mixed, seed_of, uniforms
from kdbench.errors import UserError

ENUMERABLE = [Identity(), CropFlip(), CropFlip(pad=0), jitter(1), Compose([jitter(1), CropFlip(pad=0)])]
SEEDED = [RandAugment(), Cutout(size=3), ResizedCrop(), Compose([CropFlip(pad=2), Cutout(size=3), RandAugment()])]


def some_images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def pil_view(image: torch.Tensor, pad: int, dy: int, dx: int, flip: bool) -> torch.Tensor:
    """Pad, crop, mirror one colour image with PIL."""
    size = image.shape[-1]
    padded = ImageOps.expand(Image.fromarray(image.permute(1, 2, 0).numpy()), border=pad, fill=0)
    cropped = padded.crop((dx, dy, dx + size, dy + size))
    return torch.from_numpy(np.array(ImageOps.mirror(cropped) if flip else cropped)).permute(2, 0, 1)


@pytest.mark.parametrize("size", [8, 32])
def test_all_162_views_are_pils(size):
    augment, image = CropFlip(), some_images(1, 3, size)
    assert augment.views == 162
    got = augment(image.expand(162, -1, -1, -1), torch.arange(162))
    for view in range(162):
        offset, flip = divmod(view, 2)
        assert torch.equal(got[view], pil_view(image[0], 4, *divmod(offset, 9), bool(flip))), view


def test_all_views_with_reflection_are_numpys():
    augment, image = CropFlip(pad=3, padding="reflect"), some_images(1, 1, 8)
    padded = np.pad(image[0, 0].numpy(), 3, mode="reflect")
    got = augment(image.expand(98, -1, -1, -1), torch.arange(98))[:, 0].numpy()
    for view in range(98):
        (dy, dx), flip = divmod(view // 2, 7), view % 2
        crop = padded[dy : dy + 8, dx : dx + 8]
        assert np.array_equal(got[view], crop[:, ::-1] if flip else crop), view


def test_rows_of_a_batch_get_their_own_view():
    images, augment = some_images(50, 3, 9), CropFlip(pad=2)
    view = augment.draw(50, torch.Generator().manual_seed(3))
    alone = torch.cat([augment(images[i : i + 1], view[i : i + 1]) for i in range(50)])
    assert torch.equal(augment(images, view), alone)


@pytest.mark.parametrize("augment", ENUMERABLE, ids=repr)
def test_views_are_numbered(augment):
    images = some_images(4, 1, 8)
    assert torch.equal(augment(images, torch.full((4,), augment.no_op)), images)
    drawn = augment.draw(200 * augment.views, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=augment.views)
    assert len(counts) == augment.views
    assert (counts - 200).abs().max() < 6 * 200**0.5  # six standard deviations of a uniform count


def test_compose_counts_the_last_part_fastest():
    first, last, images = jitter(1), CropFlip(pad=0), some_images(18, 1, 6)
    whole = Compose([first, last])(images, torch.arange(18))
    by_hand = last(first(images, torch.arange(18) // 2), torch.arange(18) % 2)
    assert torch.equal(whole, by_hand)


@pytest.mark.parametrize("augment", SEEDED, ids=repr)
def test_seeded_augmentations_replay_and_depend_on_the_seed_only(augment):
    images = some_images(6, 3, 12)
    view = augment.draw(6, torch.Generator().manual_seed(5))
    got = augment(images, view)
    assert augment.views is None and augment.no_op == -1
    assert got.dtype == torch.uint8 and got.shape == images.shape
    assert torch.equal(got, augment(images, view))
    assert torch.equal(got[2:3], augment(images[2:3], view[2:3]))  # whatever else is in the batch
    assert not torch.equal(got, augment(images, view + 1))


@pytest.mark.parametrize("augment", ENUMERABLE + SEEDED, ids=repr)
def test_nothing_is_read_back_to_the_host(augment):
    # Tensors on "meta" have no content: whatever asks for a value (.item(), nonzero, a mask's size) raises.
    view = augment.draw(5, torch.Generator()).to("meta")
    assert augment(some_images(5, 3, 12).to("meta"), view).shape == (5, 3, 12, 12)


def test_seeds_are_splitmix64():
    state, expected = 12345, []
    for _ in range(3):  # the published algorithm, in Python's integers
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    seed = torch.tensor([12345])
    assert [mixed(seed, k).item() % 2**64 for k in (1, 2, 3)] == expected
    assert uniforms(seed, 3)[0].tolist() == [(value >> 40) / 2**24 for value in expected]
    assert seed_of(1, 2, "order") != seed_of(1, 3, "order") != seed_of(1, 3, "view")


def test_what_cannot_be():
    for make, words in [
        (lambda: CropFlip(pad=-1), r"pad = -1: must be in \[0, 1024\]"),
        (lambda: jitter(-2), r"pixels = -2: must be in \[0, 1024\]"),
        (lambda: Compose([]), r"parts = \[\]: must be a list of one"),
        (lambda: RandAugment(magnitude=31), r"magnitude = 31: must be .*in \[0, 30\]"),
        (lambda: Cutout(size=0), r"size = 0: must be .*in \[1, 10000\]"),
        (lambda: ResizedCrop(smallest=0.0), r"smallest = 0.0: must be .*in \(0, 1\]"),
        (lambda: CropFlip(pad=8, padding="reflect")(some_images(1, 1, 8), torch.tensor([0])), "pad = 8: must be below"),
    ]:
        with pytest.raises(UserError, match=words):
            make()


def test_side_by_side_shows_each_image_in_the_view_of_every_part():
    """Weak views are those of a run without the strong ones; a view id says whose it is."""
    weak, strong, images = CropFlip(pad=1), Compose([CropFlip(pad=2), Cutout(size=3)]), some_images(6, 3, 8)
    both = SideBySide([weak, strong])
    assert both.copies == copies_of(both) == 2 and copies_of(weak) == 1
    assert both.views is None and SideBySide([weak, jitter(1)]).views == 2 * weak.views
    order, alone = (Order(6, 4, 3, copies=copies) for copies in (2, 1))
    assert order.bounds == [(0, 8), (8, 12)] and order.steps == alone.steps == 2
    place, view = order.epoch(1, both)
    rows, views = alone.epoch(1, weak)
    assert place.tolist() == [*rows[:4], *rows[:4], *rows[4:], *rows[4:]]
    assert (view % 2).tolist() == [0] * 4 + [1] * 4 + [0] * 2 + [1] * 2
    first = torch.cat([view[:4], view[8:10]]) // 2
    assert torch.equal(first, views)
    shown = both(images.index_select(0, place), view)
    assert torch.equal(torch.cat([shown[:4], shown[8:10]]), weak(images.index_select(0, rows), views))
    again = strong(images.index_select(0, place[4:8]), view[4:8] // 2)
    assert torch.equal(shown[4:8], again) and not torch.equal(shown[4:8], shown[:4])
    assert torch.equal(both(images, torch.full((6,), both.no_op)), images)
    assert SideBySide([strong, weak]).no_op == -1


def test_turned_views_show_one_crop_where_they_are_alike():
    """Four turns of an image as torch.rot90 has them; a table's view ids mean the same with draws of their own."""
    crop, images = CropFlip(pad=1), some_images(6, 3, 8)
    parts = [crop, *(Compose([crop, Turn(quarters)]) for quarters in (1, 2, 3))]
    alike, free = SideBySide(parts, alike=True), SideBySide(parts)
    assert repr(alike) == repr(free) and alike.views == free.views == 4 * crop.views
    place, view = Order(6, 6, 3, copies=4).epoch(1, alike)
    shown = alike(images.index_select(0, place), view).view(4, 6, 3, 8, 8)
    for quarters in range(4):
        assert torch.equal(shown[quarters], shown[0].rot90(quarters, (-2, -1)))
    assert not torch.equal(
        *(SideBySide(parts, alike=own).draw(24, torch.Generator().manual_seed(0)) for own in (True, False))
    )
    assert torch.equal(alike(images, torch.full((6,), alike.no_op)), images) and Turn(2).no_op == -1
    with pytest.raises(UserError, match="alike"):
        SideBySide([crop, jitter(2)], alike=True)
    with pytest.raises(UserError, match="Turn"):
        Turn(1)(images[..., :4], view[:6])


def test_turned_views_can_share_the_mirror_alone():
    """As in SSKD's cifar.py: an image is mirrored or not, turned four times, and each turn padded and cropped apart."""
    crop, images = CropFlip(pad=1), some_images(1, 3, 8)
    together = SideBySide([crop, *(Compose([crop, Turn(quarters)]) for quarters in (1, 2, 3))], alike="flip")
    drawn = together.draw(4 * 400, torch.Generator().manual_seed(0)).view(4, 400)
    assert (drawn % 4 == torch.arange(4)[:, None]).all()
    view = drawn // 4
    assert (view % 2 == view[0] % 2).all() and 0 < int((view[0] % 2).sum()) < 400
    met = [set(zip((view[0] // 2).tolist(), (other // 2).tolist(), strict=True)) for other in view[1:]]
    assert all(len(pairs) > 70 for pairs in met), "of 81 pairs of crops, were both drawn for each"
    for quarters in range(4):
        for flip in (0, 1):
            turned = (images.flip(-1) if flip else images).rot90(quarters, (-2, -1))
            padded = torch.nn.functional.pad(turned, (1,) * 4)
            theirs = {bytes(padded[0, :, y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
            ids = (torch.arange(9) * 2 + flip) * 4 + quarters
            ours = {bytes(one.flatten().tolist()) for one in together(images.expand(9, -1, -1, -1), ids)}
            assert ours == theirs
    for parts in ([crop, jitter(1)], [crop, Compose([crop, crop])]):
        with pytest.raises(UserError, match=r"^alike = flip: must be"):
            SideBySide(parts, alike="flip")


def test_an_augmentation_of_an_earlier_version_is_told_the_new_name(tmp_path, monkeypatch):
    hooks = "    views = 1\n    {} = 0\n    draw = __call__ = None\n"
    source = f"class Old:\n{hooks.format('identity')}class None_:\n    pass\nclass New:\n{hooks.format('no_op')}"
    (tmp_path / "own_augment.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"augment\._target_ = .*Old has no no_op; identity is called no_op now"):
        make_augment({"_target_": "own_augment.Old"}, "dataset.augment")
    with pytest.raises(UserError, match=r"must be the path of an aug.*None_ has no views, no_op, draw, __call__$"):
        make_augment({"_target_": "own_augment.None_"}, "dataset.augment")
    assert make_augment({"_target_": "own_augment.New"}, "dataset.augment").no_op == 0
