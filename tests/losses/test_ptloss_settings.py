"""What a user may set on loss=ptloss, what is refused or warned of, and what it says of itself."""

from __future__ import annotations

import json
import re

import numpy
import pytest
import torch

from kdbench.errors import UserError, under
from kdbench.losses.ptloss import PTLoss, perturbed_kl
from kdbench.losses.ptloss.loss import log
from kdbench.types import Outputs, Target
from tests.support.losses import batch, build, settings

TABLE = [[0.1, 0.2], [0.3, 0.4], [-0.5, 0.6]]


def loss(**changes):
    with under("loss"):
        return PTLoss({"task": 0.1, "distill": 0.9}, **{"order": 2, **changes})


@pytest.mark.parametrize(
    "epsilon, expected",
    [
        (None, [0.0, 0.0]),
        (0.5, [0.5, 0.0]),
        ([0.5], [0.5, 0.0]),
        ([0.5, -0.1], [0.5, -0.1]),
        (TABLE, TABLE),
        ("0.5/m", [0.5, 0.25]),
        (" -1 / m", [-1.0, -0.5]),
        ("1e-1/m", [0.1, 0.05]),
    ],
)
def test_epsilon_in_all_its_forms(epsilon, expected):
    torch.testing.assert_close(loss(epsilon=epsilon).epsilon, torch.tensor(expected))


def test_epsilon_from_files(tmp_path):
    table = torch.tensor(TABLE)
    (tmp_path / "bare.json").write_text(json.dumps(TABLE))
    (tmp_path / "found.json").write_text(json.dumps({"epsilon": TABLE, "tau": 4.0, "count": 3}))
    torch.save(table, tmp_path / "bare.pt")
    torch.save({"epsilon": table}, tmp_path / "found.pt")
    numpy.save(tmp_path / "table.npy", numpy.array(TABLE))
    (tmp_path / "table.csv").write_text("".join(f"{a}, {b}\n" for a, b in TABLE))
    (tmp_path / "row.csv").write_text("0.1,0.2\n")
    for path in tmp_path.iterdir():
        read = loss(epsilon=str(path))
        torch.testing.assert_close(read.epsilon, table[0] if path.name == "row.csv" else table)
        assert not read.doubts
    (doubt,) = loss(epsilon=str(tmp_path / "found.json"), tau=2.0).doubts
    assert doubt == "loss.epsilon was fitted at tau = 4, it does not carry over to 2"


@pytest.mark.parametrize(
    "epsilon, message",
    [
        ([0.1, 0.2, 0.3], "must be at most order = 2 numbers a row; with 3 set order=3"),
        ([[0.1], [0.1, 0.2]], "must be rows of one length, not of 1 and 2"),
        ([[0.1], 0.2], r"epsilon\[0\] = \[0.1\]: must be a number"),
        ([], "must be a number, a list"),
        ([[], []], "must be a number, a list"),
        (["a"], r"epsilon\[0\] = a: must be a number"),
        (True, "epsilon = true: must be a number .* or a list"),
        ([0.1, float("nan")], r"epsilon\[1\] = nan: must be a number"),
        ([[0.1], [float("inf")]], "must be finite, and row 1, eps_1 is inf"),
        ("serch", "= serch: must be a number, a list.*There is no such file"),
        ("none.json", "= none.json: must be a number, a list.*There is no such file"),
    ],
)
def test_epsilon_that_cannot_be(epsilon, message):
    with pytest.raises(UserError, match=message) as caught:
        loss(epsilon=epsilon)
    assert str(caught.value).startswith("loss.epsilon")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"{", "must be readable"),
        ("b.json", b'{"eps": [1]}', "must be a file with the key epsilon"),
        ("c.csv", b"eps_1,eps_2\n1,2\n", "must be readable"),
        ("d.txt", b"1", "must be a file that ends in .json, .pt, .npy or .csv"),
        ("e.pt", b"no torch file", "must be readable"),
        ("f.npy", b"no array", "must be readable"),
        ("g.json", b"[NaN]", "must be finite"),
        ("h.csv", b"", "must be a number, a list"),
        ("i.json", b"\xff\xfe", "must be readable"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        loss(epsilon=str(path))
    assert str(caught.value).startswith(f"loss.epsilon = {path}")


def test_the_number_of_classes_must_fit():
    student = Outputs(torch.zeros(2, 4), {})
    with pytest.raises(UserError, match=r"^epsilon = 3 rows: must be one row for each of the 4 classes"):
        loss(epsilon=TABLE).setup(student, student)
    loss(epsilon=[TABLE[0]] * 4).setup(student, student)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"order": 0}, "loss.order = 0: must be in [1, 100]"),
        ({"tau": 0.0}, "loss.tau = 0.0: must be above 0"),
        ({"tau": float("inf")}, "loss.tau = inf: must be above 0"),
        ({"scale": "tau"}, "loss.scale = tau: must be one of tau2, none"),
        ({"series": "cut"}, "loss.series = cut: must be one of exact, truncated"),
        ({"search": {"counts": 3}}, "loss.search.counts: there is no such key. Did you mean search.count?"),
        ({"search": {"count": 1}}, "loss.search.count = 1: must be at least 2"),
        ({"search": {"seed": -1}}, "loss.search.seed = -1: must be at least 0"),
        ({"search": {"families": ["normal"]}}, "loss.search.families[0] = normal: must be one of r/m, uniform"),
        ({"search": {"orders": [3]}}, "loss.search.orders = [3]: must be null or whole numbers from 1 to order = 2"),
        ({"search": {"r": [-1, 3]}}, "loss.search.r = [-1, 3]: must be two numbers [low, high] with -1 < low < high"),
        ({"search": {"r": [3, 2]}}, "loss.search.r = [3, 2]: must be"),
        ({"search": {"uniform": [-2, 3]}}, "loss.search.uniform = [-2, 3]: must be two numbers [low, high] with -1"),
        ({"search": {"criterion": "accuracy"}}, "loss.search.criterion = accuracy: must be one of brier, nll"),
        ({"search": {"score_at": "teacher"}}, "loss.search.score_at = teacher: must be one of student, proxy"),
        ({"search": {"holdout": 1.0}}, "loss.search.holdout = 1.0: must be in (0, 1)"),
        ({"search": {"samples": 3}}, "loss.search.samples = 3: must be at least 20"),
        ({"search": {"penalties": [0]}}, "loss.search.penalties[0] = 0: must be above 0"),
        ({"search": {"per_class": 1}}, "loss.search.per_class = 1: must be true or false"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError) as caught:
        loss(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "epsilon, order, message",
    [
        ([-1.5], 1, r"eps_1 = -1.5 is below -1/1 \(coefficient test\), .*grows with p near p = 1 \(grid test 1 \+ p S"),
        ([0.0, -0.6], 2, r"eps_2 = -0.6 is below -1/2 .*not convex near p = 1 \(grid test 1 \+ p\^2 K"),
        ([[0.0, 0.0], [0.0, -2.1]], 2, r"eps_2 of class 1 = -2.1 .*grows with p .*not convex"),
        ([3.0, -3.0], 2, r"eps_2 = -3 is below -1/2"),
    ],
)
def test_an_epsilon_outside_the_safe_region_is_named(epsilon, order, message, monkeypatch):
    doubted = loss(epsilon=epsilon, order=order)
    (doubt,) = doubted.doubts
    assert re.search(message, doubt)
    student = Outputs(torch.zeros(2, 2), {})
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    doubted.setup(student, student)
    assert said == [doubt]


