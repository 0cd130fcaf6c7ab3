"""Specialists: which classes, which images, which weights they start from, and what the fusion changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kdbench.data.bundle import Split
from kdbench.models.mlp import MLP
from kdbench.procedures.specialists import (
    conditional,
    confusable_classes,
    half_special,
    offset,
    relabelled,
    specialised,
)
from tests.support.procedures import MLPS, refusal, result, stages, train

WORDS = ["procedure=specialists", "procedure.specialists=2", *MLPS]


@pytest.fixture
def confused() -> torch.Tensor:
    """Predictions of a network that confuses classes 0 with 3, 1 with 4 and 5, and never 2."""
    generator = torch.Generator().manual_seed(0)
    partner = torch.eye(6)
    for group in ([0, 3], [1, 4, 5], [2]):
        for c in group:
            partner[c, group] = 1 / len(group)
    truth = torch.randint(6, (600,), generator=generator)
    return (partner[truth] + 0.05 * torch.rand(600, 6, generator=generator)).softmax(1).pow(3).softmax(1)


def test_classes_that_are_confused_come_together(confused: torch.Tensor):
    assert confusable_classes(confused, 3) == [[0, 3], [1, 4, 5], [2]]
    overlapping = confusable_classes(confused, 3, size=2)
    assert [0, 3] in overlapping and all(len(group) == 2 for group in overlapping)


def split() -> Split:
    labels = torch.tensor([0] * 10 + [1] * 30 + [2] * 20 + [3] * 40)
    return Split(torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), labels, torch.arange(100))


def test_half_of_the_images_are_special():
    half = half_special(split(), [3, 0], 4, seed=0)
    assert len(half) == 100
    special = half.labels < 2
    assert int(special.sum()) == 50 and torch.equal(half.labels[~special], torch.full((50,), 2))
    original = split().labels[half.rows]
    assert torch.equal(original[half.labels == 0].unique(), torch.tensor([3]))
    assert torch.equal(original[half.labels == 1].unique(), torch.tensor([0]))
    assert set(original[~special].tolist()) == {1, 2}
    counts = torch.bincount(half.rows[special], minlength=100)
    assert counts[original[special].new_tensor([*range(10), *range(60, 100)])].tolist() == [1] * 50
    assert not torch.equal(half.rows, half_special(split(), [3, 0], 4, seed=1).rows)


def test_the_offset_undoes_the_oversampling():
    assert offset(split(), [0]) == pytest.approx(math.log(0.9 / 0.1))
    assert offset(split(), [3, 0]) == pytest.approx(0.0)


def test_unlabelled_images_stay_unlabelled():
    unlabelled = Split(split().inputs[:3], torch.tensor([-1, 3, 1]), torch.arange(3))
    assert relabelled(unlabelled, [3], 4).labels.tolist() == [-1, 0, 1]


def test_a_specialist_starts_as_the_generalist():
    info = {"in_channels": 1, "image_size": 4}
    generalist, specialist = MLP([8], num_classes=5, **info), MLP([8], num_classes=3, **info)
    specialised(generalist, [4, 1]).apply(specialist)
    image = torch.randn(3, 1, 4, 4)
    before, after = generalist.eval()(image).logits, specialist.eval()(image).logits
    assert torch.allclose(after[:, :2], before[:, [4, 1]])
    assert torch.allclose(after[:, 2], before[:, [0, 2, 3]].mean(1) + math.log(3), atol=1e-5)


def test_conditional_accuracy_allows_the_classes_only():
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0], [9.0, 1.0, 2.0]])
    assert conditional(logits, torch.tensor([2, 2, 0]), [1, 2]) == 0.5
    assert conditional(logits, torch.tensor([0, 0, 0]), [1, 2]) is None


@pytest.mark.parametrize("words", [[], ["procedure.size=2", "procedure.top=2"]], ids=["parting", "overlapping"])
def test_the_whole(words: list[str]):
    out = train(*WORDS, *words, "procedure.epochs=1")
    found = result(out)
    figures = found["figures"]
    assert figures["changed_uncovered/test"] == figures["changed_uncovered/val"] == 0
    assert figures["generalist/test/top1"] == found["teacher"]["test/top1"]
    assert figures["fused/test/top1"] == pytest.approx(found["last"]["test/top1"])
    assert sum(row["images"] for row in found["tables"]["covering"]) == found["images"]["test"]
    groups = [row["classes"] for row in found["tables"]["specialists"]]
    assert len(stages(out)) == len(groups) and found["student"]["name"] == "fused"
    if not words:
        assert sorted(c for group in groups for c in group) == [f"class {c}" for c in range(4)]
        assert [row["specialists"] for row in found["tables"]["covering"]] == [1]
    for row, stage in zip(found["tables"]["specialists"], stages(out)):
        assert result(stage)["last"]["epoch"] == 1 and len(row["classes"]) + 1 in (2, 3, 4)


def test_the_fusion_can_teach_a_student():
    out = train(*WORDS, "procedure.distil=true", "student.hidden=[12]")
    found = result(out)
    assert found["teacher"]["name"] == "fused" and found["student"]["name"] == "mlp"
    assert found["student"] == result(stages(out)[-1])["student"]
    assert (out / "student.safetensors").exists()


def test_the_generalist_is_one_network():
    words = ["procedure=specialists", "teacher=ensemble", "teacher.network=mlp", "student=mlp"]
    message = refusal(*words)
    assert message.startswith("teacher = ensemble: must be one network, whose weights a specialist starts from")
    assert not Path("outputs").exists(), "no member was trained"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["procedure.specialists=9"], ["procedure.specialists", "9", "4"]),
        (["procedure.size=4"], ["procedure.size", "4", "3"]),
        (["procedure.top=4"], ["procedure.top", "4", "3"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*WORDS, *words)
    assert all(part in message for part in parts), message
