"""Batches: the same (seed, epoch) is the same batches, every image once, tails, tables' view of an epoch."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as tv

from kdbench.data import batches as batching
from kdbench.data.augment.mix import CutMix, Mixup, make_mix
from kdbench.data.augment.strong import Cutout
from kdbench.data.augment.views import Compose, CropFlip, Identity
from kdbench.data.batches import EvaluationBatches, Loading, Normalise, ResidentInputs, TrainingBatches
from kdbench.data.bundle import Bundle, Split
from kdbench.data.load import load_bundle
from kdbench.data.order import Order
from kdbench.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
N = 21


def a_split(n: int = N) -> Split:
    images = torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(n)).to(torch.uint8)
    return Split(images, torch.arange(n) % 5, torch.arange(n) * 3 + 1)


def a_bundle(split: Split, augment=None, mix=None) -> Bundle:
    names = tuple("abcde")
    return Bundle(
        "tiny", names, MEAN, STD, split, split, None, split, "", len(split), augment or CropFlip(pad=2), mix=mix
    )


def batches(augment=None, split=None, batch_size=4, seed=7, mix=None, **options) -> TrainingBatches:
    split = split or a_split()
    return TrainingBatches(a_bundle(split, augment, mix), split, Loading(batch_size, seed, **options))


def evaluation(batch_size: int, **options) -> EvaluationBatches:
    return EvaluationBatches(a_bundle(a_split()), a_split(), Loading(batch_size, **options))


def flattened(epoch):
    """All tensors of an epoch."""
    return [part for batch in epoch for part in (batch.input, batch.view, *batch.target[:3])]


def same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("mix", [None, Mixup(), CutMix(), make_mix({"kind": "both"})])
@pytest.mark.parametrize("augment", [CropFlip(pad=1), Compose([CropFlip(pad=1), Cutout(size=2)])], ids=repr)
def test_a_seed_and_an_epoch_are_the_same_batches_to_the_last_bit(mix, augment):
    first, second = (batches(augment, mix=mix) for _ in range(2))
    list(second.epoch(0, 5))  # what was drawn before changes nothing
    assert same(flattened(first.epoch(3, 5)), flattened(second.epoch(3, 5)))
    assert not same(flattened(first.epoch(3, 5)), flattened(first.epoch(4, 5)))
    other = batches(augment, seed=8, mix=mix)
    assert not same(flattened(first.epoch(3, 5)), flattened(other.epoch(3, 5)))
    assert first.views == (augment.views if mix is None else None)


@pytest.mark.parametrize("ahead", [7, 8, 1000])
def test_batches_that_are_augmented_together_are_the_same(monkeypatch, ahead):
    """As on a GPU, where that saves launches."""
    options = {"mix": CutMix(), "channels_last": True}
    alone = flattened(batches(**options).epoch(2, 5))
    monkeypatch.setitem(batching.AHEAD, "cpu", ahead)
    together = flattened(batches(**options).epoch(2, 5))
    assert same(together, alone) and [t.stride() for t in together] == [t.stride() for t in alone]
    assert same(flattened(evaluation(4)), flattened(evaluation(4)))


def test_every_image_once_with_its_label_and_row():
    split = a_split()
    epoch = list(batches(Identity(), split).epoch(0, 2))
    index = torch.cat([batch.target.row for batch in epoch])
    label = torch.cat([batch.target.label for batch in epoch])
    # 21 images in fours leave one: batch-norm needs two, so it is left out.
    assert len(index) == 20 == len(set(index.tolist())) and not torch.equal(index, index.sort().values)
    local = (index - 1) // 3
    assert torch.equal(label, split.labels[local])
    image = tv.normalize(split.inputs[local].float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(torch.cat([batch.input for batch in epoch]), image, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "size", "options", "steps"),
    [
        (20, 4, {}, [4] * 5),
        (21, 4, {}, [4] * 5),
        (22, 4, {}, [4] * 5 + [2]),
        (22, 4, {"drop_last": True}, [4] * 5),
        (22, 4, {"limit_steps": 2}, [4] * 2),
        (22, 4, {"limit_steps": 9}, [4] * 5 + [2]),
        (3, 100, {}, [3]),
        (3, 1, {}, [1] * 3),
    ],
)
def test_tails(n, size, options, steps):
    made = batches(split=a_split(n), batch_size=size, **options)
    assert [len(batch.view) for batch in made.epoch(0, 1)] == steps
    assert made.steps == len(steps) and made.size == n


def test_progress():
    made = batches(split=a_split(8))
    progress = [batch.target.progress for epoch in (0, 1) for batch in made.epoch(epoch, 2)]
    assert [value.item() for value in progress] == [0, 0.25, 0.5, 0.75]
    assert progress[0].dtype == torch.float32 and progress[0].shape == ()


def test_plan_and_inputs_at_are_what_the_epoch_shows():
    made = batches()
    rows, view = made.plan(2)
    epoch = list(made.epoch(2, 5))
    assert torch.equal(rows, torch.cat([batch.target.row for batch in epoch]))
    assert torch.equal(view, torch.cat([batch.view for batch in epoch]))
    assert torch.equal(made.inputs_at(rows, view), torch.cat([batch.input for batch in epoch]))
    for row in (0, 10**6, -1):
        with pytest.raises(ValueError, match="not in this split"):
            made.inputs_at(torch.tensor([row]), torch.tensor([0]))


@pytest.mark.parametrize("mix", [None, Mixup(), CutMix(), make_mix({"kind": "both"})])
def test_a_step_reads_nothing_back_to_the_host(mix):
    # On "meta" there are no values: a step that asks for one raises.
    made = batches(device="meta", mix=mix)
    assert [batch.input.shape[0] for batch in made.epoch(0, 1)] == [4] * 5
    evaluated = list(evaluation(10, device="meta"))
    assert [batch.input.device.type for batch in evaluated] == ["meta"] * 3


def test_moved_splits_share_their_memory():
    split = a_split().to("cpu")
    first, second = batches(split=split, seed=0), batches(split=split, seed=1)
    assert isinstance(first.source, ResidentInputs) and isinstance(second.source, ResidentInputs)
    assert first.source.inputs.data_ptr() == second.source.inputs.data_ptr() == split.inputs.data_ptr()
    assert split.select(torch.arange(N)) is split


def test_layout():
    image = next(batches(channels_last=True).epoch(0, 1)).input
    assert image.dtype == torch.float32 and image.is_contiguous(memory_format=torch.channels_last)
    plain = next(batches().epoch(0, 1)).input
    assert plain.is_contiguous() and torch.equal(plain, image)


def test_mixing_makes_soft_labels():
    for batch in batches(Identity(), mix=Mixup()).epoch(0, 1):
        assert batch.target.label.shape == (4, 5) and batch.target.label.dtype == torch.float32
        torch.testing.assert_close(batch.target.label.sum(1), torch.ones(4))


def test_evaluation_is_unaugmented_and_in_order():
    split = a_split()
    made = evaluation(8)
    for _ in range(2):
        epoch = list(made)
        assert [len(batch.view) for batch in epoch] == [8, 8, 5] and made.size == N
        assert torch.equal(torch.cat([batch.target.row for batch in epoch]), split.rows)
        assert torch.equal(torch.cat([batch.target.label for batch in epoch]), split.labels)
        # The no-op view of the training augmentation gives the same image: a table can serve both.
        view = torch.cat([batch.view for batch in epoch])
        assert torch.equal(torch.cat([batch.input for batch in epoch]), batches().inputs_at(split.rows, view))


def test_what_cannot_be():
    for make, words in [
        (lambda: batches(batch_size=0), "schedule.batch_size = 0: must be 1 or more"),
        (lambda: batches(batch_size=50, drop_last=True), "schedule.batch_size = 50: must be at most 21"),
        (lambda: batches(limit_steps=0), "trainer.limit_steps = 0: must be 1 or more"),
        (lambda: evaluation(0), "trainer.eval_batch_size = 0: must be 1 or more"),
    ]:
        with pytest.raises(UserError, match=words):
            make()


@pytest.mark.parametrize("channels_last", [False, True])
def test_large_batches_are_normalised_in_parts_to_the_same_bit(channels_last):
    data = load_bundle("fake", "kdbench.data.readers.fake.fake", None, "cache", n=7, n_test=2, size=512, num_classes=2)
    whole = Normalise(data, torch.device("cpu"), channels_last)
    images = data.train.inputs
    got = whole(images)
    alone = torch.cat([whole(image[None]) for image in images])
    assert got.stride() == alone.stride()
    assert images.numel() > 2**20 and torch.equal(got, alone)
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_repeated_augmentation_shows_a_third_of_the_samples_three_times_in_their_own_views():
    order = Order(12, 4, 7, repeats=3)
    place, view = order.epoch(2, CropFlip(pad=2))
    usual = Order(12, 4, 7).epoch(2, CropFlip(pad=2))
    assert order.steps == 3 and place.tolist() == usual[0][:4].repeat_interleave(3).tolist()
    assert torch.equal(view, usual[1]) and len(view.unique()) > 6
    assert Order(10, 4, 7, repeats=3).epoch(0, CropFlip())[0].shape == (10,)


def test_a_sample_is_repeated_at_most_a_batch_long():
    assert [len(part.unique()) for part in Order(12, 4, 7, repeats=4).epoch(0, CropFlip())[0].split(4)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"schedule\.repeats = 1000000000: must be at most 4"):
        Order(12, 4, 7, repeats=10**9)
