"""What holds for every loss, whatever it computes: each file of configs/loss is tested by existing."""

from __future__ import annotations

import inspect
import math
import re
from itertools import pairwise

import pytest
import torch

from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.types import Outputs, Target
from tests.support.devices import OneDevice
from tests.support.losses import FOLDER, NAMES, C, attach, batch, build, cast, ready, settings

LABELLED = [name for name in NAMES if not build(name).of_embeddings]
# value depends on the order of the batch, on chance, or (OF_THE_PAST) on the steps before
OF_THE_PAST = {"taid"}
IN_ORDER = OF_THE_PAST | {
    "dkpp", "cc", "crd", "sum", "crld", "dhkd", "semckd", "mgd", "nd", "diffkd", "sskd", "hsakd", "vitkd",
}  # fmt: skip
PHASES = (0.0, 0.25, 0.75, 1.0)


def value_and_grads(loss: DistillationLoss, student: Outputs, teacher: Outputs, target: Target):
    terms = loss(student, teacher, target)
    terms.total.backward()
    grads = [t.grad for t in (student.logits, *student.features.values()) if t.grad is not None]
    return terms, grads


@pytest.mark.parametrize("name", NAMES)
def test_its_file_teaches(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert re.match(rf"# {name}: .{{20,}}", lines[0]), "the first line is what `kdbench list loss` prints"
    for above, line in pairwise(lines):
        if re.match(r"\s*[a-z]\w*:", line):
            assert " # " in line or (above.startswith("# ") and above != lines[0]), f"no comment: {line}"
    assert set(settings(name)) - {"_target_"} == set(inspect.signature(type(build(name))).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_its_formula_and_paper_are_complete(name):
    loss = build(name)
    assert loss.paper and len(loss.formula) >= 8
    assert not re.search(r"[{}?]|<\w+>|None|nan|\.\.\.", loss.formula), loss.formula
    for weight in loss.weights.values():
        assert weight in (0.0, 1.0) or format(weight, ".10g") in loss.formula, loss.formula


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name, dtype):
    loss = ready(name)
    student, teacher, target = batch(1, name)
    sure = 1000 * (2 * torch.nn.functional.one_hot(target.label.roll(1), C) - 1.0)
    for z_t in (sure, 1000 * teacher.logits.sign(), teacher.logits):
        for z_s in (1000 * student.logits.sign(), -sure, sure, torch.zeros_like(sure)):
            s = cast(student._replace(logits=z_s), dtype, grad=True)
            terms, grads = value_and_grads(loss, s, cast(teacher._replace(logits=z_t), dtype), target)
            assert terms.total.shape == () and terms.total.dtype == torch.float32
            assert terms.total.isfinite() and all(part.isfinite() for part in terms.parts.values())
            assert grads and all(grad.isfinite().all() for grad in grads)
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name):
    loss = ready(name)
    student, teacher, target = batch(2, name)
    s, t = cast(student, torch.float32, grad=True), cast(teacher, torch.float32, grad=True)
    _, grads = value_and_grads(loss, s, t, target)
    assert any(grad.abs().sum() > 0 for grad in grads)
    assert t.logits.grad is None and all(f.grad is None for f in t.features.values())


@pytest.mark.parametrize("name", NAMES)
def test_weights_multiply_their_terms(name):
    loss = ready(name)
    for progress in PHASES:
        student, teacher, target = batch(3, name)
        target = target._replace(progress=torch.tensor(progress))
        terms = loss(student, teacher, target)
        expected = sum(weight * terms.parts[part] for part, weight in loss.weights.items())
        if name not in IN_ORDER:
            assert torch.allclose(loss(student, teacher, target).total, terms.total, rtol=1e-6)
        torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-5)
        assert not any(part.requires_grad for part in terms.parts.values())


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights_are_refused(name):
    known = settings(name)["weights"]
    for bad in (-1.0, math.nan, math.inf, "much"):
        with pytest.raises(UserError, match="weights"):
            build(name, weights={**known, "task": bad})
    with pytest.raises(UserError, match="weights"):
        build(name, weights=dict.fromkeys(known, 0.0)).combine(**dict.fromkeys(known, torch.tensor(1.0)))


