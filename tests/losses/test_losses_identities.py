"""What the papers' formulas say must hold, in float64: limits, invariances, and where a loss is exactly zero."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdbench.losses import dkd, functional
from kdbench.losses.annealing import annealing_factor
from kdbench.losses.cwtm import confidence_weights
from kdbench.losses.dkpp import hashed_keys, permuted_log_probs
from kdbench.losses.js import jensen_shannon_rows
from kdbench.losses.kl import label_matching_rows, logit_matching_rows
from kdbench.losses.mse import regression_rows
from kdbench.losses.polyn import polynomial_rows
from kdbench.losses.ttm import power_sum
from kdbench.types import Outputs
from tests.support.losses import B, C, batch, build

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)
SEED = st.integers(0, 10_000)
TAU = st.floats(0.5, 50.0)


def logits(seed: int, spread: float = 4.0, rows: int = 5, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    s, t = (spread * torch.randn(rows, classes, generator=random, dtype=torch.float64) for _ in range(2))
    return s.requires_grad_(True), t


def gradient(value: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, of)[0]


def relative_error(tau: float, seed: int) -> float:
    s, t = logits(seed, rows=50)
    limit = gradient(logit_matching_rows(s, t).sum(), s)
    return float((gradient(functional.tempered_kl_rows(s, t, tau).sum(), s) - limit).norm() / limit.norm())


@quick
@given(SEED)
def test_kl_tends_to_logit_matching(seed):
    """X1: Hinton's high-temperature limit, gradient (d - mean d) / C."""
    errors = [relative_error(tau, seed) for tau in (1.0, 5.0, 20.0, 150.0, 1000.0)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.02 and errors[4] < 0.005
    s, t = logits(seed)
    d = (s - t).detach()
    torch.testing.assert_close(gradient(logit_matching_rows(s, t).sum(), s), (d - d.mean(1, keepdim=True)) / d.shape[1])
    value = d.square().sum(1) / 20 - d.sum(1).square() / 200
    torch.testing.assert_close(logit_matching_rows(s, t), value)
    torch.testing.assert_close(functional.tempered_kl_rows(s, t, 1e5), value, rtol=1e-3, atol=1e-5)


@quick
@given(SEED, st.floats(-100, 100), TAU)
def test_a_shift_of_the_logits_moves_mse_alone(seed, shift, tau):
    """X2: a constant added to a sample's logits is no change of the distribution."""
    s, t = logits(seed)
    kl = functional.tempered_kl_rows(s, t, tau)
    torch.testing.assert_close(functional.tempered_kl_rows(s + shift, t, tau), kl, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(logit_matching_rows(s + shift, t), logit_matching_rows(s, t), atol=1e-8, rtol=1e-8)
    for center in ("zero_mean", "standardize"):
        args = (t, "mean", center, "squared")
        torch.testing.assert_close(regression_rows(s + shift, *args), regression_rows(s, *args), atol=1e-8, rtol=1e-8)
    moved = regression_rows(s + 1.0 + abs(shift), s, "mean", "none", "squared")
    torch.testing.assert_close(moved, torch.full_like(moved, (1.0 + abs(shift)) ** 2))


@quick
@given(SEED)
def test_mse_is_logit_matching_plus_the_mean(seed):
    """X3: gradient of the mean squared error = 2 x that of tau = inf + 2 mean(d) / C; centred, exactly twice it."""
    s, t = logits(seed)
    d = (s - t).detach()
    limit = gradient(logit_matching_rows(s, t).sum(), s)
    mse = gradient(regression_rows(s, t, "mean", "none", "squared").sum(), s)
    torch.testing.assert_close(mse, 2 * limit + 2 * d.mean(1, keepdim=True) / d.shape[1])
    torch.testing.assert_close(regression_rows(s, t, "mean", "zero_mean", "squared"), 2 * logit_matching_rows(s, t))
    torch.testing.assert_close(
        regression_rows(s, t, "sum", "none", "squared"), 10 * regression_rows(s, t, "mean", "none", "squared")
    )


def test_tau_squared_keeps_the_size_of_the_gradient():
    """X4: within a factor of 2 over tau in 5..50 with the factor; falling like 1/tau^2 without."""
    s, t = logits(0, rows=200)
    sizes = {tau: float(gradient(functional.tempered_kl_rows(s, t, tau).sum(), s).norm()) for tau in (5.0, 20.0, 50.0)}
    assert max(sizes.values()) < 2 * min(sizes.values())
    assert sizes[50.0] / 50**2 < 0.02 * sizes[5.0] / 5**2 * 2


@quick
@given(SEED)
def test_kl_over_tau_tends_to_label_matching(seed):
    """X5: gradient 1[argmax s] - 1[argmax t] where the best class leads by more than 0.5; 0 on agreement."""
    s, t = logits(seed, rows=40)
    lead = [z.topk(2).values for z in (s.detach(), t)]
    clear = (lead[0][:, 0] - lead[0][:, 1] > 0.5) & (lead[1][:, 0] - lead[1][:, 1] > 0.5)
    near = gradient(functional.tempered_kl_rows(s, t, 0.02).sum() / 0.02, s)[clear]
    limit = gradient(label_matching_rows(s, t).sum(), s)
    own, taught = (F.one_hot(z.argmax(1), 10).double() for z in (s, t))
    torch.testing.assert_close(limit, own - taught)
    torch.testing.assert_close(near, limit[clear], atol=1e-3, rtol=0)
    value = functional.tempered_kl_rows(s, t, 1e-3) / 1e-3
    torch.testing.assert_close(label_matching_rows(s, t)[clear], value[clear], atol=0.02, rtol=0)
    assert label_matching_rows(t, 3 * t + 1).eq(0).all()


@quick
@given(SEED, TAU)
def test_batchmean_is_classes_times_mean(seed, tau):
    """X6: the sum over classes is C times what a mean over all elements gives (a common slip)."""
    s, t = logits(seed)
    log_q, p = F.log_softmax(s / tau, 1), F.softmax(t / tau, 1)
    value = functional.tempered_kl_rows(s, t, tau).mean()
    torch.testing.assert_close(value, tau**2 * F.kl_div(log_q, p, reduction="batchmean"))
    torch.testing.assert_close(value, 10 * tau**2 * F.kl_div(log_q, p, reduction="none").mean())


@quick
@given(SEED)
def test_cwtm_weights(seed):
    """X7: they sum to 1 over the labelled samples; a constant confidence gives the cross-entropy."""
    _, t = logits(seed)
    counted = torch.tensor([True, True, False, True, True])
    weights = confidence_weights(t, counted)
    assert weights.sum().item() == pytest.approx(1.0) and weights[2] == 0
    top = t.softmax(1).amax(1)
    torch.testing.assert_close(weights[0] / weights[1], top[0] / top[1])
    student, teacher, target = batch(seed % 50)
    equally_sure = torch.stack([row.roll(int(k)) for k, row in enumerate(teacher.logits[:1].expand(B, C))])
    total = build("cwtm")(student, Outputs(equally_sure, {}), target).total
    torch.testing.assert_close(total, F.cross_entropy(student.logits, target.label))


@quick
@given(SEED, st.booleans())
def test_dkpp_keeps_the_maximum_and_the_values(seed, fixed):
    """X8: argmax, max and the sorted probabilities stay; the places of the others change."""
    _, t = logits(seed, rows=8)
    log_p = t.log_softmax(1)
    keys = hashed_keys(torch.arange(8) + seed, 10, 0) if fixed else torch.rand(8, 10)
    moved = permuted_log_probs(log_p, keys)
    assert torch.equal(moved.argmax(1), log_p.argmax(1)) and torch.equal(moved.amax(1), log_p.amax(1))
    assert torch.equal(moved.sort(1).values, log_p.sort(1).values)
    assert not torch.equal(moved, log_p)


def test_dkpp_permutations_are_even_and_kept():
    log_p = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]]).log().expand(20_000, 5)
    for keys in (torch.rand(20_000, 5), hashed_keys(torch.arange(20_000), 5, 0)):
        mean = permuted_log_probs(log_p, keys).exp().mean(0)
        torch.testing.assert_close(mean, torch.tensor([0.15, 0.4, 0.15, 0.15, 0.15]), atol=0.003, rtol=0)
    again = hashed_keys(torch.tensor([7, 3]), 5, 0)
    assert torch.equal(again.flip(0), hashed_keys(torch.tensor([3, 7]), 5, 0))
    assert not torch.equal(again.argsort(1), hashed_keys(torch.tensor([7, 3]), 5, 1).argsort(1))
    assert len(hashed_keys(torch.arange(1000), 100, 0).unique()) == 100_000
    for seed in (123, 65_535, 2**31, 2**63 - 1):  # the product with the seed leaves 64 bits
        assert len(hashed_keys(torch.arange(100), 100, seed).unique()) == 10_000


