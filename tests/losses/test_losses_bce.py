"""Binary cross-entropy against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.loss import BinaryCrossEntropy

from kdbench.losses.bce import BCE
from kdbench.types import Outputs, Target


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_is_timms(threshold, sum_classes, mixed):
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 7, generator=draw)
    label = torch.randn(5, 7, generator=draw).softmax(1) if mixed else torch.tensor([0, 6, 3, 3, 1])
    theirs = BinaryCrossEntropy(0.0 if mixed else 0.1, threshold, sum_classes=sum_classes)
    ours = BCE({"task": 1.0}, 0.0 if mixed else 0.1, threshold, sum_classes)
    values = []
    for loss in (lambda s: theirs(s, label), lambda s: ours(Outputs(s, {}), None, Target(label, label, label)).total):
        student = logits.clone().requires_grad_()
        value = loss(student)
        value.backward()
        values.append((value.detach(), student.grad))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)


def test_rows_without_a_label_do_not_count():
    logits, label = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1, -1, 2])
    both, some = (
        BCE({"task": 1.0}, 0.1)(Outputs(logits[rows], {}), None, Target(label[rows], label[rows], label)).total
        for rows in ([0, 1, 2], [0, 2])
    )
    assert torch.equal(both, some) and both > 0
