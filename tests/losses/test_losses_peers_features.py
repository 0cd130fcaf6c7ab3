"""Feature losses against their authors' code: peer_networks.json holds what that gave on the inputs made here.

Of every gradient two numbers are kept: its length, and its product with `wave(shape, 0.5)`.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdbench.losses.base import DistillationLoss
from kdbench.models.interface import parts_of
from kdbench.models.resnet import ResNet
from kdbench.types import Outputs, Parts, Target
from tests.support.losses import build

CASES = json.loads(Path(__file__).with_name("peer_networks.json").read_text(encoding="utf-8"))["cases"]
LABEL = torch.tensor([0, 3, 2, 3])
# (channels, places a side) of the stages of the two networks
NETWORKS: dict[str, list[tuple[int, int]]] = {
    "student": [(3, 8), (4, 4), (6, 2)],
    "teacher": [(5, 8), (6, 4), (8, 4)],
    "same": [(5, 8), (6, 4), (8, 4)],
    "even": [(5, 8), (6, 4), (8, 2)],
    "strided": [(3, 8), (4, 4), (5, 2)],
    "narrow": [(5, 8), (6, 4), (4, 4)],
}  # fmt: skip


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.5) -> Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


def outputs(name: str, phase: float, dtype: torch.dtype, samples: int = 4) -> Outputs:
    """What one of the fixed networks gives for four inputs, or more; every feature a leaf."""
    features = {}
    for i, (width, side) in enumerate(NETWORKS[name], start=1):
        before = wave((samples, width, side, side), phase + i)
        features |= {f"stage{i}.pre": before, f"stage{i}": before.relu()}
    last = features["stage3"]
    features |= {"pooled": last.mean((2, 3)), "projected": wave((samples, 8, 2, 2), phase + 9).relu()}
    tokens = (samples, last.shape[1], 4, 4)  # of a ViT
    features |= {name: wave(tokens, phase + 11 + i) for i, name in enumerate(("block1", "block2", "tokens"))}
    leaves = {key: value.to(dtype).requires_grad_(phase < 1) for key, value in features.items()}
    return Outputs(wave((samples, 5), phase, 3.0).to(dtype).requires_grad_(phase < 1), leaves)


def parts(out: Outputs, phase: float) -> Parts:
    """A classifier and batch norms for one of the networks."""
    classifier = nn.Linear(out.features["pooled"].shape[1], 5)
    norms: dict[str, nn.Module] = {
        key: nn.BatchNorm2d(value.shape[1]) for key, value in out.features.items() if ".pre" in key
    }
    for i, layer in enumerate([classifier, *norms.values()]):
        fill(layer.to(out.logits.dtype), phase + 0.7 * i)
    return Parts(classifier, norms)


def fill(module: nn.Module, phase: float = 0.0) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(wave(tuple(parameter.shape), phase + 0.1 * i, 0.5))


def marks(grad: Tensor) -> list[float]:
    return [grad.norm().item(), (grad.double() * wave(tuple(grad.shape), 0.5)).sum().item()]


def prepared(case: dict[str, object], dtype: torch.dtype) -> tuple[DistillationLoss, Outputs, Outputs]:
    samples = int(case.get("samples", 4))  # type: ignore[call-overload]
    student = outputs(str(case.get("student", "student")), 0.2, dtype, samples)
    teacher = outputs(str(case.get("teacher", "teacher")), 1.3, dtype, samples)
    loss = build(str(case["loss"]), **case["changes"])  # type: ignore[arg-type]
    if case.get("first"):  # what comes before the main training
        assert loss.first_training is not None
        loss = loss.first_training.loss
    loss.batch_size = 4
    loss.attach(parts(student, 0.3), parts(teacher, 0.6))
    loss.setup(student, teacher)
    fill(loss.to(dtype))
    for name, buffer in loss.named_buffers():
        if name.endswith(".base"):  # where torch's orthogonal matrices start from
            buffer.copy_(torch.eye(*buffer.shape))
    if case.get("means"):
        loss.survey([(wave((5, 8), 2.5), torch.arange(5))])
    loss.epochs = case.get("epochs")  # type: ignore[assignment]
    return loss, student, teacher


@pytest.mark.parametrize("case", CASES, ids=[f"{case['loss']}-{i}" for i, case in enumerate(CASES)])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_value_and_gradients_equal_the_authors(case, dtype, digits, monkeypatch):
    # Singular vectors, attentions and long ways through layers leave fewer digits of a gradient in float32. Cases that
    # allow more say what was "measured": how far ours and the authors' code in float32 lie from ours in float64, the
    # median of 100 inputs (of DiffKD's 60); of an error of several gradients the largest.
    digits = case.get("gradients32", digits) if dtype == torch.float32 else digits
    if case.get("draws"):
        turn = itertools.count(1)
        monkeypatch.setattr(torch, "rand", lambda shape, **_: wave(shape, 0.9, 0.5) + 0.5)
        monkeypatch.setattr(torch, "randn", lambda shape, **_: wave(shape, 0.3 * next(turn), 1.0).to(dtype))
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([17, 300, 999, 512]))
    loss, student, teacher = prepared(case, dtype)
    label = LABEL if loss.views == 1 else LABEL[:3].repeat(loss.views)
    target = Target(label, torch.arange(len(label)), torch.tensor(case.get("progress", 0.0), dtype=torch.float64))
    total = loss(student, teacher, target).total
    total.backward()
    known = digits if dtype == torch.float64 else case.get("float32", 1e-6)  # singular vectors have fewer digits
    assert total.item() == pytest.approx(case["value"], rel=known)
    for key, expected in case["grad"].items():
        grad = (student.logits if key == "logits" else student.features[key]).grad
        assert marks(grad) == pytest.approx(expected, rel=digits, abs=digits * expected[0]), key
    if "classifier" in case:  # the student's own
        found = marks(loss._classifiers[0].weight.grad)
        assert found == pytest.approx(case["classifier"], rel=digits)
    named = dict(loss.named_parameters())
    others = case.get("parameters", {})
    rounding = digits * max((norm for norm, _ in others.values()), default=0.0)  # a bias before a batch norm has none
    for key, expected in others.items():
        assert marks(named[key].grad) == pytest.approx(expected, rel=digits, abs=rounding), key


# FCFD's terms and gradients in its authors' code (LiuDongyang6/FCFD), whose teacher is in evaluation mode as ours
FCFD = {
    "value": 2.714112873013473,
    "features": 0.1409751316939724,
    "paths": 0.10005262340042953,
    "grad": {
        "conv1.weight": [0.07007720687095853, -8.971319883852025e-08],
        "layer1.0.bn2.bias": [0.027522343277765794, -0.008564530612196019],
        "layer2.0.conv1.weight": [0.03296089176521716, -0.03629736233359562],
        "layer3.0.downsample.0.weight": [0.03894703318790395, 0.026077486280697452],
        "fc.weight": [0.6899258600073609, 0.3540030144519931],
        "to_teacher.0.0.weight": [0.02138815257576336, 0.0255113669490667],
        "to_teacher.2.1.weight": [0.29884567628650444, 0.5843747218771327],
        "to_student.0.0.weight": [0.0009657544471128949, 0.0005888450066600205],
        "to_student.1.1.bias": [0.0006193850057014098, 0.0010473503816033204],
    },
}


def fill_by_name(module: nn.Module, phase: float, scale: float = 0.5) -> None:
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(wave(tuple(parameter.shape), phase + 0.1 * i, scale))


@pytest.mark.parametrize(("dtype", "digits", "few"), [(torch.float64, 1e-9, 1e-8), (torch.float32, 1e-6, 1e-4)])
def test_fcfd_equals_the_authors_code(dtype, digits, few):
    """few: digits of a KL near 0, which tau^2 brings to light, and of gradients through two networks."""
    student = ResNet(8, [3, 3, 4, 5], num_classes=5, image_size=16)
    teacher = ResNet(8, [4, 4, 6, 8], num_classes=5, image_size=16).eval()
    fill_by_name(student.to(dtype), 0.3)
    fill_by_name(teacher.to(dtype), 0.6, 0.15)
    before = {name: value.clone() for name, value in student.named_buffers()}
    image, weights = wave((4, 3, 16, 16), 0.9).to(dtype), {"task": 1.0, "distill": 1.0, "features": 5.0, "paths": 0.2}
    loss = build("fcfd", weights=weights, paths=4, warmup=20 / 240)
    loss.attach(parts_of(student), parts_of(teacher))
    out, taught = student(image), teacher(image)
    moved = {name: value.clone() for name, value in student.named_buffers()}
    loss.setup(out, taught)
    fill_by_name(loss.to(dtype).to_teacher, 1.1)
    fill_by_name(loss.to_student, 1.7)
    loss.epochs = 240
    terms = loss(out, taught, Target(LABEL, torch.arange(4), torch.tensor(6 / 240, dtype=torch.float64)))
    terms.total.backward()
    assert terms.total.item() == pytest.approx(FCFD["value"], rel=digits)
    assert terms.parts["features"].item() == pytest.approx(FCFD["features"], rel=few)
    assert terms.parts["paths"].item() == pytest.approx(FCFD["paths"], rel=few)
    named = {**dict(student.named_parameters()), **dict(loss.named_parameters())}
    for key, expected in FCFD["grad"].items():
        assert marks(named[key].grad) == pytest.approx(expected, rel=few, abs=few * expected[0]), key
    assert all(parameter.grad is None for parameter in teacher.parameters())
    after = dict(student.named_buffers())  # ways through the student's later stages leave its statistics alone
    assert all(torch.equal(after[name], moved[name]) for name in after)
    assert any(not torch.equal(moved[name], before[name]) for name in moved)
