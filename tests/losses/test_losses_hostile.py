"""Every loss on what is rare in training and happens all the same: two classes, a last batch of one image, images
without a label, and logits of ten thousand, all at once, of networks in float32 and in bfloat16. Each file of
configs/loss is tested by existing."""

from __future__ import annotations

import pytest
import torch

from kdbench.types import Outputs, Target
from tests.support.losses import ALIKE, NAMES, attach, build, cast, outputs, small

LARGE = 1e4


def made(name: str, samples: int, classes: int, seed: int) -> tuple[Outputs, Outputs, Target]:
    random, views = torch.Generator().manual_seed(seed), build(name).views
    student, teacher = (3 * torch.randn(views * samples, classes, generator=random) for _ in range(2))
    row = torch.arange(samples).repeat(views)
    target = Target(row % classes, row, torch.tensor(0.25))
    width = 4 if name in ALIKE else 6
    return outputs(student, 4, (8, 4, 2), seed), outputs(teacher, width, (8, 8, 4), seed + 1), target


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("classes", "samples", "dtype"),
    [(2, 1, torch.float32), (2, 5, torch.float32), (7, 1, torch.float32), (7, 6, torch.float32),
     (2, 1, torch.bfloat16), (7, 6, torch.bfloat16)],
)  # fmt: skip
def test_value_and_gradient_are_finite(name, classes, samples, dtype):
    torch.manual_seed(0)
    loss = build(name, **small(name))
    if classes < loss.least_classes:
        pytest.skip("it refuses so few classes")
    student, teacher, target = made(name, 24, classes, 30)
    attach(loss, student, teacher)
    loss.setup(student, teacher)
    if loss.surveyed:
        loss.survey([(teacher.features[loss.surveyed], target.label)])
    if loss.needs_calibration:
        loss.calibrate(teacher.logits, target.label)
    student, teacher, target = made(name, samples, classes, 3)
    sure = LARGE * (2 * torch.nn.functional.one_hot(target.label, classes) - 1.0)
    for label in (target.label, target.label.clone().index_fill_(0, torch.tensor([0]), -1)):
        pairs = ((teacher.logits, student.logits), (sure, -sure), (sure, sure), (-sure, torch.zeros_like(sure)))
        for z_t, z_s in pairs:
            own = cast(student._replace(logits=z_s), dtype, grad=True)
            total = loss(own, cast(teacher._replace(logits=z_t), dtype), target._replace(label=label)).total
            total.backward()
            leaves = (own.logits, *own.features.values(), *loss.parameters())
            found = [leaf.grad for leaf in leaves if leaf.grad is not None]
            assert total.isfinite() and found and all(gradient.isfinite().all() for gradient in found)
