"""The proxy teacher against closed forms, slow and simple solvers, and the students that it predicts."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdbench.errors import UserError
from kdbench.losses.ptloss import differentiable_proxy, perturbed_kl, proxy_teacher
from kdbench.losses.ptloss.functional import horner, orders, pull
from tests.support.shell import processor_seconds

several = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def problem(seed: int, rows: int = 6, high: float = 2.0, classes: int = 0, per_class: bool | None = None):
    """Teachers from flat to sharp and an epsilon in [-1/m, high], shared or per class."""
    random = torch.Generator().manual_seed(seed)
    classes = classes or [2, 3, 10, 100][seed % 4]
    order = [1, 2, 5][seed % 3]
    sharpness = 10 ** (2 * torch.rand(rows, 1, generator=random, dtype=torch.float64) - 0.5)
    t = (torch.randn(rows, classes, generator=random, dtype=torch.float64) * sharpness).softmax(-1)
    per_class = bool(seed % 2) if per_class is None else per_class
    m = torch.arange(1, order + 1, dtype=torch.float64)
    uniform = torch.rand((classes, order) if per_class else (order,), generator=random, dtype=torch.float64)
    return t, -1 / m + uniform * (high + 1 / m)


def logit_gradient(t: Tensor, p: Tensor, epsilon: Tensor) -> Tensor:
    z = p.log().requires_grad_()
    return torch.autograd.grad(perturbed_kl(z, t.log(), epsilon).sum(), z)[0]


def by_bisection(t: Tensor, epsilon: Tensor) -> Tensor:
    """An oracle for convex phi: t (1/p + S(p)) = lambda solved for p inside, sum p = 1 for lambda outside."""

    def force(p: Tensor) -> Tensor:
        return 1 / p + horner(1 - p, epsilon * orders(epsilon))

    def inner(level: Tensor) -> Tensor:
        low, high = torch.full_like(t, 1e-40), torch.ones_like(t)
        for _ in range(75):
            middle = (low * high).sqrt() if bool((high > 2 * low).any()) else (low + high) / 2
            over = t * force(middle) > level
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return high

    low, high = torch.full_like(t[:, :1], 1e-30), torch.full_like(t[:, :1], 1e3)
    for _ in range(75):
        middle = (low * high).sqrt() if bool((high > 2 * low).any()) else (low + high) / 2
        full = inner(middle).sum(-1, keepdim=True) > 1
        low, high = torch.where(full, middle, low), torch.where(full, high, middle)
    return inner(high)


def by_fixed_point(t: Tensor, epsilon: Tensor) -> Tensor:
    """log p <- (log p + log target(p)) / 2, renormalised; undamped it may oscillate."""
    p = t
    for _ in range(300):
        p = (0.5 * p.log() + 0.5 * pull(p, t, epsilon)[1].log()).softmax(-1)
    return p


@several
@given(seeds, st.sampled_from([0.5, 2.0, 8.0]))
def test_it_is_the_minimum_and_the_fixed_point(seed, high):
    t, epsilon = problem(seed, high=high)
    proxy = proxy_teacher(t, epsilon)
    p = proxy.probability
    assert proxy.residual.max() < 1e-10 and proxy.iterations <= 12
    assert (p - pull(p, t, epsilon)[1]).abs().max() < 1e-11
    assert logit_gradient(t, p, epsilon).abs().max() < 1e-10
    torch.testing.assert_close(p.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(proxy.value, perturbed_kl(p.log(), t.log(), epsilon), rtol=0, atol=1e-11)
    others = (p.log() + 0.3 * torch.randn(20, *p.shape, generator=torch.Generator().manual_seed(seed))).double()
    assert (perturbed_kl(others, t.log().expand_as(others), epsilon) >= proxy.value - 1e-12).all()


@pytest.mark.parametrize("seed", [0, 1, 5, 8])
def test_it_agrees_with_bisection_and_the_fixed_point(seed):
    t, epsilon = problem(seed, rows=4, classes=5, high=1.0)
    p = proxy_teacher(t, epsilon).probability
    torch.testing.assert_close(p, by_bisection(t, epsilon), rtol=0, atol=1e-11)
    torch.testing.assert_close(p, by_fixed_point(t, epsilon), rtol=0, atol=1e-10)


@pytest.mark.parametrize("value", [-0.99, -0.5, 0.5, 5.0, 50.0])
@pytest.mark.parametrize("per_class", [False, True])
def test_closed_form_of_order_one(value, per_class):
    """p_c = t_c / (G - eps_c t_c) with G the root of sum p = 1 above max eps_c t_c."""
    t = problem(3, classes=8)[0]
    epsilon = torch.full((8, 1), value, dtype=torch.float64)
    if per_class:
        epsilon = epsilon * torch.linspace(1, 0.1, 8, dtype=torch.float64).unsqueeze(-1)
    pole = (epsilon.squeeze(-1) * t).amax(-1, keepdim=True)
    low, high = pole, pole + 1
    for _ in range(200):
        middle = (low + high) / 2
        full = (t / (middle - epsilon.squeeze(-1) * t)).sum(-1, keepdim=True) > 1
        low, high = torch.where(full, middle, low), torch.where(full, high, middle)
    closed = t / (high - epsilon.squeeze(-1) * t)
    p = proxy_teacher(t, epsilon if per_class else epsilon[0]).probability
    torch.testing.assert_close(p, closed, rtol=0, atol=1e-13 * (1 + value**2))


def test_zero_epsilon_and_uniform_teachers_stay_as_they_are():
    t, epsilon = problem(6, per_class=False)
    zero = proxy_teacher(t, torch.zeros(5))
    assert zero.iterations == 0
    torch.testing.assert_close(zero.probability, t, rtol=0, atol=1e-15)
    uniform = torch.full((3, 7), 1 / 7, dtype=torch.float64)
    torch.testing.assert_close(proxy_teacher(uniform, epsilon).probability, uniform, rtol=0, atol=1e-15)


@several
@given(seeds)
def test_a_shared_epsilon_keeps_the_order_of_classes(seed):
    t, epsilon = problem(seed, per_class=False)
    p = proxy_teacher(t, epsilon).probability
    order = t.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= -1e-12).all()


def test_an_epsilon_per_class_can_change_it():
    t = torch.tensor([[0.5, 0.4, 0.1]], dtype=torch.float64)
    p = proxy_teacher(t, torch.tensor([[-0.9], [2.0], [0.0]])).probability
    assert p.argmax() == 1


def test_first_order_expansion():
    """p = t (1 + s - mean s) + O(eps^2), s_c = t_c S_c(t_c): epsilon ten times smaller, error a hundred times."""
    t, epsilon = problem(11, classes=10)
    errors = []
    for size in (1e-2, 1e-3):
        s = t * horner(1 - t, size * epsilon * orders(epsilon))
        linear = t * (1 + s - (t * s).sum(-1, keepdim=True))
        errors.append((proxy_teacher(t, size * epsilon).probability - linear).abs().max())
    assert 80 < errors[0] / errors[1] < 125


@pytest.mark.parametrize("per_class", [False, True])
def test_a_free_student_ends_at_the_proxy(per_class):
    t, epsilon = problem(2 + per_class, classes=6, rows=3, per_class=per_class)
    t = 0.9 * t + 0.1 / 6
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = perturbed_kl(z, t.log(), epsilon).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(z.softmax(-1).detach(), proxy_teacher(t, epsilon).probability, rtol=0, atol=1e-5)


def test_negative_first_coefficient_smooths_and_positive_sharpens():
    t = problem(2, classes=10)[0]
    top = [proxy_teacher(t, torch.tensor([e])).probability.amax(-1) for e in (-0.8, 0.0, 2.0)]
    assert (top[0] < top[1]).all() and (top[1] < top[2]).all()


def test_one_hot_teachers():
    t = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(proxy_teacher(t, torch.tensor([0.5, 0.2])).probability, t, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="eps_1 = -2 is below -1/1"):
        ceiling = proxy_teacher(t, torch.tensor([-2.0]))  # a ceiling on confidence: p_y = 1 / |eps_1|
    torch.testing.assert_close(ceiling.probability.diagonal(), torch.full((4,), 0.5, dtype=torch.float64))


def test_outside_the_safe_region_it_still_finds_minima_and_warns():
    t = torch.full((1, 2), 0.5, dtype=torch.float64)
    epsilon = torch.tensor([0, 0, 0, 0, -2.4], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"eps_5 = -2.4 .*not convex"):
        p = proxy_teacher(t, epsilon, start=torch.tensor([[0.3, 0.7]])).probability
    torch.testing.assert_close(p, torch.tensor([[0.12, 0.88]], dtype=torch.float64), rtol=0, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(30):
            t, epsilon = problem(seed)
            wild = 3 * torch.randn(epsilon.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            p = proxy_teacher(t, wild).probability
            assert logit_gradient(t, p, wild).abs().max() < 1e-9


def test_the_minimum_may_be_negative():
    """With eps_1 < 0 the proxy is smoother than the teacher, and the loss is below 0 there."""
    t = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    minimum = proxy_teacher(t, torch.tensor([-0.5], dtype=torch.float64))
    torch.testing.assert_close(minimum.probability, torch.tensor([[0.556, 0.323, 0.121]]).double(), rtol=0, atol=6e-4)
    assert minimum.value.item() == pytest.approx(-0.274, abs=5e-4)


def test_failure_is_never_silent():
    t, epsilon = problem(2)
    with pytest.raises(UserError, match="did not converge: residual up to"):
        proxy_teacher(t, epsilon, max_iterations=1)
    with pytest.warns(UserWarning, match="did not converge"):
        proxy = proxy_teacher(t, epsilon, max_iterations=1, on_failure="warn")
    assert proxy.residual.max() > 1e-10


@pytest.mark.parametrize(
    "t, epsilon, message",
    [
        (torch.randn(3, 4), torch.zeros(2), "finite probabilities"),
        (torch.rand(3, 4), torch.zeros(2), "rows that sum to 1"),
        (torch.full((3, 4), 0.25), torch.zeros(5, 2), "epsilon = 5 rows: must be one row for each of 4 classes"),
        (torch.full((3, 4), 0.25), torch.tensor([0.0, float("nan")]), "finite numbers"),
        (torch.full((4,), 0.25), torch.zeros(2), r"\[N, C\]"),
    ],
)
def test_wrong_input(t, epsilon, message):
    with pytest.raises(UserError, match=message):
        proxy_teacher(t, epsilon)


def test_no_rows():
    assert proxy_teacher(torch.zeros(0, 4), torch.zeros(2)).probability.shape == (0, 4)


@pytest.mark.parametrize("shape", [(2,), (4, 2), (1, 3)])
def test_derivatives_to_epsilon_and_teacher(shape):
    random = torch.Generator().manual_seed(1)
    t = torch.randn(3, 4, generator=random, dtype=torch.float64).mul(2).softmax(-1).requires_grad_()
    epsilon = (torch.rand(shape, generator=random, dtype=torch.float64) - 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, e: differentiable_proxy(t, e, tolerance=1e-13), (t, epsilon))


def test_a_start_changes_only_the_work():
    t, epsilon = problem(10)
    p = proxy_teacher(t, epsilon).probability
    again = proxy_teacher(t, epsilon, start=p)
    assert again.iterations <= 1
    torch.testing.assert_close(again.probability, p, rtol=0, atol=1e-12)


def test_fifty_thousand_rows_in_seconds():
    t = torch.randn(50_000, 100, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    began = processor_seconds()
    proxy = proxy_teacher(t, torch.tensor([0.5, -0.2, 0.3, 0.0, 0.1]))
    assert proxy.residual.max() < 1e-10
    assert processor_seconds() - began < 30  # about 3 s
