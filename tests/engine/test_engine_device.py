"""Precision on a CPU: what computes in which type, and that the weights stay float32 and their names the same."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kdbench.engine.device import place
from kdbench.engine.options import TrainerOptions
from kdbench.models.base import flops
from kdbench.types import ImageInfo


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 2)
    )


def types_of(net: nn.Module, image: torch.Tensor, placement) -> list[torch.dtype]:
    seen: list[torch.dtype] = []
    handles = [module.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype)) for module in net]
    with placement.autocast():
        net(image)
    for handle in handles:
        handle.remove()
    return seen


def bf16_answer(net: nn.Module, image: torch.Tensor, placement) -> torch.Tensor:
    with placement.autocast():
        return net(image).float()


def test_depthwise_convolutions_stay_in_float32_under_bf16():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    fp32 = place(TrainerOptions(device="cpu", precision="fp32"))
    net, plain, image = bf16.put(network()), fp32.put(network()), torch.randn(2, 3, 8, 8)
    low, full = torch.bfloat16, torch.float32
    assert types_of(net, image, bf16) == [low, full, low, low, low]
    assert types_of(copy.deepcopy(net), image, bf16) == [low, full, low, low, low]
    assert types_of(plain, image, fp32) == [full] * 5
    assert list(net.state_dict()) == list(plain.state_dict())
    assert {value.dtype for value in net.state_dict().values()} == {full}
    torch.testing.assert_close(bf16_answer(net, image, bf16), plain(image), rtol=0.05, atol=0.02)
    with bf16.autocast():
        net(image).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == full for p in net.parameters())


def test_a_frozen_network_that_is_cast_once_gives_the_numbers_of_autocast():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    net, image = bf16.put(network()).eval(), torch.randn(2, 3, 8, 8)
    once = bf16.cast(copy.deepcopy(net))
    assert once[0].weight.dtype == torch.bfloat16
    with torch.no_grad(), bf16.autocast():
        assert torch.equal(once(image), net(image))


def test_a_copy_of_a_network_computes_with_its_own_weights():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    net, image = bf16.put(network()), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].bias.zero_()
        assert other[1](net[0](image)).abs().sum() == 0 and net[1](net[0](image)).abs().sum() > 0


def test_arithmetic_is_counted_alike_in_either_precision():
    bf16, info = place(TrainerOptions(device="cpu", precision="bf16")), ImageInfo(2, 3, 8)
    assert flops(bf16.cast(bf16.put(network()).eval()), info) == flops(network(), info) > 0
