"""The feature losses: against other people's code (peer_features.json), and what a network may hand them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.losses.ofa import TokenBranch
from kdbench.losses.ofd import margins
from kdbench.losses.rkd import differences, distances
from kdbench.types import Outputs, Target
from tests.support.losses import C, attach, batch, build, cast, ready, settings

CASES = json.loads(Path(__file__).with_name("peer_features.json").read_text(encoding="utf-8"))["cases"]
SHAPES = {
    "stage1": ((4, 3, 4, 4), (4, 4, 4, 4)),
    "stage2": ((4, 4, 4, 4), (4, 5, 2, 2)),
    "stage3": ((4, 6, 2, 2), (4, 6, 2, 2)),
    "pooled": ((4, 6), (4, 7)),
}
PLAIN = ("at", "cat_kd", "fsp", "kdsvd", "norm", "nst", "pkt", "rkd", "simkd", "sp")  # without layers of their own
ADAPTED = (
    "afd", "cc", "crd", "diffkd", "fitnet", "ft", "hsakd", "ickd", "itrd", "mgd", "nd", "ofd", "reviewkd", "semckd",
    "srrl", "sskd", "vid", "vitkd", "vkd", "wkd_f",
)  # fmt: skip
FEATURE = (*PLAIN, *ADAPTED)


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.5) -> torch.Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


def networks() -> tuple[Outputs, Outputs]:
    """The fixed student and teacher that the peers' numbers belong to."""
    student = {key: wave(shape[0], 0.2 + i) for i, (key, shape) in enumerate(SHAPES.items())}
    teacher = {key: wave(shape[1], 0.7 + i) for i, (key, shape) in enumerate(SHAPES.items())}
    student["other"], teacher["other"] = wave((4, 6, 4, 4), 5.2), wave((4, 6, 4, 4), 5.7)
    zeros = torch.zeros(4, C, dtype=torch.float64)
    return cast(Outputs(zeros, student), torch.float64, grad=True), Outputs(zeros, teacher)


def filled(loss: DistillationLoss) -> DistillationLoss:
    """Adapters and memories with the weights that the peers' had."""
    for i, parameter in enumerate(loss.parameters()):
        parameter.data = wave(tuple(parameter.shape), 0.1 * i, 0.5)
    for i, memory in enumerate(getattr(loss, "memory", [])):
        memory.rows.copy_(wave(tuple(memory.rows.shape), 0.4 + 0.5 * i, 0.6))
    return loss


