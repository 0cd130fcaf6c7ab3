"""Content of a dataset: equal for equal data, and what differs said in words."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from kdbench.data import bundle as bundles
from kdbench.data.content import Content, differences
from kdbench.data.load import load_bundle


def made(**keys):
    options = {"n": 24, "n_test": 8, "num_classes": 3, "size": 8, "validation": 0.25}
    return load_bundle("birds", "kdbench.data.readers.fake.fake", None, "cache", **options | keys)


def test_equal_data_have_equal_content_and_it_is_json():
    first = made().content
    assert differences(first, made().content) == [] and first == made().content
    assert Content.read(json.loads(json.dumps(asdict(first)))) == first
    alone = made(validation=0).content
    assert alone.val is None and Content.read(json.loads(json.dumps(asdict(alone)))) == alone


def relabelled(data):
    labels = data.train.labels.roll(1)
    train = replace(data.train, labels=labels)
    return replace(data, train=train, transfer=train)


def other_test(data):
    return replace(data, test=replace(data.test, inputs=255 - data.test.inputs))


@pytest.mark.parametrize(
    ("keys", "change", "words"),
    [
        ({"n": 48}, None, ["birds: 24 -> 48 training images", "validation: 6 -> 12 images"]),
        ({"data_seed": 1}, None, ["birds: training images changed", "other test images"]),
        ({"n_test": 9}, None, ["test: 8 -> 9 images"]),
        ({"validation": 0}, None, ["training: 18 -> 24 images", "the validation set is gone"]),
        ({"split_seed": 1}, None, ["other training images", "other validation images"]),
        ({"subset": 12}, None, ["training: 18 -> 12 images"]),
        ({}, relabelled, ["labels changed (training)"]),
        ({}, other_test, ["other test images"]),
        ({}, lambda data: replace(data, classes=("owl", "cat", "dog")), ["birds: other class names or another order"]),
        ({}, lambda data: replace(data, classes=(*data.classes, "cow")), ["birds: 3 -> 4 classes"]),
        ({}, lambda data: replace(data, name="bees"), ["dataset birds -> bees"]),
        ({"transfer": {"omit": [0]}}, None, ["transfer: 18 -> 12 images"]),
        ({"noise": {"kind": "pairflip", "rate": 0.5}}, None, ["labels changed (training)"]),
    ],
)
def test_what_differs_is_said(keys, change, words):
    other = made(**keys)
    other = other if change is None else change(other)
    said = differences(made().content, other.content)
    assert all(any(line.startswith(word) for line in said) for word in words), said
    assert len(said) <= len(words) + 2, said


def test_a_validation_set_appears():
    assert "a validation set is there now" in differences(made(validation=0).content, made().content)


def test_training_images_are_not_read_again(monkeypatch):
    data, seen = made(), []
    real = bundles.fingerprint
    monkeypatch.setattr(bundles, "fingerprint", lambda images: seen.append(images) or real(images))
    assert data.content is data.content
    assert [len(images) for images in seen] == [8]  # the test images, once


def test_digests_tell_order_and_names_apart():
    assert bundles.digest(("ab", "c")) != bundles.digest(("a", "bc")) != bundles.digest(("bc", "a"))
    assert bundles.digest(torch.tensor([1, 2])) != bundles.digest(torch.tensor([2, 1]))
