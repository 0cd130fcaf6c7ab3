"""Reading and aligning the feature maps of two networks, for the losses that compare them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Range, listed
from kdbench.errors import UserError, nearest
from kdbench.losses.functional import real
from kdbench.types import Outputs

# A feature that networks give, and several of them.
Layer = Annotated[str, Range("a feature's name such as stage1", lambda name: bool(name) and not name.isdigit())]
Layers = Annotated[list[Layer], listed(1, "a list of different feature names such as [stage1,stage2]", different=True)]


def student_maps(student: Outputs, layers: Sequence[str]) -> list[Tensor]:
    """The student's features in float32 (float64 stays). Raises UserError for a feature that it does not have."""
    return [real(_feature(student, layer, "student")) for layer in layers]


def teacher_maps(teacher: Outputs | None, layers: Sequence[str], loss: str) -> list[Tensor]:
    """The teacher's features likewise, without gradient. Raises UserError if there is no teacher."""
    if teacher is None:
        raise UserError(f"loss={loss} needs a teacher: choose one with teacher=<network>")
    return [real(_feature(teacher, layer, "teacher").detach()) for layer in layers]


def _feature(outputs: Outputs, layer: str, who: str) -> Tensor:
    if layer not in outputs.features:
        hint = nearest(layer, outputs.features)
        has = ", ".join(outputs.features)
        raise UserError(f"the loss reads the feature {layer}, but the {who} has only {has}. {hint}".rstrip())
    return outputs.features[layer]


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, D, H, W] averaged down to the smaller height and width of the two; D may differ."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)


def needs_maps(layers: Sequence[str], features: Sequence[Tensor], loss: str) -> None:
    """Raises UserError unless all are maps [B, D, H, W]."""
    for layer, feature in zip(cycle(layers), features):  # of the student, then of the teacher
        if feature.dim() != 4:
            raise UserError(f"loss={loss} compares maps [B, D, H, W]; {layer} has the shape {list(feature.shape)}")
