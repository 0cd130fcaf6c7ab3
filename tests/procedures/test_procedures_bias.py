"""The bias of classes that the student never saw: how it is chosen, and what it changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from kdbench.procedures.bias_correction import accuracy_offset, prior_offset
from kdbench.results.predictions import read_predictions
from tests.support.procedures import MLPS, refusal, result, stages, train

WORDS = ["procedure=bias_correction", "dataset.transfer.omit=[3]", *MLPS]


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


def corrected(logits: torch.Tensor, missing: list[int], offset: float) -> torch.Tensor:
    moved = logits.double().clone()
    moved[:, missing] += offset
    return moved


@pytest.mark.parametrize(("missing", "share"), [([3], 0.1), ([3], 0.7), ([0, 1, 4], 0.8)])
def test_the_prior_is_met(logits: torch.Tensor, missing: list[int], share: float):
    offset = prior_offset(logits, missing, share)
    assert corrected(logits, missing, offset).softmax(1)[:, missing].sum(1).mean().item() == pytest.approx(
        share, abs=1e-9
    )


@pytest.mark.parametrize("missing", [[3], [0, 1, 4]])
def test_no_offset_is_more_accurate(logits: torch.Tensor, missing: list[int]):
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(1))
    logits[torch.arange(200), labels] += 2.0
    logits[:, missing] -= 4.0

    def accuracy(offset: float) -> float:
        return (corrected(logits, missing, offset).argmax(1) == labels).float().mean().item()

    found = accuracy(accuracy_offset(logits, labels, missing))
    grid = [accuracy(offset) for offset in torch.linspace(-20, 20, 2001).tolist()]
    assert found >= max(grid) - 1e-6 and found > accuracy(0.0)


def test_nothing_to_gain_means_no_large_correction(logits: torch.Tensor):
    labels = logits.argmax(1)
    assert (corrected(logits, [2], accuracy_offset(logits, labels, [2])).argmax(1) == labels).all()


@pytest.mark.parametrize("by", ["prior", "accuracy"])
def test_the_result_is_the_corrected_student(by: str):
    out = train(*WORDS, f"procedure.by={by}")
    plain, moved = (load_file(stage / "student.safetensors") for stage in stages(out))
    found = result(out)
    offset, figures = found["figures"]["offset"], found["figures"]
    difference = (moved["fc.bias"] - plain["fc.bias"]).tolist()
    assert difference == pytest.approx([0, 0, 0, offset], abs=1e-5)
    assert all(moved[key].equal(plain[key]) for key in plain if key != "fc.bias")
    assert found["last"]["test/top1"] == pytest.approx(figures["after/test/top1"])
    assert result(stages(out)[0])["last"]["test/top1"] == pytest.approx(figures["before/test/top1"])
    assert found["tables"]["missing"] == [{"class": "class 3", "offset": offset}]
    kept = read_predictions(out)  # of the corrected student, which no stage trained
    assert kept is not None and (kept.answer == kept.label).mean() == pytest.approx(found["last"]["test/top1"])
    assert found["images"]["train"] == 36 and "test/agreement" in found["last"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["dataset.transfer.omit=null"], ["dataset.transfer.omit"]),
        (["procedure.by=accuracy", "dataset.validation=0"], ["dataset.validation", "procedure.by"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*WORDS, *words)
    assert all(part in message for part in parts), message
