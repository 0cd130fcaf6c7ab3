"""timm's and torchvision's networks: their own numbers and names, refusals instead of random heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import nn

from kdbench.errors import UserError
from kdbench.models.adopt import checkpoint_gradients
from kdbench.models.base import choose_stages, count_parameters, first_layer, flops, last_layer, last_layer_name
from kdbench.models.fold import fold_batchnorm
from kdbench.models.timm import timm_class, timm_model
from kdbench.models.torchvision import torchvision_model
from kdbench.types import ImageInfo
from tests.support.models import SIZED, build, header, images, on_meta

FIVE = ["stem", "stage1", "stage2", "stage3", "stage4", "pooled"]
FOUR = FIVE[1:]
TIMM = {
    "test_resnet": FIVE,
    "test_efficientnet": FIVE,
    "test_vit": ["block1", "block2", *FOUR[:-1], "tokens", "pooled"],
    "test_convnext": FOUR,
    "levit_128s": ["stage1", "stage2", "stage3", "pooled", "head", "head_dist"],  # two heads, averaged
}
TORCHVISION = {
    "shufflenet_v2_x0_5": FIVE,
    "mobilenet_v3_small": FIVE,
    "squeezenet1_1": FOUR[:-1],  # a convolution makes the logits
    "googlenet": FIVE,  # auxiliary heads
    "resnet18": FIVE,
}

NO_HEAD = r"^pretrained = true: must be .*new_head=true.* 1000 classes, the dataset has 10"


@pytest.mark.parametrize("name", sorted(TIMM))
def test_timm_logits_are_timms(name: str) -> None:
    size = 224 if name == "levit_128s" else 160
    network = timm_model(name, num_classes=7, image_size=size)
    theirs = timm.create_model(name, num_classes=7, **({"img_size": size} if name == "test_vit" else {}))
    theirs.load_state_dict(network.state_dict(), strict=True)
    network.load_state_dict(theirs.state_dict(), strict=True)
    _compare(network, theirs, images(2, size=size), TIMM[name], name != "levit_128s")


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_torchvision_logits_are_torchvisions(name: str) -> None:
    network = torchvision_model(name, num_classes=7, image_size=64)
    aux: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    theirs = torchvision.models.get_model(name, num_classes=7, **aux)
    theirs.load_state_dict(network.state_dict(), strict=True)
    _compare(network, theirs, images(2, size=64), TORCHVISION[name], name != "squeezenet1_1")


def _compare(network: nn.Module, theirs: nn.Module, x: torch.Tensor, features: list[str], has_head: bool) -> None:
    with torch.no_grad():
        torch.manual_seed(1)
        expected = theirs.train()(x)
        torch.manual_seed(1)
        given = network.train()(x).logits  # dropout, stochastic depth and batch statistics as there
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        out = network.eval()(x)
        torch.testing.assert_close(out.logits, theirs.eval()(x), rtol=1e-4, atol=1e-5)
    assert list(out.features) == features
    maps = [value for key, value in out.features.items() if key not in ("pooled", "head", "head_dist")]
    assert all(value.dim() == 4 for value in maps)
    if "head" in features:
        assert torch.equal((out.features["head"] + out.features["head_dist"]) / 2, out.logits)
        assert not torch.equal(out.features["head"], out.features["head_dist"])
    if "tokens" in features:  # of a ViT's last block, after the final norm
        theirs_last = theirs.forward_features(x)[:, theirs.num_prefix_tokens :]
        torch.testing.assert_close(out.features["tokens"].flatten(2).mT, theirs_last)
        assert torch.equal(out.features["block2"], theirs.forward_intermediates(x, indices=[1])[1][0])
    sides = [value.shape[-1] for value in maps]
    assert sides == sorted(sides, reverse=True)
    assert first_layer(network).in_channels == 3
    if has_head:
        torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
    else:
        with pytest.raises(UserError, match="no single linear classifier"):
            last_layer(network)


@pytest.mark.parametrize(("library", "name"), [("timm", "test_resnet"), ("torchvision", "shufflenet_v2_x0_5")])
def test_adopted_networks_copy_fold_train_and_share(library: str, name: str) -> None:
    network = build(library, classes=5, channels=1, size=32, name=name)
    x = images(4, channels=1, size=32)
    network(x).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.eval()
    with torch.no_grad():
        out = network(x)
        clone = copy.deepcopy(network)
        assert not clone.training and torch.equal(clone(x).logits, out.logits)
        folded = fold_batchnorm(network)
        torch.testing.assert_close(folded(x).logits, out.logits, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        clone.set_submodule(last_layer_name(clone), nn.Linear(out.features["pooled"].shape[1], 5))
        last_layer(clone).weight.zero_()
        last_layer(clone).bias.fill_(2.0)
        assert torch.equal(clone(x).logits, torch.full((4, 5), 2.0))  # a replaced layer is the one that runs
        assert torch.equal(network(x).logits, out.logits)
        lent = copy.deepcopy(last_layer(network))
        assert torch.equal(lent(out.features["pooled"]), out.logits)
    assert flops(network, ImageInfo(5, 1, 64)) == pytest.approx(4 * flops(network, ImageInfo(5, 1, 32)), rel=0.02)


@pytest.mark.parametrize(("library", "name"), [("timm", "test_resnet"), ("torchvision", "resnet18")])
def test_libraries_build_without_memory(library: str, name: str) -> None:
    """On the meta device, as a check of a configuration does; other input channels too."""
    network = on_meta(library, classes=3, channels=2, size=64, name=name)
    assert first_layer(network).in_channels == 2 and first_layer(network).weight.is_meta
    drawn = build(library, classes=3, channels=2, size=64, name=name)
    three = build(library, classes=3, channels=3, size=64, name=name)
    assert first_layer(drawn).weight.std().item() == pytest.approx(first_layer(three).weight.std().item(), rel=0.35)


def test_adopted_networks_pass_their_mode_on() -> None:
    network = torchvision_model("googlenet", num_classes=3, image_size=64)
    assert network.training and network.net.training
    network.eval()
    assert not network.net.training and not any(module.training for module in network.modules())


def test_adopted_networks_take_weights_by_function() -> None:
    network = timm_model("test_resnet", num_classes=3, image_size=32).eval()
    x = images(2, size=32)
    zeros = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(network, zeros, (x,)).logits, torch.zeros(2, 3))
        assert network(x).logits.abs().sum() > 0
    assert set(zeros) <= set(network.state_dict())


def test_a_vit_is_built_for_the_images() -> None:
    small = timm_model("test_vit", num_classes=3, image_size=32)
    assert small(images(1, size=32)).features["stage4"].shape[-2:] == (2, 2)
    network = torchvision_model("vit_b_32", num_classes=3, image_size=64, options={"dropout": 0.1})
    assert network.net.image_size == 64 and network.net.encoder.dropout.p == 0.1


@pytest.mark.parametrize(
    ("library", "typed", "near"), [("timm", "resnet18x", "resnet18"), ("torchvision", "resnet_18", "resnet18")]
)
def test_unknown_names_are_refused_with_the_nearest(library: str, typed: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"^name = {typed}: must be .* Near: .*\b{near}\b"):
        build(library, name=typed)


def test_a_token_may_be_swept_over():
    """distilled=false was an argument that only DeiT's own networks knew."""
    for name in ("test_vit", "test_resnet", "deit_tiny_patch16_224"):
        build("timm", classes=3, size=32, name=name, options={"distilled": False})


