"""Optimizers that keep the gradients of a loss's terms apart: as their authors', and as SGD where there is one term."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdbench.engine.apart import APART, ApartOptimizer, refuse_apart
from kdbench.engine.optimizer import load_state, make_optimizer
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.errors import UserError
from tests.support.engine import Stream, make_learner
from tests.support.losses import build

PEERS = json.loads(Path(__file__).with_name("peer_optimizers.json").read_text(encoding="utf-8"))
OPTIONS = {"dot": {"delta": 0.075}, "deepkd": {"task": 0.075, "tckd": -0.075, "nckd": 0.05}, "aligned_sgd": {}}
LABEL, OTHER = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([1, 0, 2, 2, 1])


def wave(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    """Irregular numbers without a random generator: the same on every machine and version."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return scale * torch.sin(0.9 * i**1.5 + phase).reshape(shape)


class Parts(nn.Module):
    """A shared matrix, what the label's term alone reads, and what another term alone reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Parameter(wave((3, 4), 0.3, 1.0)), nn.Parameter(wave((3,), 0.9, 1.0))
        self.adapter = nn.Parameter(wave((3, 3), 1.7, 1.0))

    def terms(self, name: str, step: int) -> dict[str, torch.Tensor]:
        h, t = wave((5, 4), 2.1 + step, 1.5) @ self.shared.T, wave((5, 3), 0.5 + step, 2.0)
        task = {"task": F.cross_entropy(h + self.head, LABEL)}
        if name == "dot":
            return {**task, "distill": 0.7 * F.mse_loss(h @ self.adapter, t)}
        if name == "aligned_sgd":
            against = 0.8 * F.cross_entropy(h, OTHER)
            return {**task, "one": against, "another": 0.1 * (h @ self.adapter).square().mean()}
        tckd = 0.3 * (h - t).square().mean() + 0.1 * self.head.square().sum()
        nckd = 0.05 * (h[:, 0] - t[:, 0]).abs().sum() + 0.2 * (0.5 * h).square().mean() + 0.05 * self.head.sum() ** 2
        return {**task, "tckd": tckd, "nckd": nckd}


def optimizer_of(name: str, network: nn.Module, **more: object) -> torch.optim.Optimizer:
    nesterov = False if name == "aligned_sgd" else None
    options = OptimizerOptions(name, 0.1, 0.05, momentum=0.9, nesterov=nesterov, options={**OPTIONS[name], **more})
    return make_optimizer(options, [network])


@pytest.mark.parametrize("name", sorted(APART))
def test_four_steps_are_the_authors(name):
    network = Parts()
    # DeepKD's code gives the label's gradient the momentum of tckd, whatever its own is set to.
    optimizer = optimizer_of(name, network, **({"task": -0.075} if name == "deepkd" else {}))
    assert isinstance(optimizer, ApartOptimizer)
    for step in range(4):
        optimizer.backward(network.terms(name, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for key, numbers in PEERS[name].items():
        found = network.get_parameter(key).detach().reshape(-1)
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(APART))
def test_a_loss_of_one_term_is_plain_sgd(name):
    """So a teacher that is trained under such an optimizer, on labels alone, is trained as by SGD."""
    network, other = Parts(), Parts()
    optimizer = optimizer_of(name, network)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    mean = 0.9 + sum(OPTIONS["deepkd"].values()) / 3 if name == "deepkd" else 0.9
    plain.param_groups[0]["momentum"] = mean
    for step in range(3):
        assert isinstance(optimizer, ApartOptimizer)
        optimizer.backward({"task": network.terms("dot", step)["task"]})
        optimizer.step()
        plain.zero_grad()
        other.terms("dot", step)["task"].backward()
        plain.step()
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", sorted(APART))
def test_it_goes_on_from_its_state(name):
    def steps(network: Parts, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        assert isinstance(optimizer, ApartOptimizer)
        for number in numbers:
            optimizer.backward(network.terms(name, number))
            optimizer.step()

    whole = Parts()
    steps(whole, optimizer_of(name, whole), range(4))
    first = Parts()
    optimizer = optimizer_of(name, first)
    steps(first, optimizer, range(2))
    second = Parts()
    second.load_state_dict(first.state_dict())
    again = optimizer_of(name, second)
    load_state(again, optimizer.state_dict())
    steps(second, again, range(2, 4))
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_learner_keeps_terms_apart_and_any_other_optimizer_sees_the_sum():
    weights = {}
    for name in ("sgd", "dot", "aligned_sgd"):
        learner = make_learner(name=name, stream=(stream := Stream()))
        learner.begin_epoch(0)
        for batch in stream.epoch(0, 3):
            answer = learner.network(batch.input).logits.detach() + 3.0
            learner.step(batch, learner.network(batch.input)._replace(logits=answer))
        assert learner.failure is None, learner.failure
        weights[name] = torch.cat([p.detach().reshape(-1) for p in learner.distiller.parameters()])
        assert weights[name].isfinite().all()
    assert not torch.equal(weights["sgd"], weights["dot"])


def test_what_cannot_be_kept_apart_is_refused():
    dot, deepkd, aligned = (OptimizerOptions(name, 0.1) for name in ("dot", "deepkd", "aligned_sgd"))
    plain = TrainerOptions()
    assert APART.keys() == {"dot", "deepkd", "aligned_sgd"}  # of all others nothing is asked
    refuse_apart(aligned, TrainerOptions(clip=1.0), build("kl"), "kl")
    refuse_apart(deepkd, plain, build("deepkd"), "deepkd")
    refuse_apart(deepkd, plain, build("ce"), "ce")
    for options, trainer, loss, key in (
        (dot, TrainerOptions(clip=1.0), "kl", r"trainer\.clip = 1"),
        (dot, TrainerOptions(precision="fp16"), "kl", r"trainer\.precision = fp16"),
        (dot, TrainerOptions(compile="on"), "kl", r"trainer\.compile = on"),
        (deepkd, plain, "kl", "loss = kl: must be one with the terms task, nckd, tckd"),
    ):
        with pytest.raises(UserError, match=key):
            refuse_apart(options, trainer, build(loss), loss)
    with pytest.raises(UserError, match=r"options = .*: must be shifts that leave the momenta"):
        optimizer_of("dot", Parts(), delta=0.2)
    with pytest.raises(UserError, match="the loss does not name its terms"):
        APART["dot"]([torch.ones(1, requires_grad=True)], lr=0.1).backward({})