@pytest.mark.parametrize("m, threshold", [(2, -0.5), (3, -1.125), (4, -4 / 3), (5, -1.4467592592)])
def test_the_exact_threshold_of_one_order(m, threshold):
    """Convex iff eps_m >= -1 / (m (m-1) (2/m)^2 (1-2/m)^(m-2)), where the coefficient test already fails at -1/m."""
    assert not loss(epsilon=[0.0] * (m - 1) + [threshold * 0.999], order=m).doubts
    (doubt,) = loss(epsilon=[0.0] * (m - 1) + [threshold * 1.001], order=m).doubts
    assert "not convex" in doubt and f"eps_{m}" in doubt


def test_the_cut_series_warns():
    cut = loss(series="truncated")
    assert "its best student is not the teacher even with epsilon = 0" in cut.doubts[0]
    assert "sum_(m<=2) (1 - s_c)^m / m" in cut.formula
    with pytest.raises(UserError, match=r"loss\.series = truncated: must be exact with epsilon=search"):
        loss(series="truncated", epsilon="search")


@pytest.mark.parametrize("scale, factor", [("tau2", 9.0), ("none", 1.0)])
def test_the_weighted_sum(scale, factor):
    student, teacher, target = batch(5)
    epsilon = [[0.1 * c, -0.2] for c in range(7)]
    terms = loss(epsilon=epsilon, tau=3.0, scale=scale)(student, teacher, target)
    distill = factor * perturbed_kl(student.logits, teacher.logits, torch.tensor(epsilon), 3.0).mean()
    torch.testing.assert_close(terms.parts["distill"], distill)
    task = torch.nn.functional.cross_entropy(student.logits, target.label)
    torch.testing.assert_close(terms.total, 0.1 * task + 0.9 * distill)


def test_without_epsilon_it_is_loss_kl():
    """The two files differ by epsilon alone."""
    student, teacher, target = batch(6)
    ours = build("ptloss", epsilon=None)(student, teacher, target)
    torch.testing.assert_close(ours.total, build("kl")(student, teacher, target).total)
    shared = set(settings("kl")) - {"_target_"}
    assert {key: settings("ptloss")[key] for key in shared} == {key: settings("kl")[key] for key in shared}


def test_the_default_never_makes_the_loss_negative():
    default = build("ptloss")
    assert (default.epsilon > 0).all() and not default.needs_calibration
    for seed in range(5):
        student, teacher, target = batch(seed)
        assert default(student, teacher, target).parts["distill"] > 0
    same = default(teacher, teacher, Target(target.label, target.row, target.progress)).parts["distill"]
    assert same > 0  # the perturbation's value at the teacher


def test_the_formula_prints_the_numbers():
    shared = loss(epsilon=[0.25, -0.125], tau=2.0).formula
    assert shared.startswith("0.1 CE(y, s) + 0.9 tau^2 (KL(t || s) + sum_c t_c sum_(m<=2) eps_m (1 - s_c)^m)")
    assert shared.endswith("t and s at tau = 2, eps = [0.25, -0.125]")
    assert loss(epsilon=TABLE).formula.endswith("eps = [[0.1, 0.2], [0.3, 0.4], [-0.5, 0.6]]")
    large = [loss(epsilon=[[0.001 * c, x] for c in range(100)]).formula for x in (0.5, 0.6)]
    assert "100 classes x 2" in large[0] and "min [0, 0.5], max [0.099, 0.5]" in large[0]
    assert large[0].split("sha256 ")[1][:12] != large[1].split("sha256 ")[1][:12]
    assert loss(epsilon="search").formula.endswith("eps = search (not chosen yet)")


def test_it_refuses_to_train_before_the_choice():
    student, teacher, target = batch(1)
    searching = loss(epsilon="search")
    assert searching.needs_calibration
    with pytest.raises(UserError, match="epsilon=search has not been chosen yet"):
        searching(student, teacher, target)
