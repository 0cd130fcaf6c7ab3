"""Large temperatures and large logits: what subtracts log-probabilities keeps its digits in float32."""

from __future__ import annotations

import pytest
import torch

from kdbench.errors import UserError
from kdbench.types import Outputs, Target
from tests.support.losses import NAMES, batch, build, settings

OF_STAGES = {"ofa"}  # reads features as well, which its setup finds
SETTINGS = {"dkpp": {"permutation": "fixed", "seed": 3}, "ptloss": {"epsilon": None}}


def _takes_any_temperature(name: str) -> bool:
    """Of logits alone; a loss that refuses large ones says so by its own range."""
    try:
        loss = build(name, tau=1e7)
        alone = not loss.needs and not loss.student_needs and name not in OF_STAGES
        return "tau" in settings(name) and alone
    except UserError:
        return False


FINITE = [name for name in NAMES if _takes_any_temperature(name)]


def value_and_gradient(name: str, tau: float, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    student, teacher, target = batch(3)
    logits = student.logits.to(dtype).requires_grad_()
    weights = {term: float(term != "task") for term in settings(name)["weights"]}
    loss = build(name, tau=tau, weights=weights, **SETTINGS.get(name, {}))
    terms = loss(Outputs(logits, {}), Outputs(teacher.logits.to(dtype), {}), target)
    terms.total.backward()
    assert logits.grad is not None
    return float(terms.total.detach()), logits.grad.double()


def test_every_loss_with_a_temperature_is_here():
    assert {"kl", "kl_reverse", "js", "dkd", "ptloss", "dkpp", "dist", "logit_std", "nkd", "wsld", "swap"} <= {*FINITE}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("tau", [33.0, 1e3, 1e5, 1e7])
def test_float32_agrees_with_float64(name, tau):
    exact, exact_gradient = value_and_gradient(name, tau, torch.float64)
    value, gradient = value_and_gradient(name, tau, torch.float32)
    assert value == pytest.approx(exact, rel=2e-5)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-3, atol=1e-4 * float(exact_gradient.abs().max()))


@pytest.mark.parametrize("tau", [1e4, 1e6])
def test_the_limit_is_reached_from_below(tau):
    """KL's own limit is a loss of its own: |d - mean d|^2 / (2C)."""
    limit, _ = value_and_gradient("kl", float("inf"), torch.float64)
    assert limit > 0
    for name in ("kl", "kl_reverse"):
        assert value_and_gradient(name, tau, torch.float32)[0] == pytest.approx(limit, rel=30 / tau + 1e-5)
    assert value_and_gradient("js", tau, torch.float32)[0] == pytest.approx(limit / 4, rel=30 / tau + 1e-5)


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("tau", [1.0, 40.0, 1e4])
def test_logits_of_ten_thousand_are_finite(name, tau):
    target = Target(torch.tensor([0, 1, 2, -1]), torch.arange(4), torch.tensor(0.5))
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 1e4], [5.0, 6.0, 7.0], [1e4, 1e4, -1e4]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 1e4, 0.0], [5.0, 6.0, 7.0], [0.0, -1e4, 1e4]])
    loss = build(name, tau=tau, **SETTINGS.get(name, {}))
    total = loss(Outputs(student, {}), Outputs(teacher, {}), target).total
    total.backward()
    assert torch.isfinite(total) and student.grad is not None and bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logit_std", {}),
        ("logit_std_dkd", {}),
        ("mse", {"center": "standardize"}),
        ("dkd", {"tckd": 0.0}),
        ("dist", {"intra": 0.0}),
    ],
)
def test_two_classes_give_no_gradient_where_a_loss_says_so(name, changes, monkeypatch):
    """It refuses them, and none of them says so without reason: with the classes that it asks for it has one."""
    loss = build(name, weights={"task": 0.0, "distill": 1.0}, **changes)
    assert loss.least_classes == 3
    for classes in (2, 3):
        random = torch.Generator().manual_seed(classes)
        logits = torch.randn(8, classes, generator=random).requires_grad_()
        teacher = torch.randn(8, classes, generator=random)
        target = Target(torch.arange(8) % classes, torch.arange(8), torch.tensor(0.5))
        if classes == 2:
            with pytest.raises(UserError, match="no gradient for fewer than 3"):
                loss(Outputs(logits, {}), Outputs(teacher, {}), target)
            monkeypatch.setattr(type(loss), "least_classes", 1)
        loss(Outputs(logits, {}), Outputs(teacher, {}), target).total.backward()
        assert logits.grad is not None
        assert (float(logits.grad.abs().max()) < 1e-4) == (classes == 2)


@pytest.mark.parametrize("seed", [0, 3, 4, 123, 2**40, -1, -(2**63), 2**63 - 1])
def test_every_seed_fixes_a_permutation(seed):
    student, teacher, target = batch(1)
    values = [build("dkpp", permutation="fixed", seed=seed)(student, teacher, target).total for _ in range(2)]
    assert values[0] == values[1] and torch.isfinite(values[0])