@pytest.mark.parametrize("case", CASES, ids=[f"{case['loss']}-{i}" for i, case in enumerate(CASES)])
def test_value_and_gradient_equal_the_peer_s(case, monkeypatch):
    student, teacher = networks()
    loss = build(case["loss"], **case["changes"], weights={"task": 0.0, "distill": 1.0}).double()
    loss.setup(student, teacher)
    loss = filled(loss.double())
    monkeypatch.setattr(torch, "randint", lambda *args, **options: torch.tensor(case["draws"]))
    index = torch.tensor(case.get("index", [0, 1, 2, 3]))
    target = Target(torch.zeros(4, dtype=torch.long), index, torch.tensor(case.get("progress", 0.0)).double())
    for _ in range(case.get("visits", 1)):
        for feature in student.features.values():
            feature.grad = None
        total = loss(student, teacher, target).total
        total.backward()
    assert total.item() == pytest.approx(case["value"], rel=1e-7)
    for key, grad in case["grad"].items():
        found = student.features[key].grad.flatten()
        torch.testing.assert_close(found, torch.tensor(grad, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FEATURE)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_and_large_features_stay_finite(name, scale, dtype):
    loss = ready(name)
    student, teacher, target = batch(1, name)
    student = cast(
        student._replace(features={key: scale * value for key, value in student.features.items()}), dtype, grad=True
    )
    terms = loss(student, cast(teacher, dtype), target)
    terms.total.backward()
    grads = [feature.grad for feature in student.features.values() if feature.grad is not None]
    assert terms.total.isfinite() and grads and all(grad.isfinite().all() for grad in grads)
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


@pytest.mark.parametrize("name", FEATURE)
def test_a_missing_feature_is_told(name):
    loss = build(name, **{"images": 400} if name == "crd" else {})
    student, teacher, _ = batch(2, name)
    attach(loss, student, teacher)
    bare = Outputs(student.logits, {"stage0": student.logits})
    assert loss.needs
    assert set(ready(name).needs) <= {"stem", "stage1", "stage2", "stage3", "pooled", "block1", "block2", "tokens"}
    with pytest.raises(UserError, match=r"the student has (only stage0|no map)|does not extend its students"):
        loss.setup(bare, teacher)
        loss(bare, teacher, batch(2, name)[2])


@pytest.mark.parametrize("name", FEATURE)
def test_adapters_train_and_are_made_once(name):
    """What setup makes are parameters (they train with the student), and only the losses that need them have any."""
    loss = ready(name)
    student, teacher, target = batch(3, name)
    loss(cast(student, torch.float32, grad=True), teacher, target).total.backward()
    assert bool(list(loss.parameters())) == (name in ADAPTED)
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    again = ready(name)
    again.load_state_dict(loss.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["at", "sp", "nst", "vid", "fsp", "reviewkd"])
def test_layers_are_a_list_of_names(name):
    for bad in ("stage1", [], ["stage1", "stage1"], [1, 2]):
        with pytest.raises(UserError, match=r"loss\.layers"):
            build(name, layers=bad)


@pytest.mark.parametrize("name", ["fsp", "kdsvd"])
def test_one_common_layer_has_nothing_between_layers(name):
    for layers in ("last", ["stage1"]):
        with pytest.raises(UserError, match=r"^loss\.layers = .*: must be all, or a list of two layers or more"):
            build(name, layers=layers)
    student, teacher, _ = batch(2, name)
    alone = {key: value for key, value in student.features.items() if key not in ("stem", "stage2", "stage3")}
    with pytest.raises(UserError, match=r"^layers = all: must be two layers or more, and both networks have stage1 al"):
        build(name, layers="all").setup(student._replace(features=alone), teacher)


def staged(widths: list[int], seed: float, samples: int = 4) -> Outputs:
    """A network's stages of these widths, each half as large as the one before, and what comes before the ReLU."""
    features = {}
    for i, width in enumerate(widths):
        before = wave((samples, width, 16 >> i, 16 >> i), seed + i)
        features |= {f"stage{i + 1}": before.relu(), f"stage{i + 1}.pre": before}
    features["stem"] = wave((samples, widths[0], 16, 16), seed - 1).relu()
    features["pooled"] = features[f"stage{len(widths)}"].mean((2, 3))
    return Outputs(torch.zeros(samples, C, dtype=torch.float64), features)


THREE, FOUR = [4, 6, 8], [4, 6, 8, 8]
CHOSEN = [
    ("at", FOUR, FOUR, ["stage1", "stage2", "stage3", "stage4"], ["stage1", "stage2", "stage3", "stage4"]),
    ("nst", FOUR, THREE, ["stage1", "stage2", "stage3"], ["stage1", "stage2", "stage3"]),
    ("vid", THREE, FOUR, ["stage1", "stage2", "stage3"], ["stage1", "stage2", "stage3"]),
    ("sp", FOUR, FOUR, ["stage4"], ["stage4"]),
    ("sp", FOUR, THREE, ["stage4"], ["stage3"]),
    ("fsp", THREE, THREE, ["stem", "stage1", "stage2", "stage3"], ["stem", "stage1", "stage2", "stage3"]),
    (
        "reviewkd", FOUR, FOUR, ["stage1", "stage2", "stage3", "stage4", "pooled"],
        ["stage1.pre", "stage2.pre", "stage3.pre", "stage4.pre", "pooled"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "other", "read", "taught"), CHOSEN)
def test_layers_follow_the_networks(name, own, other, read, taught):
    """The defaults: what the field's code reads of networks of three and of four stages. Naming them is the same."""
    student, teacher = staged(own, 0.3), staged(other, 1.4)
    loss = build(name).double()
    loss.setup(student, teacher)
    assert loss.student_needs == tuple(read) and loss.needs == tuple(taught)
    named = build(name, layers={"student": read, "teacher": taught}).double()
    named.setup(student, teacher)
    named.load_state_dict(loss.state_dict())
    target = Target(torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor(1.0).double())
    only = Outputs(teacher.logits, {key: teacher.features[key] for key in taught})  # all that a training keeps
    total = loss.double()(student, only, target).total
    assert torch.equal(total, named.double()(student, teacher, target).total) and total > 0
    assert ", ".join(read) in loss.formula and (read == taught or f"teacher: {', '.join(taught)}" in loss.formula)


# What RepDistiller's criteria give on feat[1:-1] (sp: feat[-2]) of the fixed maps above; (student, teacher) widths.
OFFICIAL = json.loads(Path(__file__).with_name("peer_stages.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", OFFICIAL, ids=[f"{case['loss']}-{i}" for i, case in enumerate(OFFICIAL)])
def test_defaults_give_the_value_and_gradient_of_the_field_s_code(case):
    student, teacher = staged(case["student"], 0.3), staged(case["teacher"], 1.4)
    student = cast(student, torch.float64, grad=True)
    loss = build(case["loss"], **case.get("changes", {})).double()
    loss.setup(student, teacher)
    loss = filled(loss.double())
    target = Target(torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor(0.0).double())
    terms = loss(student, teacher, target)
    terms.total.backward()
    assert loss.weights["distill"] * terms.parts["distill"].item() == pytest.approx(case["value"], rel=1e-7)
    for key, norm in case["grad"].items():
        assert student.features[key].grad.norm().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("layers", [{"student": ["stage1"]}, {"student": ["stage1"], "teacher": ["stage1", "stage2"]}])
def test_layers_of_both_networks_come_in_pairs(layers):
    with pytest.raises(UserError, match=r"loss\.layers = .*: must be with the keys student and teacher"):
        build("at", layers=layers)


def test_one_layer_may_differ_between_the_networks():
    student, teacher = staged(FOUR, 0.3), staged(THREE, 1.4)
    loss = build("fitnet", layer={"student": "stage3", "teacher": "stage2"}).double()
    loss.setup(student, teacher)
    assert loss.regressor[0].weight.shape[:2] == (6, 8) and "f = stage3 (teacher: stage2)" in loss.formula
    with pytest.raises(UserError, match=r"^loss\.layer = "):
        build("fitnet", layer={"student": "stage3"})


def test_reviewkd_reads_the_teacher_before_or_after_the_relu():
    student, teacher = staged(THREE, 0.3), staged(THREE, 1.4)
    target = Target(torch.zeros(4, dtype=torch.long), torch.arange(4), torch.tensor(1.0).double())
    values = []
    for before_relu in (True, False):
        torch.manual_seed(0)
        loss = build("reviewkd", before_relu=before_relu)
        loss.setup(student, teacher)
        values.append(loss.double()(student, teacher, target).total.item())
    assert values[0] != pytest.approx(values[1], rel=0.01)
    plain = Outputs(teacher.logits, {key: value for key, value in teacher.features.items() if ".pre" not in key})
    loss = build("reviewkd")
    loss.setup(student, plain)  # a network without such maps: those after the ReLU, and the formula does not hide it
    assert loss.needs == ("stage1", "stage2", "stage3", "pooled") and "teacher:" not in loss.formula


@pytest.mark.parametrize("name", ["at", "nst", "vid", "fsp", "fitnet"])
def test_maps_are_asked_for_where_vectors_will_not_do(name):
    key = "layer" if "layer" in settings(name) else "layers"
    layers = {"layer": "pooled"} if key == "layer" else {"layers": ["stage3", "pooled"]}
    student, teacher, _ = batch(4, name)
    with pytest.raises(UserError, match=r"compares maps \[B, D, H, W\]; pooled has the shape"):
        build(name, **layers).setup(student, teacher)


def test_fsp_wants_equal_channels():
    student, teacher, _ = batch(4)
    with pytest.raises(UserError, match="equal channels"):
        build("fsp").setup(student, teacher)


def test_reviewkd_wants_shallow_before_deep():
    student, teacher, _ = batch(4)
    with pytest.raises(UserError, match="from shallow to deep"):
        build("reviewkd", layers=["stage3", "stage1"]).setup(student, teacher)


@pytest.mark.parametrize("name", ["at", "sp", "nst", "rkd", "pkt", "fsp"])
def test_the_teacher_s_own_features_cost_nothing(name):
    _, teacher, target = batch(5, name)
    loss = build(name, weights={"task": 0.0, "distill": 1.0})
    student = cast(teacher, torch.float64, grad=True)
    total = loss(student, student, target).total
    total.backward()
    assert total.item() == pytest.approx(0.0, abs=1e-12)
    rounding = 1e-7 if name == "pkt" else 1e-12  # pkt: the authors' 1e-7 in the logarithm
    assert all(f.grad is None or f.grad.abs().max() < rounding for f in student.features.values())


def test_rkd_does_not_see_scale_or_place():
    embedding = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = distances(differences(embedding))
    torch.testing.assert_close(distances(differences(3 * embedding + 7)), found)
    assert found.sum().item() / 30 == pytest.approx(1.0)


def test_crd_s_memory_follows_the_batch():
    loss = ready("crd", momentum=0.25, tau=0.001)
    student, teacher, target = batch(6)
    before = [memory.rows.clone() for memory in loss.memory]
    loss(student, teacher, target)
    for memory, old, features, embed in zip(loss.memory, before, (student, teacher), loss.embed):
        moved = 0.25 * old[target.row] + 0.75 * torch.nn.functional.normalize(embed(features.features["pooled"]))
        torch.testing.assert_close(memory.rows[target.row], torch.nn.functional.normalize(moved))
        rest = torch.ones(len(old), dtype=torch.bool).index_fill_(0, target.row, False)
        assert torch.equal(memory.rows[rest], old[rest]) and memory.log_scale.isfinite()
    scale = loss.memory[0].log_scale.clone()
    loss(student, teacher, target)
    assert loss.memory[0].log_scale == scale


def test_fitnets_first_stage_is_half_the_squared_distance_and_its_second_a_falling_kl():
    student, teacher, target = batch(3)
    loss = build("fitnet_hints", epochs=5, lr=0.1, tau=2.0)
    first = loss.first_training
    assert first is not None and (first.epochs, first.lr, first.student) == (5, 0.1, True)
    attach(first.loss, student, teacher)
    first.loss.setup(student, teacher)
    made = first.loss.regressor(student.features["stage2"])  # 4 x 4 places become the teacher's 8 x 8
    expected = (made - teacher.features["stage2"]).square().sum(1).mean() / 2
    torch.testing.assert_close(first.loss(student, teacher, target).total, expected)
    kl = build("kl", tau=2.0, scale="none", weights={"task": 0.0, "distill": 1.0})(student, teacher, target).total
    for progress, factor in ((0.0, 4.0), (0.5, 2.5), (1.0, 1.0)):
        there = target._replace(progress=torch.tensor(progress))
        torch.testing.assert_close(loss(student, teacher, there).parts["distill"], factor * kl)


def test_ofa_s_branches_of_tokens_are_the_authors():
    """PatchMerging and TokenFnContext of OFAKD distillers/utils.py, without class tokens: 14x14 tokens become 7x7."""
    made = TokenBranch(8, 14, 3, C)
    tokens, merge = torch.randn(2, 8, 14, 14), made.merge[0]
    x = tokens.permute(0, 2, 3, 1)
    four = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    expected = torch.nn.functional.gelu(merge.reduction(merge.norm(four))).flatten(1, 2)
    torch.testing.assert_close(made(tokens), made.head(made.blocks(expected).mean(1)))


def test_ofa_takes_students_whose_maps_are_equally_large():
    """A ViT or an MLP, which five of the paper's twelve pairs have, was refused."""
    student, teacher, target = batch(0)
    maps = {f"stage{i}": torch.randn(len(target.label), 8, 4, 4, requires_grad=True) for i in (1, 2, 3, 4)}
    student = Outputs(student.logits, {**maps, "pooled": torch.randn(len(target.label), 8)})
    loss = build("ofa")
    loss.setup(student, teacher)
    assert [len(branch.blocks) for branch in loss.branches] == [3, 2, 1, 1]
    loss(student, teacher, target).total.backward()
    assert all(map.grad is not None and map.grad.isfinite().all() for map in maps.values())


def test_margins_are_computed_in_float64_where_every_machine_has_it():
    """MPS has no float64: only what lies on the CPU may be of it."""
    seen: set[tuple[torch.dtype, str]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update((t.dtype, t.device.type) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with FakeTensorMode(), torch.device("cuda"):
        norm = torch.nn.BatchNorm2d(4)
        with Watch():
            margins(norm)
    assert (torch.float64, "cpu") in seen and (torch.float64, "cuda") not in seen
