"""Networks of one's own: any nn.Module that returns logits, and what is said of one that does not."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdbench.build import make_network
from kdbench.errors import UserError
from kdbench.models.adopt import Adopted
from kdbench.models.base import last_layer_name
from kdbench.types import ImageInfo, Outputs, VectorInfo

IMAGES, VECTORS = ImageInfo(5, 3, 8), VectorInfo(5, 7)


class Plain(nn.Module):
    """Takes what it needs and no more."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.drop(self.body(x).mean((2, 3))))


class Fixed(Plain):
    """The number of classes is its own business."""

    def __init__(self) -> None:
        super().__init__(3)


class WithLogits(Plain):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x))


class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x


class Knows(Plain):
    def forward(self, x):
        return Outputs(super().forward(x), {})


class Vectors(nn.Module):
    def __init__(self, num_classes: int, dimensions: int) -> None:
        super().__init__()
        self.head = nn.Linear(dimensions, num_classes)

    def forward(self, x):
        return self.head(x)


class OffMeta(Plain):
    """Reads a number of its weights while it runs, which has no form without memory."""

    def forward(self, x):
        return super().forward(x) * (1.0 if float(self.head.weight.sum()) < 1e9 else 2.0)


def spec(kind: type, **options):
    return make_network("mine", {"_target_": f"{__name__}.{kind.__name__}", **options}, "student")


def test_a_plain_network_returns_outputs_under_its_own_names():
    network = spec(Plain, features={"stage1": "body"}).make(IMAGES)
    images = torch.rand(2, 3, 8, 8)
    network.eval()
    found = network(images)
    assert isinstance(network, Adopted) and set(network.state_dict()) == set(Plain(5).state_dict())
    assert torch.equal(found.logits, network.net(images))
    assert torch.equal(found.features["stage1"], network.net.body(images))
    assert torch.equal(found.features["pooled"], network.net.body(images).mean((2, 3)))
    assert last_layer_name(network) == "head"
    assert not network.net.body._forward_hooks and not network.net.head._forward_pre_hooks
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1)
    assert torch.allclose(other(images).logits, found.logits + 1)
    assert torch.equal(network(images).logits, found.logits)


def test_trying_it_draws_no_random_number_and_changes_nothing():
    torch.manual_seed(3)
    made = Plain(5)
    after = torch.rand(1)
    torch.manual_seed(3)
    network = spec(Plain).make(IMAGES)
    assert torch.equal(torch.rand(1), after) and network.training
    for name, value in made.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_what_has_logits_in_it_and_what_knows_kdbench():
    images = torch.rand(2, 3, 8, 8)
    assert spec(WithLogits).make(IMAGES)(images).logits.shape == (2, 5)
    assert type(spec(Knows).make(IMAGES)) is Knows


@pytest.mark.parametrize(
    ("kind", "info", "options", "said"),
    [
        (Fixed, IMAGES, {}, r"returns \[batch, 5\] for this dataset\. For two inputs it returns \[2, 3\]"),
        (Pair, IMAGES, {}, "It returns a tuple of 2"),
        (Plain, VECTORS, {}, "a network that takes 5 classes of vectors with 7 dimensions. It raises RuntimeError"),
        (Vectors, IMAGES, {}, "a network for image data"),
        (Plain, ImageInfo(5, 1, 8), {}, "It raises RuntimeError"),
        (Plain, IMAGES, {"features": {"stage1": "boddy"}}, "student.features.stage1 = boddy: .* Did you mean body"),
        (Plain, IMAGES, {"features": "body"}, "features = body"),
        (Plain, IMAGES, {"widht": 3}, "student.widht: there is no such key. Did you mean student.width"),
    ],
)
def test_what_cannot_be_is_said_without_memory(kind, info, options, said):
    with pytest.raises(UserError, match=said):
        spec(kind, **options).sketch(info)


def test_a_network_that_has_no_form_without_memory_is_tried_with_it():
    assert spec(OffMeta).sketch(IMAGES)(torch.rand(2, 3, 8, 8)).logits.shape == (2, 5)


def test_a_function_of_another_library_needs_no_file():
    network = make_network("theirs", {"_target_": "torchvision.models.shufflenet_v2_x0_5"}, "student").make(
        ImageInfo(5, 3, 32)
    )
    assert network.eval()(torch.rand(1, 3, 32, 32)).features["pooled"].shape == (1, 1024)
