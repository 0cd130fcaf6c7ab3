"""What a network was trained with, and how it fits data that have others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdbench.errors import UserError
from kdbench.models import timm as timm_models
from kdbench.models import torchvision as torchvision_models
from kdbench.models.interface import Adapted, Interface, adapt, channels_of, class_order, plain
from kdbench.models.resnet import ResNet
from kdbench.models.weights import read_file
from kdbench.types import Outputs

ABC = ("ape", "bat", "cat")


def named(*classes: str, published: bool = False) -> Interface:
    return Interface("photos", tuple(classes), published=published)


def seen(mean: tuple[float, ...], std: tuple[float, ...], classes: tuple[str, ...] = ABC) -> Interface:
    return Interface("photos", classes, mean, std)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(depth=8, widths=[4, 4, 8, 8], num_classes=3, in_channels=3, image_size=8).eval()


def test_a_network_sees_pixels_as_it_was_trained_to_see_them(network):
    pixels = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    own, data = seen((0.1, 0.5, 0.9), (0.2, 0.1, 0.3)), seen((0.4, 0.4, 0.4), (1.0, 0.5, 0.25))
    as_own, as_data = (
        ((pixels - torch.tensor(i.mean).view(3, 1, 1)) / torch.tensor(i.std).view(3, 1, 1)).float() for i in (own, data)
    )
    adapted, said = adapt(network, own, data, "teacher.run", "a")
    torch.testing.assert_close(adapted(as_data).logits, network(as_own).logits, rtol=1e-4, atol=1e-5)
    assert (adapted(as_data).logits - network(as_data).logits).abs().max() > 0.01
    assert len(said) == 1 and "mean 0.1 0.5 0.9, std 0.2 0.1 0.3" in said[0] and "mean 0.4" in said[0]
    assert plain(adapted) is network


def test_logits_come_in_the_order_of_the_datas_classes(network):
    own = seen((0.5,) * 3, (0.5,) * 3)
    images = torch.randn(4, 3, 8, 8)
    adapted, said = adapt(network, own, seen(own.mean, own.std, ("cat", "ape", "bat")), "teacher.run", "a")
    assert torch.equal(adapted(images).logits, network(images).logits[:, [2, 0, 1]])
    assert adapted(images).features.keys() == network(images).features.keys() and "matched by name" in said[0]
    fewer, said = adapt(network, own, seen(own.mean, own.std, ("cat", "bat")), "teacher.run", "a")
    assert torch.equal(fewer(images).logits, network(images).logits[:, [2, 1]]) and "(ape)" in said[0]


def test_a_network_on_its_own_data_is_the_same_object(network):
    own = seen((0.5,) * 3, (0.5,) * 3)
    assert adapt(network, own, own, "teacher.run", "a") == (network, [])
    unknown, said = adapt(network, Interface(), own, "teacher.run", "a")
    assert unknown is network and len(said) == 1 and "not known" in said[0]


def test_adapted_networks_differ_in_what_tables_are_keyed_by(network):
    data = seen((0.5,) * 3, (0.5,) * 3)
    others = [seen((0.5,) * 3, (0.5, 0.5, 0.6)), seen((0.4, 0.5, 0.5), (0.5,) * 3), seen(*2 * [(0.5,) * 3], ABC[::-1])]
    shown = {repr(adapt(network, own, data, "teacher.run", "a")[0]) for own in (data, *others)}
    assert len(shown) == 4


@pytest.mark.parametrize(
    ("own", "data", "order"),
    [
        (named(*ABC), named(*ABC), None),
        (named("0", "1", "10", "2"), named("0", "1", "2", "10"), [0, 1, 3, 2]),
        (named("0", "1", "2"), named("class 0", "class 1", "class 2"), None),
        (named("00", "01"), named("0", "1"), None),
        (named("a", "a"), named("x", "y"), None),  # a network's own two classes of one name: nothing can be matched
        (named("tench", "goldfish", published=True), named("n01440764", "n01443537"), None),
        (named("tench", "goldfish", published=True), named("goldfish", "tench"), [1, 0]),
        (Interface(), named(*ABC), None),
    ],
)
def test_classes_are_matched_by_name(own, data, order):
    assert class_order(own, data, "run", "a")[0] == order


def test_numbers_and_names_are_matched_by_place_and_that_is_said():
    order, said = class_order(named("0", "1", "2"), named(*ABC), "run", "a")
    assert order is None and len(said) == 1 and "by place, not by name" in said[0]


@pytest.mark.parametrize(
    ("own", "data", "unknown"),
    [
        (named(*ABC), named("ape", "bat", "dog"), "and not dog"),
        (named(*ABC), named(*ABC, "dog"), "and not dog"),
        (named("1", "2", "3"), named("0", "1", "2"), "and not 0"),
        (named("Ape", "bat", "cat"), named(*ABC), "and not ape"),
        (named("tench", "goldfish", published=True), named("tench"), None),
        (named("tench", published=True), named("goldfish", "tench"), "and not goldfish"),
    ],
)
def test_classes_that_a_network_does_not_know_are_refused_by_name(own, data, unknown):
    if unknown is None:
        assert class_order(own, data, "run", "a")[0] == [0]
        return
    with pytest.raises(UserError, match=f"run = a: .*photos.*{unknown}"):
        class_order(own, data, "run", "a")


@pytest.mark.parametrize(
    "about",
    [
        {"classes": "abc"}, {"classes": [1, 2]}, {"mean": [0.5]}, {"mean": [0.5], "std": [0.0]}, {"mean": 3, "std": 4},
        {"mean": [float("nan")], "std": [1.0]}, {"mean": [[0.5]], "std": [1.0]}, {"mean": [True], "std": [1.0]},
    ],
)  # fmt: skip
def test_damaged_entries_are_refused_with_the_files_name(about):
    with pytest.raises(UserError, match=r"network\.json: damaged"):
        Interface.read(about, "network.json")


def test_what_is_kept_is_read_back():
    made = Interface("photos", ABC, (0.1, 1 / 3), (0.5, 2.0), 32, 40)
    assert Interface.read(made.kept(), "a") == made
    assert Interface.read({}, "a") == Interface()


def test_gray_images_have_the_average_of_the_colours():
    assert channels_of([0.25, 0.5, 0.75], 1) == (0.5,) and channels_of([0.25, 0.5, 0.75], 3) == (0.25, 0.5, 0.75)


def test_libraries_say_what_their_weights_were_trained_with():
    own = timm_models.timm_model("resnet18", num_classes=4, image_size=32).published
    assert own.mean == (0.485, 0.456, 0.406) and own.std == (0.229, 0.224, 0.225) and own.size == 224
    assert own.published and len(own.classes) == 1000 and own.classes[0] == "n01440764"
    half = timm_models.timm_model("vit_tiny_patch16_224", num_classes=4, image_size=32, in_channels=1).published
    assert half.mean == half.std == (0.5,)
    theirs = torchvision_models.torchvision_model("resnet18", num_classes=4, image_size=32).published
    assert theirs.mean == own.mean and theirs.classes[0] == "tench" and (theirs.size, theirs.resize) == (224, 256)


def test_files_of_others_say_what_they_were_trained_with(tmp_path):
    state = {"fc.weight": torch.zeros(2, 3)}
    typed = SimpleNamespace(mean=[0.5], std=[0.25])
    torch.save({"state_dict": state, "args": vars(typed)}, tmp_path / "last.pth.tar")
    file = read_file(tmp_path / "last.pth.tar")
    assert file.about == {"mean": [0.5], "std": [0.25]} and file.entry == "state_dict"
    torch.save(state, tmp_path / "hub.bin")
    assert read_file(tmp_path / "hub.bin").about == {} and read_file(tmp_path / "hub.bin").entry is None
    config = '{"num_classes": 2, "pretrained_cfg": {"mean": [0.1], "std": [0.2], "label_names": ["a", "b"]}}'
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    assert read_file(tmp_path / "hub.bin").about == {"mean": [0.1], "std": [0.2], "classes": ["a", "b"]}


def test_vectors_are_renormalised_by_dimension():
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs(x, {})

    own, data = seen((1.0, 2.0), (1.0, 4.0)), seen((0.0, 0.0), (1.0, 1.0))
    adapted = adapt(Net(), own, data, "teacher.run", "a")[0]
    assert isinstance(adapted, Adapted)
    assert torch.equal(adapted(torch.tensor([[1.0, 10.0]])).logits, torch.tensor([[0.0, 2.0]]))
