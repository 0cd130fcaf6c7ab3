"""Values and gradients against other people's code: peer_logits.json holds what it gave on the inputs made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kdbench.types import Outputs, Target
from tests.support.losses import build

CASES = json.loads(Path(__file__).with_name("peer_logits.json").read_text(encoding="utf-8"))["cases"]
LABEL = torch.tensor([0, 3, 5, 1, 3])


def wave(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


@pytest.mark.parametrize("case", CASES, ids=[f"{case['loss']}-{i}" for i, case in enumerate(CASES)])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-9), (torch.float32, 5e-5)])
def test_value_and_gradient_equal_the_peer_s(case, dtype, digits):
    loss = build(case["loss"], **case["changes"]).to(dtype)
    student = wave((5, 6), 0.3, 3.0).to(dtype).requires_grad_(True)
    teacher = wave((5, 6), 1.1, 4.0).to(dtype)
    target = Target(LABEL, torch.arange(5), torch.tensor(case.get("progress", 0.0), dtype=torch.float64))
    total = loss(Outputs(student, {}), Outputs(teacher, {}), target).total
    total.backward()
    if case["value"] is not None:  # two of Kim et al.'s limits exist as gradients only
        assert total.item() == pytest.approx(case["value"], rel=digits)
    torch.testing.assert_close(student.grad, torch.tensor(case["grad"], dtype=dtype), rtol=digits, atol=digits / 10)
    if "theta" in case and dtype == torch.float64:
        assert loss.theta.grad.item() == pytest.approx(case["theta"], rel=digits)
