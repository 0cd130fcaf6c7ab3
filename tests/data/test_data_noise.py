"""Label noise, by counting."""

from __future__ import annotations

import pytest
import torch

from kdbench.data.load import load_bundle
from kdbench.data.noise import flipped, make_noise
from kdbench.errors import UserError, under

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES = tuple("abcde")
LABELS = torch.arange(5).repeat(200)  # 200 of each class


def load(**keys):
    options = {"n": 100, "num_classes": 10, "size": 8, "n_test": 10} | keys
    with under("dataset"):
        return load_bundle(name="fake", reader="kdbench.data.readers.fake.fake", root="data", cache="cache", **options)


def transition(noisy: torch.Tensor, labels: torch.Tensor = LABELS, classes: int = 5) -> torch.Tensor:
    """[true, given] counts."""
    return torch.bincount(labels * classes + noisy, minlength=classes**2).view(classes, classes)


@pytest.mark.parametrize("rate", [0.2, 0.4, 1.0])
def test_symmetric_noise_is_exact_for_each_class_and_even(rate):
    table = transition(flipped(LABELS, NAMES, "symmetric", rate, seed=0))
    assert table.diagonal().tolist() == [200 - round(200 * rate)] * 5
    expected = 200 * rate / 4  # of each wrong class
    off = table[~torch.eye(5, dtype=torch.bool)]
    assert (off - expected).abs().max() < 4.5 * expected**0.5


def test_any_class_also_draws_the_right_one():
    table = transition(flipped(LABELS, NAMES, "symmetric", 1.0, seed=0, any_class=True))
    assert (table - 40).abs().max() < 4.5 * 40**0.5


def test_pairflip_takes_the_next_class():
    table = transition(flipped(LABELS, NAMES, "pairflip", 0.45, seed=0))
    assert torch.equal(table, 110 * torch.eye(5, dtype=torch.int64) + 90 * torch.eye(5, dtype=torch.int64).roll(1, 1))


def test_asymmetric_noise_is_cifars_mistakes():
    labels = torch.arange(10).repeat(50)
    table = transition(flipped(labels, CIFAR10, "asymmetric", 0.4, seed=0), labels, 10)
    wrong = {(CIFAR10[i], CIFAR10[j]): int(n) for i, row in enumerate(table) for j, n in enumerate(row) if n and i != j}
    pairs = ["truck automobile", "bird airplane", "deer horse", "cat dog", "dog cat"]
    assert wrong == {tuple(pair.split()): 20 for pair in pairs}
    pairflip = flipped(LABELS, NAMES, "pairflip", 0.4, seed=0)
    assert torch.equal(flipped(LABELS, NAMES, "asymmetric", 0.4, seed=0), pairflip)


def test_noise_is_a_function_of_the_seed_and_grows_with_the_rate():
    few, more = (flipped(LABELS, NAMES, "symmetric", rate, seed=3) for rate in (0.2, 0.5))
    assert torch.equal(few, flipped(LABELS, NAMES, "symmetric", 0.2, seed=3))
    assert not torch.equal(few, flipped(LABELS, NAMES, "symmetric", 0.2, seed=4))
    changed = few != LABELS
    assert torch.equal(more[changed], few[changed])
    odd = flipped(torch.zeros(7, dtype=torch.int64), NAMES, "pairflip", 0.5, seed=0)
    assert int((odd != 0).sum()) == 4  # floor(3.5 + 1/2)


@pytest.mark.parametrize("whom", ["both", "teacher", "student"])
def test_who_trains_on_the_noise(whom):
    noise = {"kind": "symmetric", "rate": 0.5, "for": whom}
    bundle, clean = load(noise=noise, validation=0.2), load(validation=0.2)
    for split, is_noisy in ((bundle.train, whom != "student"), (bundle.transfer, whom != "teacher")):
        assert (split.clean is not None) == is_noisy
        assert torch.equal(split.labels if split.clean is None else split.clean, clean.train.labels)
        assert torch.equal(split.labels, clean.train.labels) != is_noisy
    assert torch.equal(bundle.val.labels, clean.val.labels) and torch.equal(bundle.test.labels, clean.test.labels)
    assert (bundle.train is bundle.transfer) == (whom == "both")
    assert bundle.train.inputs is bundle.transfer.inputs  # labels differ, memory does not


def test_noise_stays_with_the_row():
    noise = {"kind": "symmetric", "rate": 0.4}
    whole, part = load(noise=noise).train, load(noise=noise, subset=0.5, validation=0.1).train
    assert torch.equal(part.labels, whole.labels[part.rows])


def test_noise_options():
    for options, words in [
        ({"kind": "salt"}, "dataset.noise.kind = salt: must be one of none, symmetric"),
        ({"rate": 0.5}, "dataset.noise.kind = none: must be symmetric"),  # a rate that would be left aside
        ({"rate": 1.5}, r"dataset.noise.rate = 1.5: must be in \[0, 1\]"),
        ({"for": "me"}, "dataset.noise.for = me: must be one of both, teacher, student"),
        ({"level": 1}, "dataset.noise.level: there is no such key. Keys of dataset.noise: any_class, for, kind"),
    ]:
        with pytest.raises(UserError, match=words):
            make_noise(LABELS, NAMES, options)
    assert make_noise(LABELS, NAMES, {"rate": 0.0})[0] is LABELS
