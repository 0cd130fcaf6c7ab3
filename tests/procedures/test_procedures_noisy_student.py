"""Noisy student: which labels are known, which images are trusted, and what the student is told."""

from __future__ import annotations

import pytest
import torch

from kdbench.data.bundle import Bundle, Split
from kdbench.data.unlabelled import make_pool, trusted
from kdbench.teachers.constant import ConstantTeacher
from kdbench.types import Batch, Target
from tests.support.procedures import MLPS, refusal, result, stages, train

WORDS = ["procedure=noisy_student", "procedure.iterations=2", "procedure.labelled=0.25", *MLPS]


def bundle(extras: int = 0, clean: torch.Tensor | None = None) -> Bundle:
    images = torch.zeros(40, 1, 2, 2, dtype=torch.uint8)
    train = Split(images, torch.arange(40) % 4, torch.arange(40), clean)
    labels = torch.cat([train.labels, torch.full((extras,), -1)])
    transfer = Split(torch.zeros(40 + extras, 1, 2, 2, dtype=torch.uint8), labels, torch.arange(40 + extras))
    return Bundle("made", tuple("abcd"), (0.5,), (0.5,), train, transfer, None, train, "", 40 + extras)


def test_labels_are_hidden_but_for_a_stratified_share():
    pool = make_pool(bundle(), 0.2, seed=0)
    assert torch.bincount(pool.labelled.labels).tolist() == [2, 2, 2, 2]
    assert pool.unlabelled.labels.eq(-1).all() and len(pool.unlabelled) == 32
    assert torch.equal(pool.truth, pool.unlabelled.rows % 4)
    assert set(pool.labelled.rows.tolist()).isdisjoint(pool.unlabelled.rows.tolist())
    assert not torch.equal(make_pool(bundle(), 0.2, seed=1).labelled.rows, pool.labelled.rows)


def test_extra_images_are_in_the_pool():
    pool = make_pool(bundle(extras=5), None, seed=0)
    assert len(pool.labelled) == 40 and pool.unlabelled.rows.tolist() == [40, 41, 42, 43, 44]
    assert pool.truth.tolist() == [-1] * 5
    assert len(make_pool(bundle(extras=5), 0.5, seed=0).unlabelled) == 25


def test_the_truth_is_the_clean_label():
    clean = (torch.arange(40) + 1) % 4
    pool = make_pool(bundle(clean=clean), 0.2, seed=0)
    assert torch.equal(pool.truth, (pool.unlabelled.rows + 1) % 4)


def test_trust():
    p = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.2, 0.8, 0], [0.7, 0.3, 0], [0.1, 0.5, 0.4]])
    assert trusted(p, 0.0, None).tolist() == [0, 1, 2, 3, 4]
    assert trusted(p, 0.65, None).tolist() == [0, 2, 3]
    assert trusted(p, 0.0, 2).tolist() == [0, 2, 3, 4]
    assert trusted(p, 0.65, 3).tolist() == [0, 0, 2, 2, 2, 3]
    assert trusted(p, 0.95, 3).tolist() == []


def test_a_fixed_teacher_answers_by_row_whatever_the_view():
    table = torch.randn(6, 3)
    target = Target(torch.zeros(4, dtype=torch.int64), torch.tensor([5, 0, 0, 2]), torch.zeros(()))
    answers = [ConstantTeacher(table)(Batch(torch.randn(4, 1, 2, 2), view, target)).logits for view in torch.arange(2)]
    assert torch.equal(answers[0], table[[5, 0, 0, 2]]) and torch.equal(*answers)


def test_each_student_labels_for_the_next():
    out = train(*WORDS, "procedure.students=[mlp,resnet8]", "procedure.labels=hard")
    first, second = (result(stage) for stage in stages(out))
    assert second["teacher"]["weights"] == first["student"]["weights"] and second["student"]["name"] == "resnet8"
    rows = result(out)["tables"]["pseudo_labels"]
    assert [row["images"] for row in rows] == [36, 36] and result(out)["figures"]["labelled_images"] == 12
    assert first["images"]["train"] == 48
    assert rows[1]["right"] == pytest.approx(round(rows[1]["right"] * 36) / 36)


def test_the_teacher_knows_the_labelled_images_only():
    out = train(*WORDS, "procedure.iterations=1")
    teacher = result(result(out)["teacher"]["folder"])
    assert teacher["images"]["train"] == 12


def test_hard_labels_can_stand_alone_and_balance():
    words = [*WORDS, "procedure.iterations=1", "procedure.labels=hard", "procedure.per_class=5", "loss=ce"]
    found = result(train(*words))
    row = found["tables"]["pseudo_labels"][0]
    assert row["images"] % 5 == 0 and found["images"]["train"] == 12 + row["images"]
    assert found["formula"] == "CE(y, s)"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["loss=ce"], ["loss", "ce", "hard"]),
        (["procedure.labelled=null"], ["procedure.labelled", "dataset.transfer.extra"]),
        (["procedure.threshold=1"], ["procedure.threshold", "[0, 1)"]),
        (["procedure.students=[mlp]"], ["procedure.students", "2 networks"]),
        (["dataset.mix.kind=mixup"], ["dataset.mix"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*WORDS, *words)
    assert all(part in message for part in parts), message


def test_a_student_that_guesses_may_not_teach_but_may_be_the_result():
    words = [*WORDS, "teacher.allow_chance=false", "teacher.schedule.epochs=40", "schedule.lr=0"]
    message = refusal(*words)
    assert "no better than guessing (25.00 %)" in message and "train it longer (schedule.epochs)" in message
    folder = train(*words, "procedure.iterations=1", out="one")
    assert result(folder)["last"]["test/top1"] < 0.4
