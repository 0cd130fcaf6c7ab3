"""Small stand-ins that the engine's tests share: a network with dropout and batch-norm, and a seeded batch stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from kdbench.engine.device import place
from kdbench.engine.distiller import Distiller
from kdbench.engine.learner import Learner
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.schedule import ScheduleOptions, lr_factors
from kdbench.losses.base import DistillationLoss, detached
from kdbench.types import Batch, LossTerms, Outputs, Target

CLASSES = 3


class SmallNet(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, image: torch.Tensor) -> Outputs:
        pooled = self.body(image).mean((2, 3))
        return Outputs(self.fc(pooled), {"pooled": pooled})


class LogitDistance(DistillationLoss):
    """Cross-entropy, and squared distance to a teacher if there is one."""

    uses_teacher = False

    def __init__(self, distill: float = 1.0) -> None:
        super().__init__({"task": 1.0, "distill": distill})

    @property
    def formula(self) -> str:
        return f"CE + {self.weights['distill']} distance"

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        task = self.task(student.logits, target.label)
        if teacher is None:
            return self.combine(task=task)
        return self.combine(task=task, distill=(student.logits - detached(teacher, "test")).square().mean())


@dataclass
class Stream:
    """Epochs of random images whose class shows in the mean."""

    size: int = 24
    batch: int = 8
    seed: int = 0
    views: int | None = 1

    @property
    def steps(self) -> int:
        return self.size // self.batch

    def epoch(self, epoch: int, epochs: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        for step in range(self.steps):
            label = torch.randint(CLASSES, (self.batch,), generator=generator)
            image = torch.randn(self.batch, 1, 6, 6, generator=generator) + label[:, None, None, None]
            progress = torch.tensor((epoch + step / self.steps) / epochs)
            yield Batch(image, torch.zeros_like(label), Target(label, torch.arange(self.batch), progress))


@dataclass
class Evaluation:
    """The first epoch of another stream."""

    size: int = 16

    def __iter__(self) -> Iterator[Batch]:
        return Stream(self.size, 8, seed=7).epoch(0, 1)


def make_learner(
    seed: int = 0, distill: float = 1.0, epochs: int = 3, stream: Stream | None = None, lr: float = 0.05,
    trainer: TrainerOptions | None = None, name: str = "sgd",
) -> Learner:  # fmt: skip
    trainer = trainer or TrainerOptions(device="cpu", progress="none")
    placement = place(trainer)
    torch.manual_seed(seed)
    distiller = Distiller(placement.put(SmallNet()), LogitDistance(distill), placement)
    steps = (stream or Stream()).steps
    factors = lr_factors(ScheduleOptions(epochs=epochs, batch_size=8, shape="cosine"), steps)
    meters = Meters(placement.device, steps)
    momentum = 0.9 if name in ("sgd", "dot", "aligned_sgd") else None
    return Learner(distiller, OptimizerOptions(name, lr, momentum=momentum), trainer, factors, meters, seed)