@pytest.mark.parametrize(
    ("library", "name", "size", "options", "reason"),
    [
        ("timm", "test_resnet", 32, {"drop_pth_rate": 0.1}, "^options.drop_pth_rate = 0.1: .* Near: drop_path_rate"),
        ("torchvision", "resnet18", 32, {"speed": 3}, "^options.speed = 3: must be left out: resnet18 has no such"),
        ("timm", "test_vit", 32, {"drop_path_rate": 2}, r"^options.drop_path_rate = 2: must be in \[0, 1\)$"),
        (
            "torchvision",
            "swin_t",
            32,
            {"stochastic_depth_prob": 1.5},
            r"^options.stochastic_depth_prob = 1.5: must be in",
        ),
        ("timm", "test_vit", 32, {"patch_drop_rate": 0.5}, "^options.patch_drop_rate = 0.5: must be 0"),
        ("timm", "test_vit", 32, {"distilled": "yes"}, "^options.distilled = yes: must be true or false"),
        ("timm", "test_vit", 33, {}, "^name = test_vit: must be .*33-pixel"),
        ("timm", "volo_d1_224", 224, {}, "^name = volo_d1_224: must be .*other heads"),
        ("torchvision", "vit_b_32", 40, {}, "^name = vit_b_32: must be .*40-pixel"),
        ("torchvision", "inception_v3", 32, {}, "^name = inception_v3: must be .*32-pixel"),
    ],
)
def test_what_a_library_refuses_is_a_message(
    library: str, name: str, size: int, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        build(library, classes=3, size=size, name=name, options=options)


@pytest.fixture
def published(tmp_path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A file that stands in for timm's published weights of test_resnet, and its content."""
    torch.manual_seed(5)
    state = timm.create_model("test_resnet", num_classes=1000).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    return {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}, state


def test_timm_weights_with_a_fitting_head_load_whole(published: Any) -> None:
    options, state = published
    network = timm_model("test_resnet", pretrained=True, options=options, num_classes=1000, image_size=32)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_timm_heads_are_replaced_on_request_only(published: Any) -> None:
    options, state = published
    with pytest.raises(UserError, match=NO_HEAD):
        timm_model("test_resnet", pretrained=True, options=options, num_classes=10, image_size=32)
    network = timm_model("test_resnet", pretrained=True, new_head=True, options=options, num_classes=10, image_size=32)
    head = {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items() if key not in head)
    assert last_layer(network).out_features == 10


def test_timm_weights_for_grey_images_are_summed(published: Any) -> None:
    options, state = published
    network = timm_model(
        "test_resnet", pretrained=True, options=options, num_classes=1000, in_channels=1, image_size=32
    )
    first = next(key for key in state if key.endswith("weight"))
    torch.testing.assert_close(first_layer(network).weight, state[first].sum(1, keepdim=True))


def test_timm_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"pretrained_cfg_overlay": {"file": str(tmp_path / "no.pth")}}
    with pytest.raises(UserError, match=r"cfg_overlay\.file = .*no\.pth: must be a file of weights"):
        timm_model("test_resnet", pretrained=True, options=missing, num_classes=1000, image_size=32)
    unpublished = next(name for name in timm.list_models() if not timm.models.get_pretrained_cfg(name).has_weights)
    with pytest.raises(UserError, match=r"^pretrained = true: must be false: timm has no weights for"):
        timm_model(unpublished, pretrained=True, num_classes=1000)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"^pretrained: the weights of test_resnet .*Name or service not known\)"):
        timm_model("test_resnet", pretrained=True, num_classes=1000, image_size=32)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_torchvision_heads_are_replaced_on_request_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    state = torchvision.models.get_model(name).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)
    whole = torchvision_model(name, pretrained=True, num_classes=1000, image_size=64)
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    with pytest.raises(UserError, match=NO_HEAD):
        torchvision_model(name, pretrained=True, num_classes=10, image_size=64)
    network = torchvision_model(name, pretrained=True, new_head=True, num_classes=10, in_channels=1, image_size=64)
    assert network.eval()(images(2, channels=1, size=64)).logits.shape == (2, 10)
    changed = [key for key, value in network.state_dict().items() if not torch.equal(value, state[key])]
    first = "conv1.0.weight" if name.startswith("shuffle") else "features.0.weight"
    assert len(changed) == 3 and changed[0] == first
    torch.testing.assert_close(first_layer(network).weight, state[first].sum(1, keepdim=True))
    with pytest.raises(UserError, match=r"^pretrained = true: must be false for images of 4 channels"):
        torchvision_model(name, pretrained=True, num_classes=1000, in_channels=4, image_size=64)


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_auxiliary_heads_of_published_weights_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("googlenet", "inception_v3"):
        with torch.device("meta"):
            whole = torchvision.models.get_model(name, aux_logits=True, init_weights=False)
        state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in whole.state_dict().items()}
        monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, state=state, **__: state)
        network = torchvision_model(name, pretrained=True, num_classes=1000, image_size=96)
        assert not any("aux" in key.lower() for key in network.state_dict())
        assert network(images(2, size=96)).logits.shape == (2, 1000)


