"""PTLoss against what its formula implies, in float64: KL, PolyLoss, focal loss, label smoothing, its own gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdbench.losses.ptloss import PTLoss, perturbed_kl
from kdbench.losses.ptloss.functional import horner, orders, pull
from kdbench.types import Outputs, Target

several = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)
taus = st.sampled_from([0.5, 1.0, 4.0])


def drawn(seed: int, rows: int = 4, classes: int = 6, order: int = 5, per_class: bool = False, low: float = -1.0):
    """Student and teacher logits [rows, classes] and epsilon in [low/m, 2]."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(2, rows, classes, generator=random, dtype=torch.float64) * 3
    m = torch.arange(1, order + 1, dtype=torch.float64)
    shape = (classes, order) if per_class else (order,)
    epsilon = low / m + torch.rand(shape, generator=random, dtype=torch.float64) * (2 - low / m)
    return z[0], z[1], epsilon


def close(a: Tensor, b: Tensor, tolerance: float = 1e-13) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def one_hot_teacher(p: Tensor, label: Tensor, epsilon: Tensor) -> Tensor:
    teacher = torch.full_like(p, -torch.inf)
    teacher[torch.arange(len(p)), label] = 0.0
    return perturbed_kl(p.log(), teacher, epsilon)


@several
@given(seeds, taus)
def test_zero_epsilon_is_kl(seed, tau):
    s, t, _ = drawn(seed)
    ours = perturbed_kl(s, t, torch.zeros(5, dtype=torch.float64), tau).mean()
    theirs = F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean")
    close(ours, theirs)


@several
@given(seeds, st.booleans())
def test_one_hot_teacher_is_polyloss(seed, per_class):
    s, _, epsilon = drawn(seed, order=3, per_class=per_class)
    label = torch.arange(4)
    p = s.softmax(-1)
    p_y = p[torch.arange(4), label]
    rows = epsilon[label] if per_class else epsilon.expand(4, 3)
    poly = -p_y.log() + sum(rows[:, j] * (1 - p_y) ** (j + 1) for j in range(3))
    close(one_hot_teacher(p, label, epsilon), poly)


