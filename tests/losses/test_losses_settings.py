"""What a user types: the temperature's limits, values out of range, formulas."""

from __future__ import annotations

import math

import pytest
import torch
from omegaconf import OmegaConf

from kdbench.arguments import locate
from kdbench.errors import UserError
from kdbench.types import Outputs
from tests.support.losses import NAMES, batch, build, ready


@pytest.mark.parametrize("text", ["inf", ".inf", '"inf"', ".Inf", '"+inf"'])
def test_an_infinite_temperature_can_be_typed(text):
    tau = OmegaConf.create(f"tau: {text}").tau
    assert build("kl", tau=tau).tau == math.inf and "tau = inf" in build("kl", tau=tau).formula


@pytest.mark.parametrize("tau", [0, 0.0, "0"])
def test_a_temperature_of_zero_is_the_limit(tau):
    assert build("kl", tau=tau).tau == 0.0 and "argmax t" in build("kl", tau=tau).formula


@pytest.mark.parametrize(
    ("name", "key", "bad"),
    [
        ("kl", "tau", -1), ("kl", "tau", "abc"), ("kl", "tau", math.nan), ("kl", "tau", "-inf"), ("kl", "tau", True),
        ("kl", "tau", None), ("kl", "scale", "tau"), ("kl", "label_smoothing", 1.0), ("kl_reverse", "tau", 0),
        ("js", "tau", math.inf), ("js", "mix", 0.0), ("js", "mix", 1), ("mse", "reduction", "none"),
        ("mse", "center", "mean"), ("mse", "kind", "l1"), ("dkpp", "permutation", "random"), ("dkpp", "tau", 0.0),
        ("dkd", "tau", "4"), ("dkd", "nckd", -1.0), ("dkd", "warmup", 20), ("nkd", "gamma", math.inf),
        ("dist", "inter", -1), ("logit_std", "base", "mse"), ("ctkd", "start", 0.0), ("ctkd", "ramp", -0.1),
        ("ttm", "tau", -4), ("tfkd_virtual", "correct", 1.0), ("polyn", "epsilon", []),
        ("polyn", "epsilon", [0.0, -0.6]),
        ("polyn", "epsilon", "a"), ("poly1", "epsilon", -1.5), ("focal", "gamma", -1), ("annealing", "tau_max", 0),
        ("annealing", "tau_max", 2.5), ("annealing", "switch", 1.5), ("annealing", "reduction", "batchmean"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_key(name, key, bad):
    with pytest.raises(UserError, match=rf"^loss\.{key}"):
        build(name, **{key: bad})


@pytest.mark.parametrize("tau", [0, "inf"])
def test_limits_need_the_factor(tau):
    with pytest.raises(UserError, match=r"loss\.scale = none: must be tau2 with tau="):
        build("kl", tau=tau, scale="none")


def test_unknown_weights_are_refused():
    with pytest.raises(UserError, match=r"^loss\.weights\.soft = 0\.9: .* this loss has the terms task, distill"):
        build("kl", weights={"task": 0.1, "soft": 0.9})


@pytest.mark.parametrize(("old", "new"), [("needs_means", "surveyed"), ("learn_means", "survey")])
def test_a_hook_by_its_old_name_is_refused_with_its_new_one(old, new, tmp_path, monkeypatch):
    """Nothing would call it: the loss would train without what it was to learn."""
    source = f"from kdbench.losses.base import DistillationLoss\nclass Own:\n    {old} = None\n"
    (tmp_path / f"own_{old}.py").write_text(f"{source}class Mine(Own, DistillationLoss):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"Mine\.{old}: this hook is called {new} now"):
        locate(f"own_{old}.Mine")


def test_formulas():
    assert build("kl").formula == "0.1 CE(y, s) + 0.9 tau^2 KL(t/tau || s/tau), tau = 4"
    assert build("ban").formula == "tau^2 KL(t/tau || s/tau), tau = 1"
    assert build("ce", label_smoothing=0.1).formula == "CE(y smoothed by 0.1, s)"
    assert build("ba_caruana").formula == "0.5 sum_k (s_k - t_k)^2"
    assert build("kim_mse").formula == "mean_k (s_k - t_k)^2"
    assert build("poly1").formula == "(CE(y, s) + 2 (1 - p_y)^1), p = softmax(s)"
    assert "8 NCKD" in build("dkd").formula and "0.0833" in build("dkd").formula


def test_labels_of_one_class_of_many_can_be_soft():
    """Mixed labels [B, C] in the label term: the mixture's cross-entropy, rows without an entry left out."""
    student, teacher, target = batch(0)
    label = torch.nn.functional.one_hot(target.label, student.logits.shape[1]).float()
    mixed = 0.3 * label + 0.7 * label.roll(1, 0)
    expected = -(mixed * student.logits.log_softmax(1)).sum(1)
    mixed[2] = -1.0
    value = build("kl")(student, teacher, target._replace(label=mixed)).parts["task"]
    torch.testing.assert_close(value, expected[torch.arange(len(label)) != 2].mean())
    with pytest.raises(UserError, match="loss=nkd needs one class a sample"):
        build("nkd")(student, Outputs(teacher.logits, {}), target._replace(label=mixed))


@pytest.mark.parametrize("name", [name for name in NAMES if build(name).views == 1 and not build(name).of_embeddings])
def test_losses_of_one_class_say_so_and_all_others_take_mixed_labels(name):
    """Fourteen losses refused mixtures in their first step, after the teacher had been trained."""
    loss = ready(name)
    student, teacher, target = batch(0, name)
    label = torch.nn.functional.one_hot(target.label, student.logits.shape[1]).float()
    mixed = target._replace(label=0.3 * label.roll(1, 0) + 0.7 * label)
    if loss.needs_one_class:
        with pytest.raises(UserError, match="needs one class a sample"):
            loss(student, teacher, mixed)
    else:
        assert loss(student, teacher, mixed).total.isfinite()


@pytest.mark.parametrize("name", ["dkd", "ofa"])
def test_of_a_mixed_label_the_larger_share_counts(name):
    loss = ready(name)
    student, teacher, target = batch(0)
    label = torch.nn.functional.one_hot(target.label, student.logits.shape[1]).float()
    mixed = 0.3 * label.roll(1, 0) + 0.7 * label
    mixed[2] = 0.0
    whole, found = (
        loss(student, teacher, target._replace(label=own)).parts["distill"]
        for own in (torch.where(torch.arange(len(label)) == 2, -1, target.label), mixed)
    )
    torch.testing.assert_close(found, whole)


# (epoch of 8, what min(epoch / warmup epochs, 1) is for a warm-up of 4, epochs counted from 1)
@pytest.mark.parametrize(("epoch", "share"), [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0), (7, 1.0)])
@pytest.mark.parametrize("name", ["dkd", "rld", "logit_std_dkd"])
def test_warm_ups_can_be_constant_within_an_epoch(name, epoch, share):
    student, teacher, target = batch(2)
    loss, full = build(name, warmup=0.5, steps="epoch"), build(name, warmup=0.0)
    loss.epochs = 8
    expected = share * full(student, teacher, target).parts["distill"]
    for step in range(5):  # of 5 in an epoch, in float32 as a training gives it
        progress = torch.tensor((5 * epoch + step) / 40, dtype=torch.float64).float()
        found = loss(student, teacher, target._replace(progress=progress)).parts["distill"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_ctkd_s_lambda_by_epochs_is_the_authors_cosine():
    """CosineDecay(0, -1, 10) of epochs counted from 1: 0.0245, 0.0955, ... 1 from the tenth on."""
    student, teacher, target = batch(2)
    grads = {}
    for steps, progress in (("epoch", 0.0), ("epoch", 1.5 / 240), ("epoch", 9.0 / 240), ("batch", 1.0)):
        loss = build("ctkd", ramp=10 / 240, steps=steps)
        loss.epochs = 240
        loss(student, teacher, target._replace(progress=torch.tensor(progress))).total.backward()
        grads[steps, progress] = loss.theta.grad.item() / build_full(student, teacher, target)
    assert grads["epoch", 0.0] == pytest.approx((1 - math.cos(math.pi / 10)) / 2, rel=1e-5)
    assert grads["epoch", 1.5 / 240] == pytest.approx((1 - math.cos(math.pi / 5)) / 2, rel=1e-5)
    assert grads["epoch", 9.0 / 240] == pytest.approx(1.0) == grads["batch", 1.0]


def build_full(student: Outputs, teacher: Outputs, target) -> float:
    """theta's gradient with lambda = 1."""
    loss = build("ctkd", ramp=0.0)
    loss(student, teacher, target).total.backward()
    return loss.theta.grad.item()