def test_torchvision_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"^pretrained: the weights of resnet18 .* \(URLError.*checkpoints"):
        torchvision_model("resnet18", pretrained=True, num_classes=1000, image_size=64)
    wrong = r"^pretrained = true: must be false: .* are for 224-pixel images, the dataset has 64"
    with pytest.raises(UserError, match=wrong):
        torchvision_model("vit_b_32", pretrained=True, num_classes=1000, image_size=64)


@pytest.mark.parametrize(
    ("sizes", "names", "indices"),
    [
        ([2, 4, 8, 16, 32], FIVE[:-1], [0, 1, 2, 3, 4]),
        ([4, 8, 16, 32], FOUR[:-1], [0, 1, 2, 3]),
        ([1, 2, 4, 8, 16, 32], FIVE[:-1], [1, 2, 3, 4, 5]),
        ([2, 2, 4, 8, 8, 16, 16, 16], FOUR[:-1], [1, 2, 4, 7]),
        ([16] * 12, FOUR[:-1], [2, 5, 8, 11]),
        ([16] * 3, FOUR[:3], [0, 1, 2]),
        ([8, 16], FOUR[:2], [0, 1]),
    ],
)
def test_stages_are_the_last_maps_of_each_size(sizes: list[int], names: list[str], indices: list[int]) -> None:
    assert choose_stages(sizes) == (names, indices)


