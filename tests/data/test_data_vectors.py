"""Vectors instead of images: normalised, trained, put into a table and a cohort, with no file of the core knowing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdbench.data.augment.views import CropFlip
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.bundle import Source, fingerprint
from kdbench.data.load import load_bundle
from kdbench.engine.device import place
from kdbench.engine.options import TrainerOptions
from kdbench.errors import UserError, under
from kdbench.models.base import example_input, flops
from kdbench.models.mlp import MLP
from kdbench.tables.file import read_header
from kdbench.types import ImageInfo, TokenInfo, VectorInfo
from tests.support.procedures import result, train
from tests.support.shell import kdbench

READER = f"{__name__}.points"


def points(**unused: object) -> Source:
    """Three classes around three corners; the last dimension is constant. Takes the options of dataset=fake."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    inputs = 4 * torch.eye(3)[labels] + torch.randn(120, 3, generator=generator)
    inputs = torch.cat([100 + inputs, torch.full((120, 1), 7.0)], 1)
    return Source(("a", "b", "c"), inputs[30:], labels[30:], inputs[:30], labels[:30])


def tokens() -> Source:
    ids = torch.arange(60).view(12, 5) % 9 + 1
    return Source(("a", "b"), ids, torch.arange(12) % 2, ids[:4], torch.arange(4) % 2, vocab_size=10)


def load(reader: str = READER, **keys):
    with under("dataset"):
        return load_bundle(name="points", reader=reader, root=None, cache="cache", **keys)


WORDS = [
    "dataset=fake", f"dataset.reader={READER}", "dataset.name=points", "dataset.channels=null", "dataset/augment=none",
    "dataset.validation=0.2", "teacher=mlp", "teacher.hidden=[16]", "student=mlp", "student.hidden=[8]",
    "schedule.epochs=3", "schedule.batch_size=16", "teacher.schedule.epochs=8", "teacher.schedule.batch_size=16",
    "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def test_vectors_are_normalised_and_what_is_resident_stays_as_it_was():
    data = load()
    assert data.info == VectorInfo(3, 4) and data.std[3] == 1.0
    before = data.train.inputs.clone()
    for batches in (EvaluationBatches(data, data.train, Loading(7)), EvaluationBatches(data, data.train, Loading(90))):
        seen = torch.cat([batch.input for batch in batches])
        torch.testing.assert_close(seen[:, :3].mean(0), torch.zeros(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(seen[:, :3].std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
        assert seen[:, 3].abs().max() < 1e-4
    assert torch.equal(before, data.train.inputs)
    batch = next(TrainingBatches(data, data.train, Loading(8, channels_last=True)).epoch(0, 1))
    expected = (data.train.inputs[batch.target.row] - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(batch.input, expected, rtol=1e-4, atol=1e-4)
    mixed = next(iter(TrainingBatches(load(mix={"kind": "mixup"}), data.train, Loading(8)).epoch(0, 1)))
    assert mixed.input.shape == (8, 4) and mixed.target.label.shape == (8, 3)


def test_token_ids_pass_as_they_are():
    data = load(f"{__name__}.tokens")
    assert data.info == TokenInfo(2, 10, 5) and data.mean == () == data.std
    batch = next(iter(EvaluationBatches(data, data.train, Loading(3))))
    assert batch.input.dtype == torch.int64 and torch.equal(batch.input, data.train.inputs[:3])


def test_the_same_bytes_of_another_type_are_other_data():
    numbers = torch.arange(12).view(3, 4)
    assert fingerprint(numbers) != fingerprint(numbers.view(torch.float64))


@pytest.mark.parametrize("info", [ImageInfo(5, 3, 8), VectorInfo(5, 7), TokenInfo(5, 30, 6)], ids=str)
def test_an_example_is_always_the_same_and_what_a_network_is_fed(info):
    assert torch.equal(info.example(3), info.example(3)) and len(info.example(3)) == 3
    assert info.example(2, "meta").is_meta and info.example(2, "meta").shape == info.example(2).shape
    assert example_input(info).is_floating_point() != isinstance(info, TokenInfo)


def test_flops_of_vectors():
    assert flops(MLP([10], num_classes=3, dimensions=4), VectorInfo(3, 4)) == 2 * (4 * 10 + 10 * 3)
    assert place(TrainerOptions(device="cpu", progress="none")).put(MLP([10], num_classes=3, dimensions=4))


def test_solo_table_and_cohort_give_the_same_student():
    live = result(train(*WORDS, "teacher.table=off", plain=True, out="live"))
    assert live["last"]["test/top1"] > 0.5 and live["teacher"]["test/top1"] > 0.5
    table = result(train(*WORDS, "teacher.table=on", plain=True, out="table"))
    assert table["student"] == live["student"] and table["teacher"]["weights"] == live["teacher"]["weights"]
    header = read_header(next(Path("outputs/teachers").rglob("*.table")))
    assert header is not None and header["shape"] == [90, 1, 3]
    folder = "hydra.sweep.dir=sweep"
    assert kdbench("train", "-m", "hydra/launcher=cohort", folder, *WORDS, "loss=kl,dkd", "teacher.table=on") == 0
    found = [json.loads(path.read_text()) for path in Path("sweep").rglob("result.json")]
    assert [run["student"] for run in found if run["choices"]["loss"] == "kl"] == [live["student"]] and len(found) == 2


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_a_network_for_other_data_is_refused_by_name(key):
    kept = [word for word in WORDS if not word.startswith(key)]
    with pytest.raises(UserError) as caught:
        train(*kept, f"{key}=resnet8", plain=True)
    said = str(caught.value)
    assert said.startswith(
        f"{key} = resnet8: must be a network for vector data (dimensions), which dataset=points holds"
    )
    assert "It takes image data (in_channels, image_size)" in said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"augment": CropFlip(1)},
            r"dataset.augment = CropFlip.*: must be null, or an augmentation for data of shape \[90, 4\]",
        ),
        ({"teacher_augment": CropFlip(1)}, "dataset.teacher_augment = CropFlip.*: must be null"),
        ({"mix": {"kind": "cutmix"}}, "dataset.mix.kind = cutmix: must be none or mixup for vectors"),
        ({"channels": 3}, "dataset.channels = 3: must be null for data that is not images"),
        ({"transfer": {"crops": 5}}, "dataset.transfer.crops = 5: must be 0 for data without images"),
        ({"transfer": {"extra": "photos"}}, "dataset.transfer.extra = photos: must be null for data without images"),
        (
            {"reader": f"{__name__}.tokens", "mix": {"kind": "mixup"}},
            "dataset.mix.kind = mixup: must be none for token ids",
        ),
        ({"reader": f"{__name__}.tokens", "mean": 0.5}, "dataset.mean = 0.5: must be null for token ids"),
        (
            {"reader": f"{__name__}.doubles"},
            r"dataset.reader = .*: must be one that gives images uint8 .* It gives torch.float64",
        ),
    ],
)
def test_what_is_for_images_alone_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load(**keys)


def doubles() -> Source:
    return points()._replace(inputs=points().inputs.double())
