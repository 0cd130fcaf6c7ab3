"""Every student configuration builds, returns what the contract says, and survives copying; found by globbing."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from kdbench.errors import UserError
from kdbench.losses.adapters import pooled_map
from kdbench.models.base import count_parameters, first_layer, flops, forward_on_meta, last_layer
from kdbench.types import ImageInfo, Outputs
from tests.support.models import ALL, OWN, SIZED, build, header, images, on_meta

SMALL = [name for name in OWN if int(re.search(r"([\d,]+) parameters", header(name))[1].replace(",", "")) < 4_000_000]
FAMILIES = ("resnet20", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenetv1", "shufflenetv2", "mlp")
MLPS = ("mlp", "mlp_1200", "mlp_128", "mlp_2560x8")

# C = 100 and C = 10, from three independent codebases (RepDistiller, mdistiller, chenyaofo/pytorch-cifar-models); SimKD
# for the x2 and x4 widths that the first two do not name.
COUNTS = {
    "resnet8": (83_892, 78_042),
    "resnet14": (181_108, None),
    "resnet20": (278_324, None),
    "resnet32": (472_756, None),
    "resnet44": (667_188, None),
    "resnet56": (861_620, 855_770),
    "resnet110": (1_736_564, None),
    "resnet8x4": (1_233_540, 1_210_410),
    "resnet32x4": (7_433_860, None),
    "wrn_16_1": (180_916, None),
    "wrn_16_2": (703_284, 691_674),
    "wrn_40_1": (569_780, None),
    "wrn_40_2": (2_255_156, None),
    "vgg8": (3_965_028, 3_918_858),
    "vgg11": (9_277_284, None),
    "vgg13": (9_462_180, None),
    "vgg16": (14_774_436, None),
    "vgg19": (20_086_692, None),
    "resnet50": (23_705_252, 23_520_842),
    "mobilenetv2_half": (812_836, 697_546),
    "shufflenetv1": (949_258, 862_768),
    "shufflenetv2": (1_355_528, 1_263_278),
    "resnet18": (11_220_132, None),
    "resnet38": (569_972, None),
    "resnet116": (1_833_780, None),
    "resnet14x2": (703_732, None),
    "resnet38x2": (2_255_604, None),
    "resnet110x2": (6_911_220, None),
    "resnet14x4": (2_783_620, None),
    "resnet38x4": (8_983_940, None),
    "shufflenetv2_1_5": (2_580_548, None),
    "mobilenetv2": (2_353_060, None),
    "wrn_40_4": (8_972_340, None),
    "wrn_28_10": (36_536_884, None),
    "densenet_bc": (800_032, None),
}

# Multiply-adds of convolutions and linear layers at 32 pixels and 100 classes, in millions (RepDistiller's networks).
MEGA_MACS = {
    "resnet8": 12.5,
    "resnet56": 125.8,
    "resnet32x4": 1083,
    "wrn_40_2": 327.6,
    "vgg13": 285,
    "resnet50": 1298,
    "mobilenetv2_half": 6.5,
    "shufflenetv1": 38.7,
    "shufflenetv2": 44.5,
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    hundred, ten = COUNTS[name]
    assert count_parameters(on_meta(name)) == hundred
    if ten is not None:
        assert count_parameters(on_meta(name, classes=10)) == ten


@pytest.mark.parametrize("name", [name for name in ALL if name not in SIZED])
def test_the_first_line_tells_the_network_and_its_true_size(name: str) -> None:
    assert header(name).startswith("# ") and len(header(name)) <= 120
    stated = re.search(r"([\d,]+) parameters with (?:(\d+)x\d+ images)?[, ]*(?:(\d+) classes)?", header(name))
    if stated:
        channels, size = (1, int(stated[2])) if stated[2] else (3, 32)
        network = on_meta(name, classes=int(stated[3] or 10), channels=channels, size=size)
        assert count_parameters(network) == int(stated[1].replace(",", ""))
    else:
        assert name in ("timm", "torchvision")


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (56, 853_018), (32, 464_154), (110, 1_727_962)])
def test_shortcut_a_has_no_parameters(depth: int, count: int) -> None:
    network = on_meta(f"resnet{depth}", classes=10, shortcut="A")
    assert count_parameters(network) == count
    assert not any("downsample" in name for name in network.state_dict())


@pytest.mark.parametrize(
    ("name", "paper", "off"),
    [("112_33", 6.3, 0.10), ("90_60", 16.1, 0.03), ("80_80", 22.4, 0.03), ("80_120", 50.4, 0.03)],
)
def test_densenets_are_near_the_sizes_in_born_again_networks(name: str, paper: float, off: float) -> None:
    """Furlanello et al. 2018, table 1: rounded, without the layout; no usual rule gives all four (see densenet.py)."""
    millions = count_parameters(on_meta(f"densenet_{name}", classes=10)) / 1e6
    assert abs(millions - paper) / paper < off


@pytest.mark.parametrize("name", sorted(MEGA_MACS))
def test_flops_are_twice_the_multiply_adds(name: str) -> None:
    counted = flops(on_meta(name), ImageInfo(100, 3, 32)) / 2e6
    assert counted == pytest.approx(MEGA_MACS[name], rel=0.005)


def test_flops_leave_the_network_as_it_is() -> None:
    network = build("resnet8").eval()
    network.layer1.train()  # as with frozen batch norms
    before = copy.deepcopy(network.state_dict())
    assert flops(network, ImageInfo(100, 3, 16)) * 4 == pytest.approx(flops(network, ImageInfo(100, 3, 32)), rel=0.01)
    assert not network.training and network.layer1.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", [name for name in OWN if name not in SMALL or name in FAMILIES])
def test_outputs_have_the_promised_shapes(name: str) -> None:
    network = on_meta(name)
    _check_shapes(name, network, forward_on_meta(network, torch.empty(1, 3, 32, 32)), channels=3, classes=100)


def _check_shapes(name: str, network: nn.Module, out: Outputs, channels: int, classes: int) -> None:
    count = out.logits.shape[0]
    assert out.logits.shape == (count, classes)
    names = [key for key in out.features if not key.endswith(".pre") and key != "map"]
    for key in out.features.keys() - {*names, "map"}:
        assert out.features[key].shape == out.features[key.removesuffix(".pre")].shape
    stages = [key for key in names if key.startswith("stage")]
    assert names == [*(["stem"] if name not in MLPS else []), *stages, "pooled"]
    assert stages == [f"stage{i + 1}" for i in range(len(stages))] and len(stages) >= 2
    assert out.features["pooled"].shape == (count, last_layer(network).in_features)
    assert last_layer(network).out_features == classes
    if name not in MLPS:
        maps = [out.features[key] for key in names[:-1]]
        assert all(value.dim() == 4 and value.shape[0] == count for value in maps)
        sides = [value.shape[-1] for value in maps]
        assert sides == sorted(sides, reverse=True) and sides[-1] >= 1
        assert first_layer(network).in_channels == channels


@pytest.mark.parametrize("name", [name for name in OWN if name in FAMILIES and name not in MLPS])
def test_the_classifier_reads_the_mean_of_a_map(name: str) -> None:
    """Of "map", or of the last stage; and batch norms before ReLUs are as wide as the maps that they make."""
    network = build(name, classes=10, size=16)
    features = network(images(2, size=16)).features
    last = features[pooled_map(Outputs(torch.zeros(2, 10), features), "test")]
    torch.testing.assert_close(last.mean((2, 3)), features["pooled"])
    norms = network.norms_before_relu() if hasattr(network, "norms_before_relu") else {}
    assert all(norm.num_features == features[key].shape[1] for key, norm in norms.items())


@pytest.mark.parametrize("name", SMALL)
def test_eight_pixel_digits_train(name: str) -> None:
    """Shapes, the classifier on "pooled", every gradient, and a copy such as an average of weights makes."""
    network = build(name, classes=10, channels=1, size=8)
    x = images(4, channels=1, size=8)
    out = network(x)
    _check_shapes(name, network, out, channels=1, classes=10)
    assert out.logits.isfinite().all()
    out.logits.square().mean().backward()
    assert not [key for key, parameter in network.named_parameters() if parameter.grad is None]
    network.eval()
    clone = copy.deepcopy(network)
    with torch.no_grad():
        out, again = network(x), clone(x)
        torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
        assert torch.equal(again.logits, out.logits)
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(network(x).logits, out.logits)


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "mobilenetv2_half", "shufflenetv1", "shufflenetv2", "resnet18"]
)
def test_features_are_not_overwritten_by_later_layers(name: str) -> None:
    """Layers work in place where they can: never on a tensor that was handed out."""
    network = build(name, classes=10, size=16).eval()
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(_module: nn.Module, _args: object, out: torch.Tensor) -> None:
        kept[id(out)] = (out, out.clone())

    for path, module in network.named_modules():
        if path in {"layer1", "layer2", "layer3", "block1", "block2", "block3", "blocks.1", "blocks.2", "blocks.4"}:
            module.register_forward_hook(keep)
    out = network(images(2, size=16))
    seen = [kept[id(value)] for value in out.features.values() if id(value) in kept]
    assert len(seen) == 3
    assert all(torch.equal(now, then) for now, then in seen)


PRE = {"resnet8", "resnet18", "resnet50", "vgg8", "wrn_16_1", "shufflenetv1", "shufflenetv2"}


@pytest.mark.parametrize("name", sorted(PRE))
def test_maps_before_the_relu_make_those_after_it(name: str) -> None:
    """And a training step sees each batch norm once: the running statistics move as without the extra features."""
    network = build(name, classes=10, size=16)
    features = network(images(2, size=16)).features
    stages = [key for key in features if key.startswith("stage") and not key.endswith(".pre")]
    assert {f"{key}.pre" for key in stages} == {key for key in features if key.endswith(".pre")}
    for key in stages:
        before, after = features[f"{key}.pre"], features[key]
        assert bool((before < 0).any())
        if name == "wrn_16_1":  # raw sums: the next batch norm comes first
            torch.testing.assert_close(before.mean((0, 2, 3)), torch.zeros(before.shape[1]), atol=1e-5, rtol=0)
        elif name == "shufflenetv2":
            halves = before.relu().chunk(2, 1)
            assert torch.equal(after, torch.stack(halves, 2).flatten(1, 2))
        else:
            assert torch.equal(after, before.relu())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(int(norm.num_batches_tracked) == 1 for norm in norms)


def test_features_of_vgg_follow_from_each_other() -> None:
    network = build("vgg8", classes=10, size=16).eval()
    features = network(images(2, size=16)).features
    blocks = [network.block1, network.block2, network.block3]
    for number, block in enumerate(blocks, start=1):
        before = features["stem" if number == 1 else f"stage{number - 1}"]
        assert torch.equal(features[f"stage{number}"], block(network.pool(before)).relu())


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("resnet8", {"depth": 9}, "depth"),
        ("resnet8", {"depth": 2}, "depth"),
        ("resnet8", {"widths": [16, 32]}, "widths"),
        ("resnet8", {"widths": [16, 16, 0, 64]}, "widths"),
        ("resnet8", {"width": 0.01}, "width"),
        ("resnet8", {"shortcut": "C"}, "shortcut"),
        ("resnet8", {"shortcut": "A", "widths": [16, 16, 8, 64]}, "widths"),
        ("wrn_16_1", {"depth": 14}, "depth"),
        ("wrn_16_1", {"dropout": 1.0}, "dropout"),
        ("wrn_16_1", {"width": 0}, "width"),
        ("vgg8", {"convolutions": [1, 1]}, "convolutions"),
        ("mobilenetv2_half", {"width": 0.01}, "width"),
        ("mobilenetv2_half", {"expansion": 0}, "expansion"),
        ("shufflenetv1", {"widths": [240, 480]}, "widths"),
        ("shufflenetv1", {"groups": 7}, "widths"),
        ("shufflenetv1", {"groups": 0}, "groups"),
        ("shufflenetv1", {"units": [1, 0, 1]}, "units"),
        ("shufflenetv2", {"widths": [115, 232, 464, 1024]}, "widths"),
        ("shufflenetv2", {"units": [3, 7]}, "units"),
        ("resnet18", {"blocks": [2, 2, 2]}, "blocks"),
        ("resnet18", {"block": "plain"}, "block"),
        ("densenet_bc", {"depth": 41}, "depth"),
        ("densenet_bc", {"growth": 0}, "growth"),
        ("densenet_bc", {"compression": 0}, "compression"),
        ("densenet_bc", {"dropout": -0.1}, "dropout"),
        ("mlp", {"hidden": []}, "hidden"),
        ("mlp", {"input_dropout": 1.5}, "input_dropout"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, changes: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}(\[\d\])? = .*: must be "):
        on_meta(name, **changes)


def test_dropout_acts_in_training_only() -> None:
    for name, changes in (
        ("wrn_16_1", {"dropout": 0.5}),
        ("densenet_bc", {"depth": 10, "dropout": 0.5}),
        ("mlp_1200", {"hidden": [8, 8]}),
    ):
        network = build(name, classes=3, channels=1, size=8, **changes)
        x = images(2, channels=1, size=8)
        network.train()
        assert not torch.equal(network(x).logits, network(x).logits)
        network.eval()
        assert torch.equal(network(x).logits, network(x).logits)


def test_no_dropout_draws_no_random_numbers() -> None:
    for name in ("wrn_16_1", "mlp", "densenet_bc"):
        network = build(name, classes=3, channels=1, size=8, **({"depth": 10} if name == "densenet_bc" else {}))
        state = torch.get_rng_state()
        network(images(2, channels=1, size=8))
        assert torch.equal(torch.get_rng_state(), state)


def test_vgg_pools_once_more_from_64_pixels() -> None:
    for size, side in ((32, 4), (63, 7), (64, 4), (96, 6)):
        network = on_meta("vgg8", size=size)
        assert network(torch.empty(1, 3, size, size, device="meta")).features["stage4"].shape[-1] == side


@pytest.mark.parametrize(
    ("name", "fan_out", "linear"),
    [
        ("resnet8x4", True, "default"),
        ("wrn_16_2", True, "zero_bias"),
        ("vgg8", True, "small"),
        ("mobilenetv2_half", True, "small"),
        ("resnet18", True, "default"),
        ("densenet_bc", True, "zero_bias"),
        ("shufflenetv1", False, "default"),
        ("shufflenetv2", False, "default"),
        ("mlp", False, "default"),
    ],
)
def test_initial_weights_follow_the_recipes(name: str, fan_out: bool, linear: str) -> None:
    """He et al. 2015, fan-out, for convolutions, N(0, 0.01) for some classifiers; PyTorch's own rule elsewhere."""
    torch.manual_seed(0)
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            area = module.kernel_size[0] ** 2
            fan_in = area * module.in_channels // module.groups
            expected = (2 / (area * module.out_channels)) ** 0.5 if fan_out else (1 / (3 * fan_in)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.03)
            assert module.bias is None or not fan_out or not module.bias.any()
    head = last_layer(network)
    uniform = (1 / (3 * head.in_features)) ** 0.5
    assert head.weight.std().item() == pytest.approx(0.01 if linear == "small" else uniform, rel=0.03)
    assert bool(head.bias.any()) == (linear == "default")
