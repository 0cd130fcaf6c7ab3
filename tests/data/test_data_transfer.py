"""The student's own training set, by counting."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from kdbench.data.load import load_bundle
from kdbench.errors import UserError, under


def load(**keys):
    options = {"n": 100, "num_classes": 10, "size": 8, "n_test": 10} | keys
    with under("dataset"):
        return load_bundle(name="fake", reader="kdbench.data.readers.fake.fake", root="data", cache="cache", **options)


def counts(split) -> list[int]:
    return torch.bincount(split.labels[split.labels >= 0], minlength=10).tolist()


def test_nothing_set_is_the_same_object():
    bundle = load(transfer={"fraction": None, "per_class": None, "classes": None, "omit": None, "only": None})
    assert bundle.transfer is bundle.train


@pytest.mark.parametrize(
    ("transfer", "expected"),
    [
        ({"per_class": 0.5}, [5] * 10),
        ({"per_class": 3}, [3] * 10),
        ({"per_class": 0.01}, [1] * 10),
        ({"omit": [3]}, [10] * 3 + [0] + [10] * 6),
        ({"only": [7, "class 8"]}, [0] * 7 + [10, 10, 0]),
        ({"classes": [1, 2], "omit": [2]}, [0, 10] + [0] * 8),
        ({"classes": [4], "per_class": 0.2}, [0] * 4 + [2] + [0] * 5),
    ],
)
def test_what_the_student_sees(transfer, expected):
    bundle = load(transfer=transfer)
    assert counts(bundle.transfer) == expected and counts(bundle.train) == [10] * 10
    assert torch.equal(bundle.transfer.inputs, bundle.train.inputs[bundle.transfer.rows])


def test_shares_of_images_and_classes():
    assert len(load(transfer={"fraction": 0.3}).transfer) == 30
    half = counts(load(transfer={"classes": 0.5}).transfer)
    assert sorted(half) == [0] * 5 + [10] * 5
    assert half != counts(load(transfer={"classes": 0.5, "seed": 1}).transfer)
    few, more = (set(load(transfer={"per_class": n}).transfer.rows.tolist()) for n in (2, 5))
    assert few < more


def test_unlabelled_extras(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 12), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    bundle = load(transfer={"extra": str(tmp_path), "crops": 5, "noise_images": 4, "per_class": 2})
    extra = bundle.transfer
    assert extra.labels[20:].tolist() == [-1] * 12 and extra.rows[20:].tolist() == list(range(100, 112))
    assert extra.inputs.shape == (32, 3, 8, 8) and bundle.num_rows == 112 and bundle.train.rows.max() == 99
    assert extra.inputs[20:23, 0].float().mean((1, 2)).tolist() == [0, 80, 160]
    assert extra.inputs[28:].float().std() > 10
    again = load(transfer={"extra": str(tmp_path), "crops": 5, "noise_images": 4, "per_class": 2})
    assert torch.equal(again.transfer.inputs, extra.inputs) and again.fingerprint == bundle.fingerprint
    other = load(transfer={"crops": 5})
    assert len({bundle.fingerprint, other.fingerprint, load().fingerprint}) == 3


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        ({"fraction": 0}, r"dataset.transfer.fraction = 0: must be .* in \(0, 1\]"),
        ({"fraction": 0.01}, "dataset.transfer: it leaves 1 images to train on, and 2 are the least"),
        ({"per_class": 11}, "dataset.transfer.per_class = 11.*: must be at most 10"),
        ({"per_class": -1}, "dataset.transfer.per_class = -1: must be"),
        ({"classes": 1.5}, r"dataset.transfer.classes = 1.5: must be in \(0, 1\]"),
        ({"classes": ["x"]}, r"dataset.transfer.classes\[0\] = x: must be a class"),
        ({"only": [3], "omit": [3]}, r"dataset.transfer.omit = \[3\]: must be what leaves a class"),
        ({"omit": 3}, "dataset.transfer.omit = 3: must be a list, each "),
        ({"crops": -1}, "dataset.transfer.crops = -1: must be at least 0"),
        ({"extra": "nowhere"}, "dataset.transfer.extra = nowhere: must be a folder of images. There is no folder"),
        ({"share": 1}, "dataset.transfer.share: there is no such key. .*Keys of dataset.transfer: classes, crops"),
    ],
)
def test_what_cannot_be(transfer, words):
    with pytest.raises(UserError, match=words):
        load(transfer=transfer)
