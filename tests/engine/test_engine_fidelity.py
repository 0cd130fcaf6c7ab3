"""Distances between a student's and a teacher's logits, by hand."""

from __future__ import annotations

import pytest
import torch

from kdbench.engine.fidelity import fidelity, top_logit_difference


def test_by_hand():
    student = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    teacher = torch.tensor([[0.0, 0.0, 4.0], [3.0, 4.0, 5.0]])
    label = torch.tensor([0, 1])
    assert top_logit_difference(student, label).tolist() == [3.0, -1.0]
    got = fidelity(student, teacher, label)
    assert got["logit_distance"] == pytest.approx((5 + 27**0.5) / 2)
    assert got["logit_shift"] == pytest.approx((1 / 3 + 3) / 2)
    assert got["tld"] == pytest.approx(1.0) and got["teacher_tld"] == pytest.approx((-4 - 1) / 2)
    assert got["teacher_top1"] == 0.0
