"""torch.compile of a student under its loss, where it pays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from kdbench.engine import device as placement
from kdbench.engine.distiller import Distiller
from kdbench.engine.options import TrainerOptions
from kdbench.types import Outputs, StepOutput, Target

Forward = Callable[[Tensor, "Outputs | None", Target], StepOutput]

# Compiling takes about a minute the first time (later runs find it in the compiler's cache on disk).
LONG = 20_000  # steps


class Compiled:
    """A compiled forward pass for images of the first shape it sees, and the plain one for any other: an epoch's last,
    smaller batch is not worth a second compilation."""

    def __init__(self, distiller: Distiller) -> None:
        self._plain = distiller
        self._compiled = torch.compile(distiller, dynamic=False)
        self._shape: torch.Size | None = None

    def __call__(self, image: Tensor, teacher: Outputs | None, target: Target) -> StepOutput:
        self._shape = self._shape or image.shape
        return (self._compiled if image.shape == self._shape else self._plain)(image, teacher, target)


def compiled(distiller: Distiller, options: TrainerOptions, device: torch.device, steps: int) -> Forward:
    """The distiller's forward pass as `trainer.compile` asks for it.

    A rule and not a stopwatch decides `auto`, because compiled kernels differ in the last digits: the same run must
    give the same numbers again. On CPUs it is off: a step of resnet20 gained 0 to 7 % for 42 s of compilation.
    """
    triton = importlib.util.find_spec("triton") is not None
    pays = placement.PROVEN_ON_CUDA and device.type == "cuda" and triton and steps >= LONG
    return Compiled(distiller) if options.compile == "on" or (options.compile == "auto" and pays) else distiller
