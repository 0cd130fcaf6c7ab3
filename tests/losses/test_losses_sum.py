"""Several losses as one: the sum is the sum, its parts keep what is theirs, tables serve it where they can."""

from __future__ import annotations

import pytest
import torch

from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.losses.sum import Sum
from kdbench.types import Parts
from tests.support.losses import attach, batch, build, cast, ready, settings
from tests.support.shell import TINY, kdbench, result, train


def part(name: str, **changes):
    """A part with its label term left to the sum."""
    return {**settings(name), "weights": {**settings(name)["weights"], "task": 0.0}, **changes}


def test_the_sum_is_the_sum_of_value_and_gradient():
    """CRD+KD in small: r CE + a KL + b AT equals the three by themselves, with gradients of logits and features."""
    student, teacher, target = batch(1)
    both = build("sum", parts={"kl": part("kl"), "at": part("at")}, weights={"task": 0.5, "kl": 2.0, "at": 3.0})
    both.setup(student, teacher)
    s = cast(student, torch.float64, grad=True)
    terms = both(s, cast(teacher, torch.float64), target)
    terms.total.backward()
    alone = cast(student, torch.float64, grad=True)
    kl, at = build("kl", weights={"task": 0.0, "distill": 0.9}), build("at", weights={"task": 0.0, "distill": 1000.0})
    apart = [loss(alone, cast(teacher, torch.float64), target).total for loss in (kl, at)]
    total = 0.5 * kl.task(alone.logits, target.label) + 2 * apart[0] + 3 * apart[1]
    total.backward()
    torch.testing.assert_close(terms.total, total)
    torch.testing.assert_close(s.logits.grad, alone.logits.grad)
    torch.testing.assert_close(s.features["stage2"].grad, alone.features["stage2"].grad)
    assert terms.parts["at_distill"] > 0 and both.needs == ("stage1", "stage2", "stage3")
    assert "2 (0.9 tau^2 KL" in both.formula and "3 (1000 sum_l" in both.formula


def test_it_reads_what_its_parts_read_and_asks_what_they_ask():
    assert build("sum", parts={"kl": part("kl"), "std": part("logit_std")}, weights={}).least_classes == 3
    assert not build("sum", parts={"kl": part("kl"), "dkd": part("dkd")}, weights={}).needs
    assert build("sum", parts={"ce": settings("ce")}, weights={"task": 0.0}).uses_teacher is False
    assert build("sum", parts={"kl": part("kl"), "at": part("at")}, weights={"at": 0.0}).needs == ()
    assert list(ready("sum").parameters())  # crd's embeddings train with the student


@pytest.mark.parametrize(
    ("parts", "weights", "key"),
    [
        ({}, {}, "parts"),
        ({"task": settings("kl")}, {}, "parts"),
        ({"keys": settings("kl")}, {}, "parts"),
        ({"kl": 3}, {}, r"parts\.kl"),
        ({"kl": settings("kl")}, {"crd": 1.0}, r"weights\.crd"),
        ({"kl": part("kl", tau=-1)}, {}, r"parts\.kl\.tau"),
    ],
)
def test_wrong_parts_are_refused_by_name(parts, weights, key):
    with pytest.raises(UserError, match=rf"^loss\.{key}"):
        build("sum", parts=parts, weights=weights)


def test_views_that_a_part_compares_are_asked_for():
    two = build("sum", parts={"kl": part("kl"), "crld": part("crld")}, weights={})
    assert (two.views, two.apart) == (2, True)
    four = build("sum", parts={"kl": part("kl"), "sskd": part("sskd")}, weights={})
    assert (four.views, four.apart) == (4, False)
    assert build("sum", parts={"kl": part("kl"), "crld": part("crld")}, weights={"crld": 0.0}).views == 1
    both = build("sum", parts={"crld": part("crld"), "sskd": part("sskd")}, weights={})
    with pytest.raises(UserError, match=r"^loss\.parts = .*: must be such that all compare as many views"):
        _ = both.views


