"""Networks under vmap, torch.compile and channels_last: what the engine may do with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state

from kdbench.models.base import count_parameters
from kdbench.models.fold import fold_batchnorm
from tests.support.models import build, images

FAMILIES: dict[str, dict[str, object]] = {
    "resnet8": {},
    "wrn_16_1": {"depth": 10},
    "vgg8": {},
    "mobilenetv2_half": {},
    "shufflenetv1": {"units": [2, 1, 1]},
    "shufflenetv2": {"units": [1, 1, 1]},
    "resnet18": {"blocks": [1, 1, 1, 1]},
    "densenet_bc": {"depth": 10, "growth": 4},
    "mlp": {"hidden": [16, 16]},
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_several_networks_run_as_one(name: str) -> None:
    """Training mode under vmap: the same logits and the same batch-norm statistics as one after the other."""
    networks = [build(name, classes=10, channels=1, size=8, **FAMILIES[name]) for _ in range(2)]
    parameters, buffers = stack_module_state(networks)
    x = images(4, channels=1, size=8)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(networks[0], (p, b), (x,)).logits

    with torch.no_grad():
        together = torch.vmap(call)(parameters, buffers)
        alone = torch.stack([network(x).logits for network in networks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    for key, value in buffers.items():
        torch.testing.assert_close(value[1], dict(networks[1].named_buffers())[key], rtol=1e-4, atol=1e-5)


def test_one_graph_without_breaks() -> None:
    network = build("shufflenetv2", classes=10, channels=1, size=8, units=[0, 1, 0]).eval()
    x = images(2, channels=1, size=8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, network(x).logits)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mlp"}))
def test_channels_last_goes_through(name: str) -> None:
    network = build(name, classes=10, size=16, **FAMILIES[name]).eval()
    x = images(2, size=16)
    with torch.no_grad():
        plain = network(x)
        other = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(other.logits, plain.logits, rtol=1e-4, atol=1e-5)
    for key in ("stem", "stage1", "stage2"):
        assert other.features[key].is_contiguous(memory_format=torch.channels_last), key


def test_folded_networks_have_one_bias_more_for_each_convolution() -> None:
    network = build("resnet8", classes=10)
    assert count_parameters(fold_batchnorm(network)) == count_parameters(network) - sum(
        parameter.numel() for name, parameter in network.named_parameters() if "bn" in name and name.endswith("weight")
    ) - sum(network.get_parameter(f"layer{i}.0.downsample.1.weight").numel() for i in (2, 3))
