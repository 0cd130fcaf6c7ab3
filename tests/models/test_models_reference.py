"""Names, shapes and logits against other people's implementations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock

from kdbench.models.densenet import DenseNetBC, layers_per_block
from tests.support.models import fill, filled, images, on_meta

REFERENCE = json.loads((Path(__file__).parent / "reference_logits.json").read_text(encoding="utf-8"))
NAMES = sorted(name for name in REFERENCE if name != "about")


def _agree(given: Tensor, expected: list[float]) -> None:
    """To 1e-5 of the largest logit, as float32 sums in another order allow."""
    scale = max(abs(value) for value in expected)
    torch.testing.assert_close(given, torch.tensor(expected), rtol=1e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_names_and_shapes_are_the_peers(name: str) -> None:
    lines = [f"{key} {tuple(value.shape)}" for key, value in on_meta(name).state_dict().items()]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == REFERENCE[name]["names"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_peers(name: str) -> None:
    network = filled(name).eval()
    with torch.no_grad():
        _agree(network(images(1)).logits[0, :5], REFERENCE[name]["eval"])
        if "train" in REFERENCE[name]:
            _agree(network.train()(images(2)).logits[1, :5], REFERENCE[name]["train"])


def test_published_names_of_each_family() -> None:
    expected = {
        "resnet20": [
            "conv1.weight",
            "bn1.running_mean",
            "layer1.0.conv1.weight",
            "layer2.0.downsample.0.weight",
            "fc.bias",
        ],
        "wrn_16_2": [
            "conv1.weight",
            "block1.layer.0.bn1.weight",
            "block1.layer.0.convShortcut.weight",
            "bn1.bias",
            "fc.weight",
        ],
        "vgg8": ["block0.0.bias", "block0.1.running_var", "block4.0.weight", "classifier.weight"],
        "mobilenetv2_half": ["conv1.0.weight", "blocks.6.0.conv.7.bias", "conv2.1.weight", "classifier.0.weight"],
        "shufflenetv1": ["conv1.weight", "layer3.3.bn3.weight", "linear.bias"],
        "shufflenetv2": ["layer1.0.conv5.weight", "conv2.weight", "linear.weight"],
        "resnet50": ["layer1.0.shortcut.0.weight", "layer4.2.conv3.weight", "linear.weight"],
        "densenet_bc": ["features.conv0.weight", "features.denseblock3.denselayer16.norm2.bias", "classifier.weight"],
        "mlp": ["hidden.0.weight", "hidden.1.bias", "fc.weight"],
    }
    for name, keys in expected.items():
        assert set(keys) <= set(on_meta(name).state_dict()), name


class _ZeroPad(nn.Module):
    """Option A in another way than ours: average of one pixel, and zeros joined on."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, 1, stride=2)
        zeros = x.new_zeros(x.shape[0], self.added // 2, *x.shape[2:])
        return torch.cat([zeros, x, zeros], 1)


def test_shortcut_a_equals_blocks_of_torchvision() -> None:
    ours = filled("resnet14", classes=10, shortcut="A").eval()
    theirs = nn.Module()
    theirs.conv1, theirs.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    theirs.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))
    theirs.layer2 = nn.Sequential(BasicBlock(16, 32, 2, _ZeroPad(16)), BasicBlock(32, 32))
    theirs.layer3 = nn.Sequential(BasicBlock(32, 64, 2, _ZeroPad(32)), BasicBlock(64, 64))
    theirs.fc = nn.Linear(64, 10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.eval()
    with torch.no_grad():
        x = theirs.bn1(theirs.conv1(images(2))).relu()
        x = theirs.layer3(theirs.layer2(theirs.layer1(x)))
        expected = theirs.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        torch.testing.assert_close(ours(images(2)).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
def test_densenet_equals_torchvisions_blocks(training: bool) -> None:
    depth, growth = 22, 8
    theirs = DenseNet(growth, layers_per_block(depth), 2 * growth, bn_size=4, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        del theirs.features._modules[name]
    ours = DenseNetBC(depth, growth, num_classes=10)
    fill(theirs.state_dict())
    state = {key.replace("features.norm5", "features.norm_final"): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    theirs.train(training)
    ours.train(training)
    with torch.no_grad():
        expected = theirs(images(2))
        torch.testing.assert_close(ours(images(2)).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("depth", "layers"), [(100, (16, 16, 16)), (112, (18, 18, 18)), (90, (15, 14, 14)), (80, (13, 13, 12))]
)
def test_a_densenet_has_the_depth_it_is_named_by(depth: int, layers: tuple[int, int, int]) -> None:
    assert layers_per_block(depth) == layers
    network = on_meta("densenet_bc", depth=depth)
    weighted = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth
