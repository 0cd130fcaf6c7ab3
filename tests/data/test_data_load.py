"""Splits, subsets, normalisation, channels: what load_bundle makes of a dataset's keys."""

from __future__ import annotations

import pytest
import torch

from kdbench.data.augment.views import CropFlip, Identity, jitter
from kdbench.data.bundle import Source, fingerprint, statistics
from kdbench.data.load import load_bundle
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError, under

HERE = "test_data_load"


def uneven(n: int = 100) -> Source:
    """n images of three classes with 60, 30 and 10 % of them; the pixel values say the row."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2]).repeat(n // 10)
    return Source(("cat", "dog", "owl"), images, labels, images[:10] + 100, labels[:10])


def load(reader: str = f"{HERE}.uneven", **keys):
    with under("dataset"):
        return load_bundle(name="uneven", reader=reader, root="data", cache="cache", **keys)


def fake(**keys):
    return load("kdbench.data.readers.fake.fake", **keys)


def counts(split) -> list[int]:
    return torch.bincount(split.labels, minlength=3).tolist()


@pytest.mark.parametrize(("validation", "expected"), [(0.1, [6, 3, 1]), (20, [12, 6, 2]), (0.25, [15, 8, 2])])
def test_validation_is_stratified_and_apart(validation, expected):
    bundle = load(validation=validation)
    assert counts(bundle.val) == expected
    assert sorted(torch.cat([bundle.train.rows, bundle.val.rows]).tolist()) == list(range(100))
    for split in (bundle.train, bundle.val):  # index is the original row
        assert torch.equal(split.inputs[:, 0, 0, 0].long(), split.rows)
    again, other = load(validation=validation), load(validation=validation, split_seed=1)
    assert torch.equal(again.val.rows, bundle.val.rows) and not torch.equal(other.val.rows, bundle.val.rows)
    assert bundle.test.rows.tolist() == [-1] * 10


def test_subsets_are_stratified_nested_and_never_validation():
    small, large = load(subset=0.1, validation=0.2), load(subset=40, validation=0.2)
    assert counts(small.train) == [5, 2, 1] and counts(large.train) == [24, 12, 4]
    assert set(small.train.rows.tolist()) < set(large.train.rows.tolist())
    assert not set(large.train.rows.tolist()) & set(large.val.rows.tolist())
    assert torch.equal(small.val.rows, large.val.rows)
    assert len(load(subset=1).train) == len(load(subset=1.0).train) == 100


def test_classes_are_kept_in_training_only():
    bundle = load(classes=["owl", 0], validation=0.1)
    assert counts(bundle.train) == [54, 0, 9] and counts(bundle.val) == [6, 3, 1] and counts(bundle.test) == [6, 3, 1]
    assert bundle.info.num_classes == 3
    assert counts(load(classes=["1", 2]).train) == [0, 30, 10]  # as a command line may bring it


def test_digits_are_the_default_splits():
    bundle = load("kdbench.data.readers.digits.digits", validation=0.1)
    assert (len(bundle.train), len(bundle.val), len(bundle.test)) == (1294, 143, 360)
    assert bundle.info == (10, 1, 8) and bundle.transfer is bundle.train and bundle.num_rows == 1437
    assert bundle.train.inputs.dtype == torch.uint8 and bundle.train.inputs.max() == 255
    for split in (bundle.train, bundle.val, bundle.test):
        share = torch.bincount(split.labels) / len(split)
        assert (share - 0.1).abs().max() < 0.012


def test_mean_and_std_are_exact_or_given():
    bundle = fake(n=50, size=8)
    pixels = bundle.train.inputs.double() / 255
    for channel in range(3):
        assert bundle.mean[channel] == pytest.approx(pixels[:, channel].mean().item(), abs=1e-6)
        assert bundle.std[channel] == pytest.approx(pixels[:, channel].std(correction=0).item(), abs=1e-6)
    given = fake(n=50, size=8, mean=[0.5], std=0.25)
    assert given.mean == (0.5,) * 3 and given.std == (0.25,) * 3
    assert statistics(torch.zeros((2, 1, 2, 2), dtype=torch.uint8)) == ((0.0,), (0.001,))  # nothing to divide by


def test_statistics_do_not_depend_on_the_split():
    assert load(validation=0.3, subset=0.5).mean == load().mean


def test_channels():
    gray = load("kdbench.data.readers.digits.digits", channels=3)
    one = load("kdbench.data.readers.digits.digits")
    assert gray.info.in_channels == 3 and torch.equal(gray.train.inputs[:, 1:2], one.train.inputs)
    assert len(gray.mean) == 3 and gray.fingerprint != one.fingerprint
    luma = load(channels=1)
    assert luma.info.in_channels == 1 and torch.equal(luma.train.inputs, load().train.inputs[:, :1])


def test_fingerprint_is_of_the_images():
    plain = load().fingerprint
    noise = {"kind": "symmetric", "rate": 0.5}
    assert plain == load(validation=0.1, subset=0.5, noise=noise, classes=[0, 1]).fingerprint
    images = uneven().inputs
    assert plain == fingerprint(images) != fingerprint(images.flip(0)) != fingerprint(images.reshape(-1, 3, 2, 8))


def test_fake_images_can_be_learnt_and_replay():
    bundle, again, other = fake(n=200, n_test=100), fake(n=200, n_test=100), fake(n=200, data_seed=1)
    assert torch.equal(bundle.train.inputs, again.train.inputs)
    assert not torch.equal(bundle.train.inputs, other.train.inputs)
    centre = torch.stack([bundle.train.inputs[bundle.train.labels == k].float().mean(0) for k in range(10)])
    distance = torch.cdist(bundle.test.inputs.float().flatten(1), centre.flatten(1))
    assert (distance.argmin(1) == bundle.test.labels).float().mean() > 0.95
    assert fake(n=20, num_classes=2, size=12, channels=1).info == (2, 1, 12)


def test_teachers_own_augmentation():
    bundle = load(augment=jitter(2), teacher_augment=CropFlip(), mix={"kind": "mixup"})
    assert (bundle.augment, bundle.teacher_augment) == (jitter(2), CropFlip())
    teacher = bundle.for_teacher()
    assert teacher.augment == CropFlip() and teacher.mix is None and teacher.train is bundle.train
    assert load(augment=jitter(2)).teacher_augment == jitter(2) and load().augment == Identity()


def test_stratified_counts():
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 3)
    for count in range(1, 16):
        rows = stratified(labels, count, order_keys(15, 0))
        got = torch.bincount(labels[rows], minlength=3).double()
        assert len(rows) == count == len(set(rows.tolist()))
        assert (got - count * torch.tensor([7, 5, 3]) / 15).abs().max() < 1
    assert count_of(0.29, 100, "x", whole=False) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"validation": 1.0}, r"dataset.validation = 1.0: must be a share in \[0, 1\) or a count from 2 to 99"),
        ({"validation": 100}, "dataset.validation = 100.0: must be below 100, to leave samples to train on"),
        ({"validation": -0.1}, "dataset.validation = .*: must be"),
        ({"validation": 2.5}, "dataset.validation = .*: must be"),
        ({"validation": float("nan")}, "dataset.validation = .*: must be"),
        ({"validation": 0.001}, "dataset.validation = 0.001: must be at least one of the 100 samples"),
        ({"subset": 0}, r"dataset.subset = 0.0: must be a share in \(0, 1\]"),
        ({"subset": 101}, "dataset.subset = 101.0: must be at most 100, all that there are"),
        ({"subset": 0.01}, "dataset.subset = 0.01: must be what leaves at least 2 images to train on: it leaves 1"),
        ({"classes": []}, "dataset.classes = .*: must be a list of two classes or more"),
        (
            {"classes": ["dog", "cow"]},
            r"dataset.classes\[1\] = cow: must be a class: its name \(cat, dog, owl\) or its number, up to 2",
        ),
        ({"classes": [0, 3]}, r"dataset.classes\[1\] = 3: must be a class"),
        ({"classes": [0]}, r"dataset.classes = \[0\]: must be a list of two classes or more"),
        ({"classes": [0, "cat"]}, r"dataset.classes = \[0, cat\]: must be a list of two classes or more"),
        ({"classes": [True, 0]}, r"dataset.classes\[0\] = true: must be"),
        ({"channels": 2}, "dataset.channels = 2: must be one of 1, 3"),
        ({"mean": [0.5, 0.5]}, r"dataset.mean = \[0.5, 0.5\]: must be 3 number\(s\)"),
        ({"std": 0.0}, r"dataset.std = 0.0: must be .*in \(0, 1e\+06\]"),
        ({"std": float("inf")}, "dataset.std = .*: must be"),
        ({"std": float("nan")}, "dataset.std = .*: must be"),
        ({"mean": 123.68}, r"dataset.mean = 123.68: must be 3 number\(s\) in \[0, 1\]"),
        ({"mean": float("inf")}, "dataset.mean = .*: must be"),
        ({"validation": float("inf")}, "dataset.validation = .*: must be"),
        ({"subset": float("inf")}, "dataset.subset = .*: must be"),
        ({"transfer": {"per_class": float("inf")}}, "dataset.transfer.per_class = inf: must be"),
        ({"noise": {"rate": 0.5}}, "dataset.noise.kind = none: must be symmetric"),
        ({"augment": "crop"}, "dataset.augment = crop: must be null or the _target_"),
        ({"workers": -1}, r"dataset.workers = -1: must be .*in \[0, 1024\]"),
        ({"size": 3}, r"dataset.size: there is no such key. .*Keys of dataset: augment, cache, .*, mix, n, name"),
        ({"n": "many"}, "dataset.n = many: must be a whole number"),
        ({"reader": "kdbench.nowhere.read"}, "dataset.reader = kdbench.nowhere.read: kdbench has no nowhere"),
        ({"reader": "digits"}, "dataset.reader = digits: must be the dotted path of a class or function"),
    ],
)
def test_what_cannot_be(keys, words):
    with pytest.raises(UserError, match=words):
        load(**keys)


@pytest.mark.parametrize("key", ["n", "n_test", "num_classes", "size"])
def test_fake_options_have_limits(key):
    with pytest.raises(UserError, match=f"dataset.{key} = 0: must be"):
        fake(**{key: 0})
    with pytest.raises(UserError, match=r"dataset.contrast = 2.0: must be in \(0, 1\]"):
        fake(contrast=2.0)
