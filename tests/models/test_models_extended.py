"""Students that a loss extends, against their authors' code: what they add to the student, with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kdbench.models.base import sketched
from kdbench.models.extended import Expanded, Reused
from kdbench.models.interface import parts_of
from kdbench.models.resnet import ResNet
from kdbench.models.wrn import WideResNet
from kdbench.types import ImageInfo
from tests.support.losses import build

# The length of a tensor or gradient, and its product with `wave(shape, 0.5)`, in OSVAI/NORM (two copies of a teacher's
# six channels) and DefangChen/SimKD (a teacher's map of 6 x 4 x 4), float64.
AUTHORS: dict[str, dict[str, list[float]]] = {
    "norm": {
        "logits": [2.179582954307438, 3.994902157195126],
        "projected": [25.35516186085766, -16.589149397470383],
        "pooled": [2.4876235279523464, -1.332150877173537],
        "expand": [0.4658286512502581, 0.24789002546565406],
        "contract": [0.3186844209901508, -0.09639164454757627],
        "first": [0.3920118373198089, -3.689296708131451e-07],
    },
    "norm of a wide ResNet": {
        "logits": [9.420405378413426, -18.40263730117542],
        "projected": [25.359098991293504, -9.766019802197299],
        "pooled": [4.09132148808124, -0.4300849023040524],
        "expand": [0.16770760538120774, 0.0069267175064861575],
        "contract": [0.18595822780963733, 0.24693196718492255],
        "first": [1.2495782679600766, -1.8410128241343453],
        "mean": [1.8333890645362114, -1.080536337627935],
    },
    "simkd": {
        "logits": [2.0174437874922777, -0.27337723447123913],
        "projected": [5.5425275741283535, 3.817371110535699],
        "expand": [0.2573630076399081, 0.06410095294804546],
        "first": [0.27668688537173697, -5.083435635211409e-07],
    },
}


def wave(shape: tuple[int, ...], phase: float, scale: float = 1.5) -> Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


def fill(module: nn.Module, phase: float) -> None:
    with torch.no_grad():
        for i, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(wave(tuple(parameter.shape), phase + 0.1 * i, 0.5))


def student() -> ResNet:
    made = ResNet(8, [3, 3, 4, 5], num_classes=5).double()
    fill(made, 0.3)
    return made


def assert_as_authors(name: str, found: dict[str, Tensor]) -> None:
    for key, value in found.items():
        marks = [value.norm().item(), (value * wave(tuple(value.shape), 0.5)).sum().item()]
        assert marks == pytest.approx(AUTHORS[name][key], rel=1e-9, abs=1e-9), key


def test_norm_s_expansion_is_the_authors():
    network = Expanded(student(), "stage3", inputs=5, outputs=6, copies=2).double()
    fill(network.expand, 1.1)
    fill(network.contract, 1.7)
    made = network(wave((3, 3, 32, 32), 0.9))
    (made.logits * wave((3, 5), 0.2)).sum().backward()
    assert made.features["projected"].shape == (3, 12, 8, 8)
    features = {key: made.features[key] for key in ("projected", "pooled")}
    expand, contract = network.expand[0].weight.grad, network.contract[1].weight.grad
    grads = {"expand": expand, "contract": contract, "first": network.network.conv1.weight.grad}
    assert_as_authors("norm", {"logits": made.logits, **features, **grads})


def test_norm_expands_a_wide_resnet_before_its_last_batch_norm_as_the_authors():
    """Whose running mean moves once a step, by the new map."""
    inner = WideResNet(10, 1, num_classes=5)
    fill(inner.double(), 0.3)
    network = Expanded(inner, "stage3", inputs=64, outputs=6, copies=2).double()
    fill(network.expand, 1.1)
    fill(network.contract, 1.7)
    made = network(wave((3, 3, 32, 32), 0.9))
    (made.logits * wave((3, 5), 0.2)).sum().backward()
    features = {key: made.features[key] for key in ("projected", "pooled")}
    expand, contract = network.expand[0].weight.grad, network.contract[1].weight.grad
    grads = {"expand": expand, "contract": contract, "first": inner.conv1.weight.grad}
    assert_as_authors(
        "norm of a wide ResNet", {"logits": made.logits, **features, **grads, "mean": inner.bn1.running_mean}
    )
    torch.testing.assert_close(made.features["map"].mean((2, 3)), made.features["pooled"])


def test_norm_reads_a_wide_resnet_s_sums_and_any_other_network_s_map():
    info, loss = ImageInfo(5, 3, 32), build("norm", copies=2)
    wide = WideResNet(10, 1, num_classes=5)
    grown = Expanded(ResNet(8, [3, 3, 4, 5], num_classes=5), "stage3", inputs=5, outputs=6, copies=2)
    layers = {}
    for name, network in (("wide", wide), ("grown", grown), ("plain", student().float())):
        loss.attach(parts_of(network), parts_of(network))
        out = sketched(network, info)
        layers[name] = loss.extension(out, out).config["layer"]
        assert loss.last_map(out, "teacher") == layers[name]
    assert layers == {"wide": "stage3", "grown": "map", "plain": "stage3"}


def test_simkd_s_projector_is_the_authors():
    network = Reused(student(), "stage3", inputs=5, outputs=6, size=4, factor=2, num_classes=5).double()
    fill(network.projector, 1.1)
    fill(network.classifier, 1.7)
    made = network(wave((3, 3, 32, 32), 0.9))
    (made.logits * wave((3, 5), 0.2)).sum().backward()
    assert made.features["projected"].shape == (3, 6, 4, 4)
    grads = {"expand": network.projector[3].weight.grad, "first": network.network.conv1.weight.grad}
    assert_as_authors("simkd", {"logits": made.logits, "projected": made.features["projected"], **grads})