@pytest.mark.parametrize("make, name", [(timm_model, "resnet18"), (torchvision_model, "resnet18")])
def test_small_images_are_scaled_up_on_the_way_in(make, name):
    torch.manual_seed(0)
    network = make(name, num_classes=3, image_size=8, upscale=64).eval()
    images = torch.randn(2, 3, 8, 8)
    large = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic", align_corners=False)
    assert torch.equal(network(images).logits, network.net(large)) and network.image_size == 8
    plain = make(name, num_classes=3, image_size=64)
    plain.load_state_dict(network.state_dict())
    assert torch.allclose(plain.eval()(large).logits, network(images).logits, atol=1e-6)


def test_a_network_for_one_size_is_built_for_the_upscaled_one():
    network = timm_model("vit_tiny_patch16_224", num_classes=3, image_size=8, upscale=48, options={"depth": 1})
    assert network(torch.randn(1, 3, 8, 8)).features["stage1"].shape[-2:] == (3, 3)


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 32), ("convnext_atto", 64)])
def test_activations_computed_anew_give_the_same_gradients_and_are_not_kept(name, size):
    gradients, kept = [], []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for anew in (False, True):
        torch.manual_seed(0)
        network = timm_model(name, num_classes=3, image_size=size, options={"drop_path_rate": 0.2}).train()
        if anew:
            checkpoint_gradients(network)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = network(torch.randn(2, 3, size, size)).logits.square().sum()
        loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and kept[1] < kept[0] / 5


@pytest.mark.parametrize("network", [nn.Linear(2, 2), timm_model("resnet18", num_classes=3, image_size=32)], ids=[0, 1])
def test_networks_that_cannot_compute_activations_anew_are_refused(network):
    with pytest.raises(UserError, match=r"trainer.grad_checkpointing = true: must be false: (this|batch norm)"):
        checkpoint_gradients(network)


@pytest.mark.parametrize("name", SIZED)
def test_a_library_s_network_in_a_size_of_ours_has_the_parameters_that_it_says(name):
    size = 224 if "224x224" in header(name) else 32
    network = build(name, size=size)
    assert f"{count_parameters(network):,} parameters with 100 classes" in header(name)
    outputs = network.eval()(torch.randn(2, 3, size, size))
    assert outputs.logits.shape == (2, 100) and {"stage1", "stage4", "pooled"} <= outputs.features.keys()


def test_a_class_of_timm_that_there_is_not_is_refused():
    for kind, options in (("timm.models.mlp_mixer.MlpMixr", {}), ("timm.models.mlp_mixer.MlpMixer", {"blocks": 2})):
        with pytest.raises(
            UserError,
            match=r"kind = timm.*: must be a class of timm|^options.blocks = 2: must be left out: .* Near: num_blocks",
        ):
            timm_class(kind, options, num_classes=3)
