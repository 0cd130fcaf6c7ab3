"""A short training with recorded steps beside the same one with plain steps, as a process of its own:
`python -m kdbench.engine.rehearsal cuda:0`.

Two students under one live teacher, one of them with dropout; moving averages, clipped gradients, a learning rate that
falls in every step, two epochs with a smaller last batch each and an evaluation between them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from kdbench.engine.device import own_stream, place
from kdbench.engine.distiller import Distiller
from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.twin import State, apart, limit, state_of
from kdbench.errors import UserError
from kdbench.losses.kl import KL
from kdbench.models.mlp import MLP
from kdbench.models.resnet import ResNet
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Target

CLASSES, SIDE, BATCH, STEPS, EPOCHS = 10, 16, 32, 12, 2
CLOSE = 0.02  # of the way of all steps; a rate that lags one step behind is wrong by four times as much


def why_not(device: str) -> str:
    """Why recorded steps are not to be believed on a device; "" if they end where plain steps end."""
    start, plain, again = (ends(device, "off", epochs) for epochs in (0, EPOCHS, EPOCHS))
    try:
        recorded = ends(device, "on", EPOCHS)
    except UserError as error:  # of a step that is refused, or strays
        return str(error)
    for one, first, same, before in zip(recorded, plain, again, start, strict=True):
        far, noise = apart(one, first, before), apart(same, first, before)
        if far > limit(CLOSE, noise):
            return f"in a trial they ended elsewhere than plain ones ({far:.2g} of the way; plain ones {noise:.2g})"
    return ""


def ends(device: str, recorded: Literal["on", "off"], epochs: int) -> list[State]:
    """Weights and buffers of both students and their moving averages after some epochs. Raises what a step raises."""
    trainer = TrainerOptions(device=device, cuda_graph=recorded, compile="off", ema=0.9, clip=1.0)
    placement = place(trainer)
    torch.manual_seed(0)
    teacher = LiveTeacher(placement.put(_resnet(14)), BATCH, placement.autocast)
    students: list[nn.Module] = [_resnet(8), MLP([64, 64], dropout=0.3, num_classes=CLASSES, image_size=SIDE)]
    steps = OptimizerOptions("sgd", 0.05, momentum=0.9, weight_decay=5e-4)
    factors = [1 - n / (STEPS * EPOCHS) for n in range(STEPS * EPOCHS)]
    learners = []
    for seed, student in enumerate(students):
        distiller = Distiller(placement.put(student), KL({"task": 0.5, "distill": 0.5}), placement)
        meters = Meters(placement.device, STEPS)
        learners.append(Learner(distiller, steps, trainer, factors, meters, seed))
    graph = cohort_graph(learners, placement.device)
    with own_stream(placement.device):
        for epoch in range(epochs):
            for learner in learners:
                learner.begin_epoch(epoch)
            train_epoch(learners, _batches(epoch, placement.device), teacher, lambda: None, graph)
            for learner in learners:
                _check(learner)
    return [state_of(nn.ModuleList([learner.distiller, learner.network])) for learner in learners]


def _resnet(depth: int) -> ResNet:
    return ResNet(depth, [8, 8, 16, 32], num_classes=CLASSES, image_size=SIDE)


def _check(learner: Learner) -> None:
    """The end of an epoch: meters read, and the network evaluated. Raises what its steps have raised."""
    if learner.failure is not None:
        raise learner.failure
    learner.meters.read()
    network = learner.network.eval()
    with torch.no_grad():
        network(torch.zeros(BATCH, 3, SIDE, SIDE, device=next(network.parameters()).device))


def _batches(epoch: int, device: torch.device) -> Iterator[Batch]:
    """Random images whose class shows in their mean, the same for every training."""
    generator = torch.Generator().manual_seed(epoch)
    for step in range(STEPS):
        size = BATCH if step < STEPS - 1 else BATCH // 2
        label = torch.randint(CLASSES, (size,), generator=generator)
        image = torch.randn(size, 3, SIDE, SIDE, generator=generator) + label[:, None, None, None] / CLASSES
        row, progress = torch.arange(size), torch.tensor((epoch + step / STEPS) / EPOCHS)
        target = Target(label.to(device), row.to(device), progress.to(device))
        yield Batch(image.to(device), torch.zeros_like(row).to(device), target)


if __name__ == "__main__":
    print(json.dumps({"why": why_not(sys.argv[1])}))