def test_dkpp_fresh_follows_torch_s_generator():
    student, teacher, target = batch(1)
    fresh, fixed = build("dkpp"), build("dkpp", permutation="fixed")

    def value(loss):
        return loss(student, teacher, target).total.item()

    torch.manual_seed(5)
    first, second = value(fresh), value(fresh)
    torch.manual_seed(5)
    assert value(fresh) == first != second
    assert value(fixed) == value(fixed) != build("dkpp", permutation="fixed", seed=1)(student, teacher, target).total


@quick
@given(SEED, TAU)
def test_kl_is_its_decoupled_parts(seed, tau):
    """Zhao et al. 2022, the classical loss taken apart: tau^2 KL = TCKD + (1 - p_y) NCKD."""
    s, t = logits(seed)
    index = torch.arange(5)
    tckd, nckd = dkd.decoupled_rows(s, t, index, tau)
    rest = 1 - (t / tau).softmax(1).gather(1, index[:, None]).squeeze(1)
    torch.testing.assert_close(tckd + rest * nckd, functional.tempered_kl_rows(s, t, tau))


@quick
@given(SEED, TAU)
def test_ttm_is_kl_plus_renyi_entropy(seed, tau):
    """Zheng and Yang 2024: H(p_tau, q) = tau H(p_tau, q_tau) - a term of the student alone (Renyi)."""
    s, t = logits(seed)
    p = (t / tau).softmax(1)
    cross = -(p * s.log_softmax(1)).sum(1)
    tempered = -(p * (s / tau).log_softmax(1)).sum(1)
    torch.testing.assert_close(cross, tau * (tempered - (s.log_softmax(1) / tau).logsumexp(1)))
    torch.testing.assert_close(power_sum(t, tau), t.softmax(1).pow(1 / tau).sum(1))


