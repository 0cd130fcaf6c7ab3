"""Choosing epsilon for a teacher whose faults are known: does the choice help where it had no say?"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from kdbench.errors import UserError
from kdbench.losses.ptloss import PTLoss, proxy_teacher
from kdbench.losses.ptloss.calibration import log, split
from kdbench.losses.ptloss.candidates import SearchOptions, draw
from kdbench.losses.ptloss.criteria import CRITERIA
from kdbench.losses.ptloss.fitting import fit_path
from kdbench.losses.ptloss.functional import horner, orders
from kdbench.losses.ptloss.scoring import score_all, score_exactly
from kdbench.types import Outputs

HELD = 2000  # fresh samples that judge


@pytest.fixture(autouse=True)
def said(monkeypatch) -> list[str]:
    """The warnings logged, without the handlers that a run inside an earlier test may have left behind."""
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *values: lines.append(text % values))
    return lines


def truth(samples: int, classes: int, seed: int) -> Tensor:
    """log p*, [samples, classes]: some samples nearly certain, some not."""
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(samples, classes, generator=random, dtype=torch.float64)).log_softmax(-1)


def planted(log_truth: Tensor, epsilon: Tensor, tau: float = 1.0) -> Tensor:
    """Logits of the teacher whose best student under epsilon predicts the truth: t = p / g(p) at tau, normalised."""
    p = (log_truth / tau).softmax(-1)
    g = 1 + p * horner(1 - p, epsilon * orders(epsilon))
    return tau * (p / g).log()


def labels(log_truth: Tensor, seed: int) -> Tensor:
    return log_truth.exp().multinomial(1, generator=torch.Generator().manual_seed(seed)).squeeze(-1)


def loss(method: str, tau: float = 1.0, order: int = 5, **search) -> PTLoss:
    return PTLoss({"task": 0.0, "distill": 1.0}, order=order, epsilon=method, tau=tau, search=search)


def distance(log_truth: Tensor, logits: Tensor, epsilon: Tensor, tau: float) -> float:
    """Mean squared distance from the truth to what the best student of this teacher predicts at temperature 1."""
    proxy = proxy_teacher((logits / tau).softmax(-1), epsilon).probability
    return float(((tau * proxy.log()).softmax(-1) - log_truth.exp()).square().sum(-1).mean())


SHARED = torch.tensor([-0.8, -0.4, -0.25, -0.2, -0.15], dtype=torch.float64)  # the teacher is overconfident
PER_CLASS = torch.tensor([[-0.9], [3.0], [0.0], [-0.6], [1.0]], dtype=torch.float64)  # and unfair to some classes


@pytest.mark.parametrize("method", ["search", "gradient"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("planted_epsilon", [SHARED, PER_CLASS], ids=["shared", "per class"])
def test_it_finds_a_proxy_nearer_to_the_truth(method, tau, planted_epsilon):
    per_class = planted_epsilon.dim() == 2
    truths = truth(1500, 5, seed=1), truth(HELD, 5, seed=2)
    logits = [planted(x, planted_epsilon, tau) for x in truths]
    assert distance(truths[1], logits[1], planted_epsilon, tau) < 1e-16  # planted indeed
    found = loss(method, tau, order=planted_epsilon.shape[-1], per_class=per_class, count=120)
    record = found.calibrate(logits[0].float(), labels(truths[0], 3)).record
    teacher = distance(truths[1], logits[1], torch.zeros(1), tau)
    chosen = distance(truths[1], logits[1], found.epsilon.double(), tau)
    assert chosen < (0.75 if method == "search" and per_class else 0.35) * teacher
    assert record["held_out_gain"] > 0 and record["residual"] < 1e-9
    for scores in record["scores"].values():
        assert scores["best"] < scores["teacher"]


@pytest.mark.parametrize("method", ["search", "gradient"])
def test_a_calibrated_teacher_is_left_nearly_alone(method):
    """Labels drawn from the teacher itself: nothing can be gained, and little is lost by choosing from few labels."""
    z = truth(4000, 5, seed=4)
    found = loss(method)
    record = found.calibrate(z, labels(z, 5)).record
    assert distance(z, z, found.epsilon.double(), 1.0) < 2e-3
    assert abs(record["held_out_gain"]) < 4 * record["held_out_stderr"] + 1e-12


def test_the_unsquared_norm_misleads(said):
    """The paper's score of a perfectly calibrated teacher is best far away from it; the squared norm's is at it."""
    z = truth(6000, 5, seed=6)
    y = labels(z, 7)
    far = {}
    for criterion in CRITERIA:
        options = SearchOptions.of({"criterion": criterion}, 5)
        candidates = draw(options, 5, 5)
        scores = score_all(z.exp(), y, candidates, options, 1.0).mean(1)
        far[criterion] = distance(z, z, candidates[int(scores.argmin())].epsilon, 1.0)
    assert max(far["brier"], far["nll"]) < 1e-3 < 1e-2 < min(far["l2"], far["l2_entropy"])
    loss("search", criterion="l2", count=3).calibrate(z[:100], y[:100])
    assert "criterion=l2 is not a proper score" in said[0]


@pytest.mark.parametrize("method", ["search", "gradient"])
def test_held_out_labels_have_no_say(method):
    z, seed = truth(400, 4, seed=8), 11
    y = labels(z, 9)
    others = y.clone()
    held = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:200]  # the first half of the shuffle
    others[held] = (others[held] + 1) % 4
    results = []
    for label in (y, others):
        found = loss(method, count=20, seed=seed)
        results.append((found, found.calibrate(2 * z, label).record))
    (a, first), (b, second) = results
    assert torch.equal(a.epsilon, b.epsilon) and first["scores"]["choose"] == second["scores"]["choose"]
    assert first["scores"]["held_out"] != second["scores"]["held_out"]


def test_a_worse_result_is_said(said):
    z = truth(200, 4, seed=8)
    y = labels(z, 9)
    held = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100]
    y[held] = z[held].argmax(-1)  # the held-out half wants a sharper proxy, the other half a smoother one
    assert loss("search", count=50).calibrate(3 * z, y).record["held_out_gain"] < 0
    assert "worse than the plain teacher on held-out images: brier is" in said[-1]


def test_images_are_dealt_out_once():
    z = truth(300, 3, seed=1)
    y = labels(z, 1)
    y[:50] = -1
    options = SearchOptions.of({"holdout": 0.4, "samples": 200}, 5)
    for method, parts in (("search", ["choose", "held_out"]), ("gradient", ["fit", "choose", "held_out"])):
        images = split(z, y, method, options, 1.0)
        rows = torch.cat([getattr(images, part) for part in parts])
        assert sorted(rows.tolist()) == list(range(200)) and len(images.held_out) == 80
        assert (images.label >= 0).all()


def test_what_is_recorded():
    z = truth(120, 4, seed=2)
    calibration = loss("search", count=7, seed=5, per_class=True).calibrate(2 * z, labels(z, 2))
    record, table = calibration.record, calibration.table
    assert calibration.name == "epsilon" and json.loads(json.dumps(record)) == record
    assert [record[k] for k in ("method", "count", "seed", "criterion", "order", "tau")] == [
        "search",
        7,
        5,
        "brier",
        5,
        1.0,
    ]
    assert record["images"] == {"all": 120, "choose": 60, "held_out": 60} and record["seconds"] > 0
    assert torch.tensor(record["epsilon"]).shape == (4, 5) and 0 < record["strength"] < 10
    assert [row["rank"] for row in table] == list(range(1, 8)) and table == sorted(table, key=lambda row: row["choose"])
    assert table[0]["origin"] == record["origin"] and sum(row["origin"].startswith("teacher") for row in table) == 1
    assert table[0]["choose"] == pytest.approx(record["scores"]["choose"]["best"], abs=1e-5)
    assert table[0]["held_out"] == pytest.approx(record["scores"]["held_out"]["best"], abs=1e-5)
    assert set(calibration.figures) == {"curves", "candidates"}
    for figure in calibration.figures.values():
        figure.canvas.draw()
        assert len(figure.axes[0].lines) >= 3 and figure.axes[0].get_xlabel()


def test_the_same_seed_gives_the_same_choice():
    z = truth(200, 4, seed=2)
    y = labels(z, 2)
    for method in ("search", "gradient"):
        a, b = loss(method, count=30), loss(method, count=30)
        same = a.calibrate(2 * z, y).table == b.calibrate(2 * z, y).table
        assert same and torch.equal(a.epsilon, b.epsilon)


@pytest.mark.parametrize("per_class", [False, True])
def test_candidates_are_safe_and_in_range(per_class):
    options = SearchOptions.of({"per_class": per_class, "count": 101, "orders": [1, 4], "uniform": [-1, 0.5]}, 5)
    candidates = draw(options, 5, 3)
    assert len(candidates) == 101 and not candidates[0].epsilon.any()
    m = torch.arange(1, 6)
    for candidate in candidates:
        assert candidate.epsilon.shape == ((3, 5) if per_class else (5,))
        assert (1 + m * candidate.epsilon >= -1e-12).all() and candidate.epsilon[..., 4].abs().max() == 0
    uniform = torch.stack([c.epsilon for c in candidates if c.origin.startswith("uniform")])
    ratio = torch.stack([c.epsilon for c in candidates if c.origin.startswith("r/m")])
    assert uniform.max() <= 0.5 and 4 <= ratio[..., 0].max() <= 8 and -0.95 <= ratio[..., 0].min() < -0.8
    assert {c.origin.split()[1] for c in candidates[1:]} == {"M=1", "M=4"}
    again = draw(options, 5, 3)
    assert all(torch.equal(a.epsilon, b.epsilon) for a, b in zip(candidates, again))


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_quick_scores_are_the_exact_ones(per_class, criterion):
    z = truth(60, 12, seed=3)
    options = SearchOptions.of({"per_class": per_class, "criterion": criterion, "count": 20, "r": [-0.99, 50]}, 5)
    candidates = draw(options, 5, 12)
    quick = score_all((z / 2).softmax(-1), labels(z, 3), candidates, options, 2.0)
    for k, candidate in enumerate(candidates):
        exact = score_exactly((z / 2).softmax(-1), labels(z, 3), candidate.epsilon, options, 2.0)
        torch.testing.assert_close(quick[k], exact.score.float(), rtol=2e-4, atol=2e-5)
        assert exact.residual < 1e-9


@pytest.mark.parametrize("per_class", [False, True])
def test_a_penalty_pulls_towards_the_teacher(per_class):
    z = truth(300, 4, seed=8)
    options = SearchOptions.of({"per_class": per_class, "penalties": [10, 1e6, 0.01]}, 3)
    path = fit_path((2 * z).softmax(-1), labels(z, 9), options, 3, 1.0)
    sizes = [float(candidate.epsilon.abs().max()) for candidate in path]
    assert sizes[0] == 0 and sizes[1] < 1e-3 < 0.02 < sizes[2] < sizes[3] / 1.5
    assert [candidate.origin.split("penalty=")[-1] for candidate in path[1:]] == ["1e+06", "10", "0.01"]


def test_criteria_by_hand():
    log_p, y = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([1])
    values = {name: float(criterion(log_p, y)) for name, criterion in CRITERIA.items()}
    squared = 0.49 + 0.64 + 0.01
    expected = {"brier": squared, "nll": 1.6094379, "l2": squared**0.5, "l2_entropy": squared**0.5 + 0.8018186}
    assert values == pytest.approx(expected, abs=1e-6)


def test_a_checkpoint_carries_the_choice():
    z = truth(100, 4, seed=2)
    for per_class in (False, True):
        first, second = (loss("search", per_class=per_class, count=10) for _ in range(2))
        for one in (first, second):
            one.setup(Outputs(z[:2].float(), {}), None)
            assert one.needs_calibration
        shape = first.epsilon.shape
        first.calibrate(2 * z, labels(z, 2))
        assert first.epsilon.shape == shape and not first.needs_calibration
        second.load_state_dict(first.state_dict())
        assert not second.needs_calibration and torch.equal(first.epsilon, second.epsilon)
        assert first.formula == second.formula
        third = loss("search", per_class=per_class, count=10)
        third.setup(Outputs(z[:2].float(), {}), None)
        third.load_state_dict({"epsilon": torch.full(shape, torch.nan)})  # saved before the choice
        assert third.needs_calibration


def test_what_cannot_be_calibrated(said):
    z = truth(100, 4, seed=2)
    y = labels(z, 2)
    with pytest.raises(UserError, match="at least 20 labelled validation samples, there are 10"):
        loss("search").calibrate(z, torch.where(torch.arange(100) < 10, y, -1))
    with pytest.raises(UserError, match="logits \\[N, C\\] and labels \\[N\\]"):
        loss("search").calibrate(z, torch.rand(100, 4))
    with pytest.raises(UserError, match="not finite"):
        loss("search").calibrate(z * torch.nan, y)
    with pytest.raises(UserError, match="must be search or gradient"):
        PTLoss({"distill": 1.0}).calibrate(z, y)
    loss("search", count=2, per_class=True).calibrate(z[:30], y[:30])
    assert any("under 10 a class" in line for line in said)