def test_a_sum_is_for_embeddings_if_its_parts_are():
    two = {"cosine": settings("cosine"), "relational": settings("relational")}
    assert build("sum", parts=two, weights={"task": 0.0}).of_embeddings
    mixed = {**two, "kl": part("kl")}
    assert not build("sum", parts=mixed, weights={"cosine": 0.0, "relational": 0.0}).of_embeddings
    with pytest.raises(UserError, match=r"^loss\.parts = .*: must be such that all are for classes, or all for embed"):
        _ = build("sum", parts=mixed, weights={}).of_embeddings


def test_what_a_part_refuses_bears_its_place():
    loss = build("sum", parts={"crd": settings("crd")}, weights={})
    student, teacher, _ = batch(1)
    loss.train_rows = 50
    loss.parts["crd"].images = 49
    with pytest.raises(UserError, match=r"^parts\.crd\.images = 49: must be null, or 50 or more"):
        loss.setup(student, teacher)
    beside = build("sum", parts={"it": settings("fcfd")}, weights={})
    with pytest.raises(UserError, match=r"^parts\.it = fcfd: must be another here: it enters networks"):
        beside.attach(Parts(None, {}, torch.nn.Identity()), Parts(None, {}, torch.nn.Identity()))


@pytest.mark.parametrize("name", ["sskd", "hsakd", "vitkd", "fcfd"])
def test_a_part_that_turns_images_or_looks_into_networks_counts_as_by_itself(name):
    torch.manual_seed(0)
    alone, beside = ready(name), build("sum", parts={"it": settings(name)}, weights={"task": 0.0, "it": 0.5})
    student, teacher, target = batch(3, name)
    attach(beside, student, teacher)
    beside.setup(student, teacher)
    beside.parts["it"].load_state_dict(alone.state_dict())
    beside.parts["it"]._networks = getattr(alone, "_networks", ())
    torch.manual_seed(1)
    expected = alone(student, teacher, target).total
    torch.manual_seed(1)
    torch.testing.assert_close(beside(student, teacher, target).total, 0.5 * expected)
    first = alone.first_training
    assert (first is None) == (beside.first_training is None)
    if first is not None:
        assert beside.first_training._replace(loss=first.loss) == first._replace(place="parts.it.")


def test_nothing_that_a_loss_may_ask_for_is_forgotten():
    """Everything that the engine asks a loss is answered for the parts, or stays each part's own."""
    asked = {name for name, of in vars(DistillationLoss).items() if name[0] != "_" and not callable(of)}
    own = {"batch_size", "epochs", "train_rows", "steps"}  # handed to the parts, or read by themselves
    assert asked - vars(Sum).keys() == own | {"terms", "task_text"}  # made of its weights


def test_parts_are_chosen_on_the_command_line(capfd):
    """KL beside DKD from a table equals the same from the live teacher; beside AT no table can serve."""
    words = ["loss=sum", "loss@loss.parts.crd=dkd", "loss.weights={task: 1, kl: 1, crd: 1}", "loss.parts.kl.tau=2"]
    live = train(*words, "teacher.table=off", "hydra.run.dir=live")
    table = train(*words, "teacher.table=on", "hydra.run.dir=table")
    assert result(live)["student"] == result(table)["student"]
    assert "(tau^2 KL(t/tau || s/tau), tau = 2) + (0.8 r" in capfd.readouterr().out
    assert kdbench("train", *TINY, "loss=sum", "+loss@loss.parts.at=at", "teacher.table=on") == 1
    assert "must be auto or off, since loss=sum reads the teacher's features" in capfd.readouterr().err


def test_a_sum_may_be_a_part_of_a_sum():
    parts = ["loss=sum", "+loss@loss.parts.d=sum", "+loss@loss.parts.d.parts.at=at", "loss.parts.d.parts.kl.tau=2"]
    few = [f"loss.parts.{place}crd.negatives=8" for place in ("", "d.parts.", "d.parts.e.parts.")]
    folder = train(*parts, "+loss@loss.parts.d.parts.e=sum", *few, "schedule.epochs=1")
    assert result(folder)["formula"].count("tau = 2") == 1