@pytest.mark.parametrize(
    "epsilon, expected",
    [
        # Leng et al. 2022: Poly-1 and Poly-N, -log p_y + sum_j eps_j (1 - p_y)^j, at p_y = 1/4: log 4 + eps_1 3/4 + ...
        ([2.0], 2.886294361119890619),
        ([1.0, 0.5], 2.417544361119890619),
        ([-1.0, -0.5, 0.25], 0.460513111119890619),
    ],
)
def test_polyloss_literals(epsilon, expected):
    p = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    value = one_hot_teacher(p, torch.tensor([0]), torch.tensor(epsilon, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-14)


@several
@given(seeds, taus, st.booleans())
def test_gradient_is_a_pull_towards_a_proxy(seed, tau, per_class):
    s, t, epsilon = drawn(seed, per_class=per_class)
    s.requires_grad_()
    (grad,) = torch.autograd.grad(tau**2 * perturbed_kl(s, t, epsilon, tau).sum(), s)
    p = (s / tau).softmax(-1).detach()
    gain, target = pull(p, (t / tau).softmax(-1), epsilon)
    close(grad, tau * gain.unsqueeze(-1) * (p - target), 1e-12)
    close(grad.sum(-1), torch.zeros(4, dtype=torch.float64), 1e-12)
    kl = tau**2 * (target * (target.log() - F.log_softmax(s / tau, -1))).sum()
    (to_proxy,) = torch.autograd.grad(kl, s)
    close(grad, gain.unsqueeze(-1) * to_proxy, 1e-12)


@several
@given(seeds, st.booleans())
def test_gain_is_bounded(seed, per_class):
    s, t, epsilon = drawn(seed, per_class=per_class)
    p, t = s.softmax(-1), t.softmax(-1)
    gain, _ = pull(p, t, epsilon)
    assert (gain >= (t * (1 - p) ** 5).sum(-1) - 1e-12).all()
    assert (gain <= 1 + epsilon.clamp_min(0).sum(-1).max() + 1e-12).all()


@several
@given(seeds, st.booleans())
def test_affine_in_epsilon(seed, per_class):
    s, t, first = drawn(seed, per_class=per_class)
    second = drawn(seed + 1, per_class=per_class)[2]
    both = perturbed_kl(s, t, first) + perturbed_kl(s, t, second)
    close(both, perturbed_kl(s, t, first * 0) + perturbed_kl(s, t, first + second), 1e-12)


@several
@given(seeds)
def test_classes_may_be_renumbered(seed):
    s, t, epsilon = drawn(seed, per_class=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    close(perturbed_kl(s, t, epsilon), perturbed_kl(s[:, order], t[:, order], epsilon[order]), 1e-13)


@several
@given(seeds, st.booleans())
def test_value_at_the_teacher(seed, per_class):
    _, t, epsilon = drawn(seed, per_class=per_class)
    p = t.softmax(-1)
    powers = (1 - p).unsqueeze(-1) ** torch.arange(1, 6)
    close(perturbed_kl(t, t, epsilon), (p * (epsilon * powers).sum(-1)).sum(-1), 1e-13)


@several
@given(seeds, st.floats(-3, 3))
def test_a_direction_without_effect(seed, k):
    s, t, _ = drawn(seed, rows=1)
    epsilon = (k / t.softmax(-1)[0]).unsqueeze(-1)
    s.requires_grad_()
    value, plain = perturbed_kl(s, t, epsilon), perturbed_kl(s, t, epsilon * 0)
    scale = float(epsilon.abs().max()) + 1
    close(value, plain + k * 5, 1e-14 * scale)
    close(torch.autograd.grad(value, s)[0], torch.autograd.grad(plain, s)[0], 1e-13 * scale)


def test_series_and_its_tail():
    p = torch.linspace(0.05, 1, 50, dtype=torch.float64)
    for m in (1, 2, 5, 500):
        partial = horner(1 - p, 1 / orders(torch.zeros(m, dtype=torch.float64))) * (1 - p)
        tail = -p.log() - partial
        assert (tail >= -1e-12).all() and (tail <= (1 - p) ** (m + 1) / ((m + 1) * p) + 1e-12).all()
    close(partial, -p.log(), 1e-11)


@several
@given(seeds, st.integers(1, 8))
def test_minus_one_over_m_leaves_the_tail(seed, order):
    s, t, _ = drawn(seed)
    m = torch.arange(1, order + 1, dtype=torch.float64)
    p, t_p = s.softmax(-1), t.softmax(-1)
    tail = -p.log() - sum((1 - p) ** k / k for k in range(1, order + 1))
    close(perturbed_kl(s, t, -1 / m), (t_p * tail).sum(-1) - entropy(t_p), 1e-12)
    gain, _ = pull(p, t_p, -1 / m)
    close(gain, (t_p * (1 - p) ** order).sum(-1), 1e-13)


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_focal_loss_is_a_perturbation(gamma):
    j = torch.arange(1, 3001, dtype=torch.float64)
    epsilon = torch.where(j <= gamma, -1 / j, gamma / (j * (j - gamma).clamp_min(1)))
    p = torch.tensor([[0.02, 0.98], [0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
    p_y = p[:, 0]
    close(one_hot_teacher(p, torch.zeros(3, dtype=torch.int64), epsilon), (1 - p_y) ** gamma * -p_y.log())


@pytest.mark.parametrize("smoothing, temperature", [(0.1, 1.0), (0.0, 3.0)])
def test_any_fixed_target_is_a_perturbation(smoothing, temperature):
    t = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64)
    t_p = t.softmax(-1)
    wanted = (1 - smoothing) * (t / temperature).softmax(-1) + smoothing / 3
    m = torch.arange(1, 4001, dtype=torch.float64)
    epsilon = (wanted[0] / t_p[0] - 1).unsqueeze(-1) / m
    s = torch.tensor([[0.5, 1.0, -1.5]], dtype=torch.float64)
    kl = (wanted * (wanted.log() - s.log_softmax(-1))).sum(-1)
    close(perturbed_kl(s, t, epsilon), kl + entropy(wanted) - entropy(t_p), 1e-12)


@several
@given(seeds, st.booleans())
def test_bounded_below(seed, per_class):
    s, t, epsilon = drawn(seed, per_class=per_class)
    assert (perturbed_kl(s, t, epsilon) >= -entropy(t.softmax(-1)) - 1e-12).all()  # eps_m >= -1/m
    kl = perturbed_kl(s, t, epsilon * 0)
    wild = epsilon - 2
    assert (perturbed_kl(s, t, wild) >= kl - wild.clamp(max=0).neg().sum(-1).max() - 1e-12).all()


def test_gradcheck():
    s, t, epsilon = drawn(0, per_class=True)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: perturbed_kl(z, t, epsilon, 2.0), s)
    assert torch.autograd.gradcheck(lambda z: perturbed_kl(z, t, epsilon, 2.0, "truncated"), s)


def test_a_class_ruled_out_by_both_counts_nothing():
    s, t, epsilon = drawn(3)
    masked_s, masked_t = (F.pad(z, (0, 1), value=-torch.inf).requires_grad_() for z in (s, t))
    value = perturbed_kl(masked_s, masked_t, epsilon)
    close(value, perturbed_kl(s, t, epsilon))
    (grad,) = torch.autograd.grad(value.sum(), masked_s)
    assert grad.isfinite().all() and (grad[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epsilon", ["0.5/m", "-1/m", "8/m"])
def test_finite_at_extreme_logits(dtype, epsilon):
    loss = PTLoss({"task": 0.1, "distill": 0.9}, epsilon=epsilon, tau=1.0)
    sure = 1000 * (2 * torch.eye(5) - 1)
    for teacher in (sure, -sure, sure.roll(1, 0), torch.zeros(5, 5)):
        student = (sure.to(dtype)).requires_grad_()
        terms = loss(
            Outputs(student, {}), Outputs(teacher.to(dtype), {}), Target(*[torch.arange(5)] * 2, torch.tensor(0.0))
        )
        terms.total.backward()
        assert terms.total.isfinite() and student.grad.isfinite().all()


def test_no_value_is_read_back_in_a_step():
    """On the meta device every host sync raises: what a CUDA graph needs."""
    loss = PTLoss({"task": 0.1, "distill": 0.9}).to("meta")
    student = torch.empty(4, 5, device="meta", requires_grad=True)
    label = torch.empty(4, device="meta", dtype=torch.int64)
    target = Target(label, label, torch.empty((), device="meta"))
    loss(Outputs(student, {}), Outputs(torch.empty(4, 5, device="meta"), {}), target).total.backward()
    assert student.grad is not None


def test_truncated_series_teaches_something_else():
    """With epsilon = 0 and t = (.7, .2, .1) its minimiser is (.883, .117, 0) for M = 5; the teacher costs more."""
    t = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    zero = torch.zeros(5, dtype=torch.float64)
    best = torch.tensor([[0.883, 0.117, 1e-9]], dtype=torch.float64).log()
    assert perturbed_kl(best, t, zero, series="truncated") < perturbed_kl(t, t, zero, series="truncated") - 0.01
    assert perturbed_kl(best, t, zero) > perturbed_kl(t, t, zero)
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    epsilon = torch.tensor([0.5, -0.2], dtype=torch.float64)
    by_hand = (t.exp() * (1.5 * (1 - p) + 0.3 * (1 - p) ** 2)).sum() - entropy(t.exp())
    close(perturbed_kl(p.log(), t, epsilon, series="truncated"), by_hand)