@quick
@given(SEED, st.floats(0.05, 0.95))
def test_jensen_shannon_is_symmetric_and_bounded(seed, mix):
    s, t = logits(seed, spread=20.0)
    value = jensen_shannon_rows(s, t, 1.0, mix)
    torch.testing.assert_close(value, jensen_shannon_rows(t, s, 1.0, 1 - mix))
    entropy = -mix * math.log(mix) - (1 - mix) * math.log(1 - mix)
    assert (value >= -1e-12).all() and (value <= entropy + 1e-12).all()
    near = jensen_shannon_rows(s / 10, t / 10, 1.0, 1e-6) / 1e-6
    torch.testing.assert_close(near, functional.tempered_kl_rows(s / 10, t / 10, 1.0), rtol=1e-3, atol=1e-6)


def test_poly_series_is_cross_entropy_with_a_changed_head():
    """-log p = sum (1 - p)^j / j: with epsilon_j = -1/j the first terms of the series vanish."""
    s, _ = logits(3, spread=0.3)
    label = F.one_hot(torch.arange(5), 10).double()
    miss = 1 - s.softmax(1).gather(1, torch.arange(5)[:, None]).squeeze(1)
    rows = polynomial_rows(s, label, [-1.0, -1 / 2, -1 / 3])
    tail = sum(miss**j / j for j in range(4, 400))
    torch.testing.assert_close(rows, tail, rtol=1e-6, atol=1e-6)


def test_label_losses_meet_cross_entropy():
    student, _, target = batch(2)
    plain = F.cross_entropy(student.logits, target.label)
    for name, changes in (
        ("ce", {}),
        ("focal", {"gamma": 0.0}),
        ("poly1", {"epsilon": 0.0}),
        ("polyn", {"epsilon": [0, 0]}),
    ):
        torch.testing.assert_close(build(name, **changes)(student, None, target).total, plain)
        smooth = build(name, **changes, label_smoothing=0.2)(student, None, target).total
        torch.testing.assert_close(smooth, F.cross_entropy(student.logits, target.label, label_smoothing=0.2))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kl", {}), ("kl", {"tau": "inf"}), ("kl", {"tau": 0}), ("kl", {"scale": "none"}), ("kl_reverse", {}),
        ("js", {}), ("mse", {}), ("mse", {"kind": "smooth_l1"}), ("mse", {"center": "standardize"}), ("ba_caruana", {}),
        ("kim_mse", {}), ("ban", {}), ("dkd", {}), ("dist", {}), ("logit_std", {}), ("logit_std_dkd", {}), ("ctkd", {}),
        ("ttm", {"tau": 1.0}), ("annealing", {"tau_max": 1}), ("tfkd_self", {}),
    ],
)  # fmt: skip
def test_a_perfect_student_has_nothing_to_learn(name, changes):
    _, teacher, target = batch(3)
    student = teacher.logits.double().requires_grad_(True)
    loss = build(name, **changes, weights={"task": 0.0, "distill": 1.0})
    total = loss(Outputs(student, {}), Outputs(student, {}), target).total
    rounding = 1e-4 if name == "dist" else 1e-12  # dist: the authors' 1e-8 in the denominators of small correlations
    assert total.item() == pytest.approx(0.0, abs=rounding)
    assert gradient(total, student).abs().max().item() < rounding


def test_warmups_and_phases_follow_progress():
    student, teacher, target = batch(4)

    def parts(loss, progress: float) -> dict[str, torch.Tensor]:
        return loss(student, teacher, target._replace(progress=torch.tensor(progress))).parts

    loss = build("dkd", warmup=0.2)
    full = parts(loss, 1.0)["distill"]
    for progress, share in ((0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.7, 1.0)):
        torch.testing.assert_close(parts(loss, progress)["distill"], share * full)
    assert parts(build("dkd", warmup=0.0), 0.0)["distill"] == full
    anneal = build("annealing")
    assert parts(anneal, 0.2)["task"] == 0 < parts(anneal, 0.2)["distill"]
    assert parts(anneal, 0.6)["distill"] == 0 < parts(anneal, 0.6)["task"]
    shares = [annealing_factor(torch.tensor(p), 0.5, 4).item() for p in (0.0, 0.124, 0.126, 0.26, 0.49, 0.5, 1.0)]
    assert shares == [0.25, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_ctkd_s_temperature_climbs():
    student, teacher, target = batch(5)
    student, teacher = (out._replace(logits=out.logits.double()) for out in (student, teacher))
    loss = build("ctkd", ramp=0.1).double()
    plain = build("kl", tau=1 + 20 * torch.tensor(1.0).sigmoid().item())
    slopes = {}
    for progress in (0.0, 0.05, 0.1, 0.9):
        loss.zero_grad()
        terms = loss(student, teacher, target._replace(progress=torch.tensor(progress)))
        terms.total.backward()
        slopes[progress] = loss.theta.grad.item()
        torch.testing.assert_close(terms.total, plain(student, teacher, target).total, rtol=1e-6, atol=1e-6)
    assert slopes[0.0] == 0 and slopes[0.05] == pytest.approx(slopes[0.1] / 2) and slopes[0.9] == slopes[0.1]
    step = 1e-2
    with torch.no_grad():
        loss.theta += step
        higher = loss(student, teacher, target).total
        loss.theta -= 2 * step
        lower = loss(student, teacher, target).total
    assert ((higher - lower) / (2 * step)).item() == pytest.approx(-slopes[0.1], rel=1e-4)


def test_soft_targets_of_a_flat_student_stay_tame():
    """A last layer that starts at zero gives equal logits: their deviation is 0, and 1/0 must not reach the weights."""
    _, teacher, target = batch(6)
    for name in ("logit_std", "dist", "logit_std_dkd"):
        student = torch.zeros(B, C, requires_grad=True)
        build(name)(Outputs(student, {}), teacher, target).total.backward()
        assert student.grad.abs().max() < 100
