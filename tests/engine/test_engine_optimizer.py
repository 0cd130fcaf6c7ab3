"""Parameter groups: who decays, and how much of the learning rate a layer gets."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import Lamb, Lion, Muon, param_groups_layer_decay, param_groups_weight_decay

from kdbench.engine.optimizer import load_state, lr_setter, make_optimizer
from kdbench.engine.options import OptimizerOptions
from kdbench.errors import UserError
from kdbench.models.timm import timm_model


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)


def made(network, **options):
    return make_optimizer(OptimizerOptions("adamw", 0.1, weight_decay=0.05, decay_1d=False, **options), [network])


def by_parameter(groups, key):
    return {parameter: group[key] for group in groups for parameter in group["params"]}


def test_without_either_the_groups_are_as_they_were(vit):
    groups = made(vit).param_groups
    plain = [p for p in vit.parameters() if p.ndim <= 1]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0] and "lr_scale" not in groups[0]
    assert all(a is b for a, b in zip(groups[1]["params"], plain, strict=True))


def test_what_a_network_names_itself_does_not_decay_as_in_timm(vit):
    expected = by_parameter(
        param_groups_weight_decay(vit, 0.05, no_weight_decay_list=vit.no_weight_decay()), "weight_decay"
    )
    holder = torch.nn.Sequential(vit)  # its names have a place in front
    assert by_parameter(made(holder, no_decay=["own"]).param_groups, "weight_decay") == expected
    assert by_parameter(made(vit).param_groups, "weight_decay") != expected


def test_parameters_by_parts_of_their_names(vit):
    decays = by_parameter(made(vit, no_decay=["pos_embed", "blocks.0"]).param_groups, "weight_decay")
    named = dict(vit.named_parameters())
    assert decays[named["pos_embed"]] == decays[named["blocks.0.mlp.fc1.weight"]] == 0.0
    assert decays[named["blocks.1.mlp.fc1.weight"]] == 0.05
    with pytest.raises(UserError, match=r"no_decay = .*no name holds 'pos_embedding'"):
        made(vit, no_decay=["pos_embedding"])


def test_layer_decay_is_timms(vit):
    holder = torch.nn.Sequential(vit, torch.nn.Linear(2, 2))
    optimizer = made(holder, layer_decay=0.5)
    scales = by_parameter(param_groups_layer_decay(vit, layer_decay=0.5), "lr_scale")
    scales |= dict.fromkeys(holder[1].parameters(), 1.0)
    assert by_parameter(optimizer.param_groups, "lr_scale") == scales
    lr_setter(optimizer)(0.2)
    assert by_parameter(optimizer.param_groups, "lr") == {p: pytest.approx(0.2 * s) for p, s in scales.items()}
    assert len(set(scales.values())) == 5  # patches, three blocks, the head
    with pytest.raises(UserError, match=r"layer_decay = 0.5: must be null, or a number for a network of timm"):
        made(torch.nn.Linear(2, 2), layer_decay=0.5)


@pytest.mark.parametrize("nested", [False, True])
def test_a_network_of_timm_as_kdbench_builds_it_keeps_its_layers_and_exceptions(nested):
    """Its parts lie in a network of kdbench's, which has none of the library's methods."""
    built = timm_model(
        "vit_tiny_patch16_224",
        num_classes=5,
        image_size=32,
        options={"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    )
    holder = torch.nn.Sequential(built) if nested else built
    groups = made(holder, layer_decay=0.5, no_decay=["own"]).param_groups
    assert by_parameter(groups, "lr_scale") == by_parameter(
        param_groups_layer_decay(built.net, layer_decay=0.5), "lr_scale"
    )
    decays, named = by_parameter(groups, "weight_decay"), dict(built.net.named_parameters())
    assert decays[named["pos_embed"]] == decays[named["cls_token"]] == 0.0 and decays[named["head.weight"]] == 0.05


def test_learning_rates_on_the_device_are_scaled_too_and_survive_a_checkpoint(vit):
    options = OptimizerOptions("sgd", 0.1, momentum=0.9, layer_decay=0.5)
    first, second = (make_optimizer(options, [vit], on_device=True) for _ in range(2))
    assert isinstance(first.param_groups[0]["lr"], torch.Tensor)
    load_state(second, first.state_dict())
    for optimizer, value in ((first, 0.2), (second, torch.tensor(0.2))):
        lr_setter(optimizer)(value)
        rates = [(float(group["lr"]), 0.2 * group["lr_scale"]) for group in optimizer.param_groups]
        assert all(got == pytest.approx(expected) for got, expected in rates) and len({got for got, _ in rates}) == 5


def test_a_share_of_the_rate_is_the_same_number_in_a_recorded_step_and_in_an_eager_one():
    """Both multiply in float32: rates rounded once or twice differ in the last bit, and so would the weights."""
    optimizer = make_optimizer(OptimizerOptions("sgd", 0.1), [torch.nn.Linear(2, 2)], on_device=True)
    optimizer.param_groups[0]["lr_scale"] = 0.7**3
    fill = lr_setter(optimizer)
    for step in range(50):
        rate, found = 0.1 * 0.97**step, []
        for value in (rate, torch.tensor(rate)):
            fill(value)
            found.append(optimizer.param_groups[0]["lr"].clone())
        assert torch.equal(*found) and found[0] == pytest.approx(rate * 0.7**3)


@pytest.mark.parametrize(
    ("name", "own", "theirs"),
    [
        ("lion", {"betas": [0.9, 0.99]}, lambda p: Lion(p, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))),
        ("lion", {"options": {"caution": True}}, lambda p: Lion(p, lr=0.01, weight_decay=0.1, caution=True)),
        ("muon", {"momentum": 0.9, "nesterov": True},
         lambda p: Muon(p, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True)),
        ("lamb", {"options": {"trust_clip": True}}, lambda p: Lamb(p, lr=0.01, weight_decay=0.1, trust_clip=True)),
    ],
)  # fmt: skip
def test_steps_of_timms_optimizers_are_timms(name, own, theirs):
    mine, other = (torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)) for _ in range(2))
    other.load_state_dict(mine.state_dict())
    pair = make_optimizer(OptimizerOptions(name, 0.01, weight_decay=0.1, **own), [mine]), theirs(other.parameters())
    before = [parameter.clone() for parameter in mine.parameters()]
    for _ in range(3):
        inputs = torch.randn(8, 6)
        for network, optimizer in zip((mine, other), pair):
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()
    for parameter, same, old in zip(mine.parameters(), other.parameters(), before):
        assert torch.equal(parameter, same) and not torch.equal(parameter, old)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (OptimizerOptions("sgd", 0.1, options={"xyz": 1}), r"options\.xyz = 1: must be left out: sgd takes dampening"),
        (OptimizerOptions("lion", 0.1, options={"cautious": True}), r"options\.cautious = .* takes betas, cau.*Did"),
        (OptimizerOptions("adamw", 0.1, momentum=0.9), r"^momentum = 0\.9: must be left out: adamw takes amsgrad"),
        (OptimizerOptions("dot", 0.1, options={"delt": 1}), r"options\.delt = 1: .*takes delta, momentum\. Did"),
        (OptimizerOptions("sgd", 0.1, options={"lr": 1}), r"options\.lr = 1: must be left out"),
        (OptimizerOptions("sgd", 0.1, options={"dampening": "x"}), r"options\.dampening = x: must be .*float"),
        (OptimizerOptions("adan", 0.1, options={"eps": -1.0}), "options = .*: must be what adan takes"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused_by_its_key(options, said):
    with pytest.raises(UserError, match=said):
        make_optimizer(options, [torch.nn.Linear(2, 2)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="one that needs a GPU")
def test_an_optimizer_of_a_library_that_is_not_here_is_refused():
    with pytest.raises(UserError, match="name = bnbadam: must be an optimizer that can be had here: CUDA"):
        make_optimizer(OptimizerOptions("bnbadam", 0.1), [torch.nn.Linear(2, 2)])


def test_steps_that_are_not_recorded_are_not_warned_of():
    """Those before a recording are like that, and all where nothing is recorded: torch would advise against it."""
    optimizer = make_optimizer(OptimizerOptions("adamw", 0.1), [torch.nn.Linear(2, 2)], on_device=True)
    assert optimizer.param_groups[0]["capturable"]
    # By this torch remembers that it has warned; it asks for a device first, which is not here.
    assert optimizer._warned_capturable_if_run_uncaptured
