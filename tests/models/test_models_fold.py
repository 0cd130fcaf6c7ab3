"""Batch norms fold into convolutions exactly, and only where they may."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdbench.models.fold import align_rows, fold_batchnorm
from kdbench.types import Outputs
from tests.support.models import build, fill, images

# How many batch norms are left: those before a convolution (pre-activation) or behind a feature cannot go.
LEFT = {
    "resnet8": 0,
    "resnet8x4": 0,
    "vgg8": 0,
    "mobilenetv2_half": 0,
    "shufflenetv1": 0,
    "shufflenetv2": 0,
    "wrn_16_2": 7,
    "mlp": 0,
}


def _norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _same(network: nn.Module, folded: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, given = network.eval()(x), folded(x)
    pairs = [(expected.logits, given.logits), *((expected.features[k], given.features[k]) for k in expected.features)]
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("name", sorted(LEFT))
def test_folding_changes_no_output(name: str) -> None:
    network = build(name, classes=10, size=16)
    fill(network.state_dict())
    folded = fold_batchnorm(network)
    assert _norms(folded) == LEFT[name]
    assert not folded.training and network.training
    _same(network, folded, images(3, size=16))


def test_option_a_and_densenet_fold() -> None:
    for name, changes, left in (("resnet14", {"shortcut": "A"}, 0), ("densenet_bc", {"depth": 16, "growth": 4}, 9)):
        network = build(name, classes=10, size=16, **changes)
        fill(network.state_dict())
        folded = fold_batchnorm(network)
        assert _norms(folded) == left
        _same(network, folded, images(2, size=16))


def test_the_original_keeps_its_weights_and_the_copy_its_frozenness() -> None:
    network = build("resnet8", classes=10)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batchnorm(network.requires_grad_(False))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


class _Traps(nn.Module):
    """Batch norms that look foldable and are not, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 8
        self.used_twice = nn.Conv2d(3, 4, 3, padding=1)
        self.norm_a = nn.BatchNorm2d(4)
        self.called_twice = nn.Conv2d(4, 4, 1)
        self.norm_b = nn.BatchNorm2d(4)
        self.kept = nn.Conv2d(4, 4, 1)
        self.norm_c = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.norm_d = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1)
        self.norm_e = nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Outputs:
        y = self.used_twice(x)
        y = self.norm_a(y) + y  # another reader
        y = self.norm_b(self.called_twice(self.called_twice(y)))
        kept = self.kept(y)  # a feature
        y = self.norm_c(kept)
        y = self.norm_d(self.norm_d(self.shared(y)))  # the norm is used twice
        y = self.norm_e(self.plain(y)) if y.mean() < 1e9 else y  # a branch on data: cannot be traced symbolically
        pooled = y.mean((2, 3))
        return Outputs(self.fc(pooled), {"kept": kept, "pooled": pooled})


def test_a_batch_norm_with_other_ties_is_left_alone() -> None:
    network = _Traps()
    fill(network.state_dict())
    folded = fold_batchnorm(network)
    left = {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert left == {"norm_a", "norm_b", "norm_c", "norm_d"}
    _same(network, folded, images(2, size=8))


class _Standardised(nn.Conv2d):
    """Changes its weight at every use, as timm's weight-standardised convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


def test_unusual_convolutions_and_failing_networks_stay_unfolded() -> None:
    class Net(nn.Module):
        def __init__(self, fails: bool) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = _Standardised(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)
            self.fails = fails

        def forward(self, x: Tensor) -> Outputs:
            if self.fails and x.shape[0] == 1:
                raise RuntimeError("this network wants at least two images")
            pooled = self.norm(self.conv(x)).mean((2, 3))
            return Outputs(self.fc(pooled), {"pooled": pooled})

    for fails in (False, True):
        network = Net(fails)
        fill(network.state_dict())
        folded = fold_batchnorm(network)
        assert _norms(folded) == 1
        _same(network, folded, images(2, size=8))


def test_folding_in_half_precision_rounds_once() -> None:
    network = build("resnet8", classes=10, size=16).to(torch.bfloat16)
    fill(network.state_dict())
    folded = fold_batchnorm(network)
    assert _norms(folded) == 0
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        x = images(2, size=16).to(torch.bfloat16)
        a, b = network.eval()(x).logits.float(), folded(x).logits.float()
    assert (a - b).abs().max() < 0.05 * a.abs().max()


@pytest.mark.parametrize("width", [30, 13, 32])
def test_a_row_is_answered_alike_wherever_it_stands_in_its_batch(width):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, 3))
    rows = torch.randn(200, width)
    expected = network(rows)
    aligned = align_rows(copy.deepcopy(network))
    assert (type(aligned[0]) is nn.Linear) == (width == 32)
    seen: dict[int, bytes] = {}
    for _ in range(40):
        places = torch.randperm(200)[:32]
        for place, answer in zip(places.tolist(), aligned(rows[places]).detach(), strict=True):
            torch.testing.assert_close(answer, expected[place].detach())
            assert seen.setdefault(place, answer.numpy().tobytes()) == answer.numpy().tobytes()
