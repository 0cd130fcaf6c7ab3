"""Values and gradients against other people's code: peer_logits.json holds what it gave on the inputs made here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdbench.losses.base import DistillationLoss
from kdbench.types import Outputs, Parts, Target
from tests.support.losses import build, cast

CASES = json.loads(Path(__file__).with_name("peer_logits.json").read_text(encoding="utf-8"))["cases"]
LABEL = torch.tensor([0, 3, 5, 1, 3])
# Of losses over several views, teachers or heads: (shape, phase, scale) of what they read beside the logits.
STUDENT = {"pooled": ((5, 4), 0.2, 1.5), "stage3": ((5, 4, 4, 4), 0.5, 1.5),
           "head": ((5, 6), 0.4, 3.0), "head_dist": ((5, 6), 0.8, 3.0)}  # fmt: skip
TEACHER = {"stage3": ((5, 5, 8, 8), 0.7, 1.5), "members": ((5, 3, 6), 2.1, 4.0)}
COSTS = ((6, 5), 1.5, 1.0)  # rows of a classifier, of which costs are made


def wave(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


def outputs(case: dict[str, Any], dtype: torch.dtype) -> tuple[Outputs, Outputs, Target]:
    """The fixed student and teacher that the peers' numbers belong to."""
    views = case.get("views", 1)
    student = Outputs(wave((5 * views, 6), 0.3, 3.0), {name: wave(*key) for name, key in STUDENT.items()})
    teacher = Outputs(wave((5 * views, 6), 1.1, 4.0), {name: wave(*key) for name, key in TEACHER.items()})
    teacher.features["pooled"] = teacher.features["stage3"].relu().mean((2, 3))
    if case["loss"] == "sdd":
        student.features["pooled"] = student.features["stage3"].relu().mean((2, 3))
    progress = torch.tensor(case.get("progress", 0.0), dtype=torch.float64)
    target = Target(LABEL.repeat(views), torch.arange(5).repeat(views), progress)
    return cast(student, dtype, grad=True), cast(teacher, dtype), target


def heads(case: dict[str, Any], dtype: torch.dtype) -> list[torch.nn.Linear]:
    """The networks' last layers."""
    made = [torch.nn.Linear(width, 6, dtype=dtype) for width in (4, 5)]
    for number, head in enumerate(made):
        head.weight.data = wave((6, 4 + number), 0.9 + number, 1.0).to(dtype)
        assert head.bias is not None
        head.bias.data = wave((6,), 1.3 + number, 1.0).to(dtype)
    if case["loss"] == "wkd":
        made[1].weight.data = wave(*COSTS).to(dtype)
    return made


def prepared(case: dict[str, Any], dtype: torch.dtype, student: Outputs, teacher: Outputs) -> DistillationLoss:
    loss = build(case["loss"], **case["changes"]).to(dtype)
    loss.train_rows, loss.epochs = 5, 300
    if "grads" in case or loss.needs or case["loss"] in ("wkd", "pskd"):
        own, other = heads(case, dtype)
        loss.attach(Parts(own, {}), Parts(other, {}))
        student.features["head.weight"], student.features["head.bias"] = own.weight, own.bias
        loss.setup(student, teacher)
        loss = loss.to(dtype)
        for i, parameter in enumerate(loss.parameters()):
            parameter.data = wave(tuple(parameter.shape), 0.1 * i, 0.5).to(dtype)
    if case.get("visited"):
        before = student._replace(logits=wave((5, 6), 1.7, 2.0).to(dtype))
        loss(before, None, Target(LABEL, torch.arange(5), torch.zeros(())))
    return loss


@pytest.mark.parametrize("case", CASES, ids=[f"{case['loss']}-{i}" for i, case in enumerate(CASES)])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_value_and_gradient_equal_the_peer_s(case, dtype, digits):
    if dtype == torch.float32:
        # Factors of tau^2 bring to light what differences of log-probabilities near each other lack in float32, and
        # ten iterations of a transport add up. The eleven cases that allow more say what was "measured": how far ours
        # and the authors' code in float32 lie from ours in float64, the median (and the most) of 300 random batches.
        digits = case.get("float32", digits)
    student, teacher, target = outputs(case, dtype)
    loss = prepared(case, dtype, student, teacher)
    total = loss(student, teacher, target).total
    total.backward()
    if case["value"] is not None:  # two of Kim et al.'s limits exist as gradients only
        assert total.item() == pytest.approx(case["value"], rel=digits)
    leaves = {"logits": student.logits, **student.features}
    wanted = {"logits": case["grad"], **case.get("grads", {})}
    for name, numbers in wanted.items():
        if numbers is not None:
            expected = torch.tensor(numbers, dtype=dtype).reshape(leaves[name].shape)
            # Small entries are differences of large ones: in float32 they have the digits of the largest.
            atol = digits / 10 if dtype == torch.float64 else digits * expected.abs().max().item()
            torch.testing.assert_close(leaves[name].grad, expected, rtol=digits, atol=atol)
    if "theta" in case and dtype == torch.float64:
        assert loss.theta.grad.item() == pytest.approx(case["theta"], rel=digits)


# What r and the term come to in the authors' src/distil_losses/taid.py in the first steps of 40, by (alpha, beta).
COURSES = {
    (0.2, 0.5): (
        [0.4, 0.460637561001, 0.51515151239, 0.564198668573, 0.608320215265, 0.647988720713],
        [1.247545707758, 1.194517945873, 1.168725273135, 1.139542486986, 1.109344671388, 1.080201482397],
    ),
    (5e-4, 0.99): (
        [0.4, 0.415, 0.43, 0.445, 0.46, 0.475],
        [1.247545707758, 1.194517945873, 1.153630775044, 1.113989622171, 1.076488982786, 1.043528617241],
    ),
}


@pytest.mark.parametrize(("pace", "course"), COURSES.items())
def test_taid_s_mixture_moves_to_the_teacher_as_the_authors_code_moves_it(pace, course):
    loss = build("taid", weights={"task": 0.0, "distill": 1.0}, alpha=pace[0], beta=pace[1]).double()
    for step, (share, value) in enumerate(zip(*course)):
        student = Outputs(wave((5, 6), 0.3 + 0.2 * step, 3.0 * (1 + 0.1 * step)), {})
        target = Target(LABEL, torch.arange(5), torch.tensor(step / 40, dtype=torch.float64))
        assert loss(student, Outputs(wave((5, 6), 1.1 + 0.1 * step, 4.0), {}), target).total.item() == pytest.approx(
            value
        )
        assert loss.start + loss.gone.item() == pytest.approx(share)
