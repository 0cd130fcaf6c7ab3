"""Networks on a device without float64, as Apple's MPS is: nothing of that type may come to be there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench.models.ensemble import Ensemble
from kdbench.models.fold import fold_batchnorm
from kdbench.models.fusion import Fused
from tests.support.models import build


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that makes a float64 tensor on a device that is not the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 and leaf.device.type != "cpu":
                raise TypeError(f"{func}: no float64 on {leaf.device}")
        return out


@pytest.fixture
def device(monkeypatch):
    """A device that holds no numbers and refuses float64; what is fetched from it is zeros."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros_like(self, device="cpu"))
    with NoFloat64():
        yield "meta"


def test_the_device_of_these_tests_has_no_float64(device) -> None:
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device=device).double()


def test_batch_norms_are_folded_without_float64_on_the_device(device) -> None:
    folded = fold_batchnorm(build("resnet8", classes=4, size=8).to(device).eval(), torch.zeros(1, 3, 8, 8))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert {p.device.type for p in folded.parameters()} == {device}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ensemble([nn.Linear(2, 3), nn.Linear(2, 3)], [0.25, 0.75], tau=4.0),
        lambda: Fused(nn.Linear(2, 4), [nn.Linear(2, 3)], [[0, 2]], [0.5], 4),
    ],
    ids=["ensemble", "fused"],
)
def test_what_a_network_is_made_with_stays_on_the_cpu(make) -> None:
    network = make()
    moved = network.to("meta")
    assert {t.device.type for t in moved.state_dict().values() if t.dtype == torch.float64} == {"cpu"}
    assert next(moved.parameters()).device.type == "meta"
    again = make().bfloat16().float()
    assert torch.equal(again.made_with, make().made_with) and again.made_with.dtype == torch.float64