@pytest.mark.parametrize("name", LABELLED)
def test_unlabelled_samples_are_left_out_of_the_label_term(name):
    loss = ready(name)
    student, teacher, target = batch(4, name)
    some = target._replace(label=target.label.clone().index_fill_(0, torch.tensor([1, 4]), -1))
    moved = student._replace(logits=student.logits.clone().index_fill_(0, torch.tensor([1, 4]), 50.0))
    for progress in PHASES:
        some = some._replace(progress=torch.tensor(progress))
        parts, others = loss(student, teacher, some).parts, loss(moved, teacher, some).parts
        torch.testing.assert_close(parts["task"], others["task"])
    none = target._replace(label=torch.full_like(target.label, -1))
    s = cast(student, torch.float32, grad=True)
    terms, grads = value_and_grads(loss, s, teacher, none)
    assert terms.total.isfinite() and terms.parts["task"] == 0
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_work_or_are_refused(name):
    loss = ready(name)
    student, teacher, target = batch(5, name)
    soft = target._replace(label=torch.nn.functional.one_hot(target.label, C).float())
    torch.manual_seed(0)
    hard_value = loss(student, teacher, target).total
    torch.manual_seed(0)
    try:
        soft_value = loss(student, teacher, soft).total
    except UserError as error:
        assert f"loss={name.split('_')[0]}" in str(error) and "mixed" in str(error)
    else:
        if name not in ("crd", "sum"):
            torch.testing.assert_close(soft_value, hard_value, rtol=1e-5, atol=1e-5)
        mixed = soft._replace(label=0.6 * soft.label + 0.4 * soft.label.roll(1, 0))
        assert loss(student, teacher, mixed).total.isfinite()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_ORDER])
def test_the_order_of_the_batch_does_not_matter(name):
    loss = ready(name)
    student, teacher, target = batch(6, name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def shuffled(out: Outputs) -> Outputs:
        return Outputs(out.logits[order], {key: value[order] for key, value in out.features.items()})

    value = loss(student, teacher, target).total
    other = Target(target.label[order], target.row[order], target.progress)
    torch.testing.assert_close(loss(shuffled(student), shuffled(teacher), other).total, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_host_sync_and_no_other_device(name):
    """On the meta device a tensor has no values: reading one, branching on one, or a CPU tensor among them fails."""
    loss = ready(name).to("meta")

    def moved(out: Outputs) -> Outputs:
        return Outputs(out.logits.to("meta"), {key: value.to("meta") for key, value in out.features.items()})

    student, teacher, target = batch(7, name)
    attach(loss, student, teacher, "meta")
    student, teacher = cast(moved(student), torch.bfloat16, grad=True), cast(moved(teacher), torch.bfloat16)
    target = Target(*(value.to("meta") for value in target if value is not None))
    with OneDevice():
        terms = loss(student, teacher, target)
        terms.total.backward()
    assert terms.total.device.type == "meta" and terms.total.shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_teacher_is_told(name):
    loss = ready(name)
    student, _, target = batch(8, name)
    if loss.uses_teacher:
        with pytest.raises(UserError, match="needs a teacher"):
            loss(student, None, target)
    else:
        assert loss(student, None, target).total.isfinite()


ALONE = OF_THE_PAST | {"ofa"}  # keeps what is of one student
LOGITS = [name for name in NAMES if not build(name).needs and not build(name).student_needs and name not in ALONE]


@pytest.mark.parametrize("name", LOGITS)
def test_many_students_at_once_under_vmap(name):
    loss = ready(name)
    students = torch.stack([batch(seed, name)[0].logits for seed in (9, 10)])
    _, teacher, target = batch(9, name)
    one = torch.func.vmap(lambda z: loss(Outputs(z, {}), teacher, target).total, randomness="different")(students)
    if name not in IN_ORDER:
        alone = torch.stack([loss(Outputs(z, {}), teacher, target).total for z in students])
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)
    assert one.shape == (2,) and one.isfinite().all()
