"""WKD's costs of the classes from the teacher's maps: linear CKA, in bounded memory, against its authors' code."""

from __future__ import annotations

import gc
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from kdbench.errors import UserError
from kdbench.losses import wkd
from kdbench.runs.stage import places_in_turn
from tests.support.losses import C, batch, build


class InTurn(NamedTuple):
    """Maps of a training set as wkd asks for them, some at a time."""

    values: torch.Tensor
    label: torch.Tensor
    size: int

    def __iter__(self):
        return zip(self.values.split(self.size), self.label.split(self.size), strict=True)

    def in_turn(self, classes: int):
        places = places_in_turn(self.label, classes)
        return iter(InTurn(self.values[places], self.label[places], self.size)) if len(places) else iter(())


def surveyed(seen: InTurn, classes: int = C) -> torch.Tensor:
    """The costs that wkd makes of a map, neither sharpened nor cut."""
    student, teacher, _ = batch(0)
    teacher.features["stage3"] = seen.values[:1].expand(len(teacher.logits), *seen.values.shape[1:])
    teacher.features["map"] = teacher.features["stage3"].relu()  # a wide ResNet's: not what is compared
    loss = build("wkd", cost="cka", sharpen=0.0)
    loss.attach(None, None)
    loss.setup(student._replace(logits=torch.zeros(2, classes)), teacher)
    assert loss.surveyed == "stage3"
    loss.survey(seen)
    return loss.costs


def test_wkd_s_costs_are_one_minus_linear_cka_of_the_classes_maps():
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) by centred Gram matrices; the code multiplies features instead."""
    random = torch.Generator().manual_seed(0)
    label = torch.cat([torch.arange(C).repeat(3), torch.tensor([-1, 0, 0])])
    label = label[torch.randperm(len(label), generator=random)]
    values = torch.randn(len(label), 5, 2, 3, generator=random, dtype=torch.float64) + 1
    found = surveyed(InTurn(values, label, 7)).numpy()
    rows = values.permute(0, 2, 3, 1).numpy()
    members = [rows[(label == k).numpy()][:3].reshape(18, 5) for k in range(C)]
    centre = np.eye(18) - 1 / 18
    grams = [centre @ x @ x.T @ centre for x in members]
    for i in range(C):
        for j in range(C):
            hsic, own, other = (np.trace(a @ b) for a, b in ((grams[i], grams[j]), (grams[i],) * 2, (grams[j],) * 2))
            assert found[i, j] == pytest.approx(max(1 - hsic / math.sqrt(own * other), 0) + 1e-8, rel=1e-9, abs=1e-12)


# 1 - linear CKA of the maps below in its authors' code (JiamingLv/WKD, tools/generate_cost_matrix.py, float64)
DISTANCES = [
    [0.0, 0.843379572068, 0.819246211282, 0.9062165711], [0.843379572068, 0.0, 0.907019676736, 0.749129097202],
    [0.819246211282, 0.907019676736, 0.0, 0.732581498515], [0.9062165711, 0.749129097202, 0.732581498515, 0.0],
]  # fmt: skip


@pytest.mark.parametrize("held", [1, 120, wkd.HELD])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_wkd_s_costs_are_the_authors_in_one_pass_or_several(held, dtype, digits, monkeypatch):
    monkeypatch.setattr(wkd, "HELD", held)
    assert len(wkd.blocks(4, 5)) == {1: 4, 120: 3}.get(held, 1)
    i = torch.arange(12 * 30, dtype=torch.float64)
    values = (torch.sin(0.9 * i**1.5 + 0.4) + 0.5).reshape(12, 5, 2, 3).to(dtype)
    found = surveyed(InTurn(values, torch.tensor([2, 0, 1, 3, 1, 1, 0, 2, 3, 0, 3, 2]), 5), 4)
    torch.testing.assert_close(found, torch.tensor(DISTANCES, dtype=dtype) + 1e-8, rtol=0, atol=digits)


def test_what_wkd_holds_does_not_grow_with_the_training_set():
    """The last stage of 50,000 images, 8 x 8 x 256, is 3.3 GB."""
    held = []

    class Endless(InTurn):
        def in_turn(self, classes: int):
            before = numbers_alive()
            for first in range(0, self.size, 30):
                yield torch.randn(30, 6, 4, 4), torch.arange(first, first + 30) % classes
            held.append(numbers_alive() - before)

    for images in (210, 2100):
        surveyed(Endless(torch.zeros(1, 6, 4, 4), torch.zeros(1), images))
    products, shown = (6 * C) ** 2, 30 * 6 * 16  # what is summed, and a batch
    assert held[0] == held[1] < products + 5 * shown


def numbers_alive() -> int:
    """In all tensors that Python knows of."""
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) // 4


def test_wkd_s_costs_that_would_take_days_are_refused_before_any_work():
    student, teacher, _ = batch(0)
    teacher.features["stage3"] = torch.zeros(2, 512, 1, 1)
    loss = build("wkd", cost="cka")
    with pytest.raises(UserError, match=r"^cost = cka: .* passes of the teacher for 1000 classes and 512 channels"):
        loss.setup(student._replace(logits=torch.zeros(2, 1000)), teacher)


def test_wkd_s_costs_of_maps_that_tell_nothing():
    label = torch.arange(2 * C) % C
    assert torch.allclose(surveyed(InTurn(torch.ones(2 * C, 5, 2, 2), label, 3)), torch.tensor(1.0))
    with pytest.raises(UserError, match=r"cost = cka: .* a class has no training image"):
        surveyed(InTurn(torch.ones(2 * C, 5, 2, 2), label.clamp_min(1), 3))
