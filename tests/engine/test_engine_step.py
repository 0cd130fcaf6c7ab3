"""A whole step without a GPU: nothing in it waits for the device, and nothing it reads lies elsewhere."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from kdbench.engine.device import Placement
from kdbench.engine.distiller import Distiller
from kdbench.engine.learner import Learner
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.models.resnet import ResNet
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Target
from tests.support import losses
from tests.support.devices import OneDevice

META = torch.device("meta")
FOLDER = Path(__file__).parents[2] / "configs/optimizer"
OPTIMIZERS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EXTRAS = ({}, {"ema": 0.99}, {"clip": 1.0}, {"accumulate": 2})


def options(name: str) -> OptimizerOptions:
    """configs/optimizer/<name>.yaml without what it takes from elsewhere."""
    values = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    plain = {str(k): v for k, v in values.items() if k != "defaults" and not str(v).startswith("${")}
    return OptimizerOptions(**{"lr": 0.1, **plain})


def network(depth: int) -> ResNet:
    with META:
        return ResNet(depth=depth, widths=[4, 4, 8, 16], num_classes=4, in_channels=3, image_size=8)


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: "".join(extra) or "plain")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_waits_for_the_device(name, extra):
    distiller = Distiller(network(8).train(), losses.build("kl"), Placement(META, torch.float32, False))
    trainer = TrainerOptions(device="cpu", progress="none", **extra)
    learner = Learner(distiller, options(name), trainer, [1.0, 0.5], Meters(META, 2), 0)
    learner.begin_epoch(0)
    teacher = LiveTeacher(network(14), 8, contextlib.nullcontext)
    with META:
        row = torch.arange(8)
        batch = Batch(torch.randn(8, 3, 8, 8), row, Target(row % 4, row, torch.zeros(())))
    with OneDevice():
        for _ in range(2):
            learner.step(batch, teacher(batch))
    assert learner.failure is None, learner.failure
