"""A teacher that is ready to teach: what it is, where it came from, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kdbench.types import Teacher


@dataclass(frozen=True)
class GivenTeacher:
    """`ask` answers batches; `reference` holds its logits [N, C] float32 on the validation and test sets."""

    name: str
    ask: Teacher
    network: nn.Module | None  # None where there is no single network (an ensemble)
    parameters: int
    weights: str  # sha256 of names, shapes and bytes
    folder: Path | None
    metrics: Mapping[str, float]  # "test/top1", "val/top1", ...
    reference: Mapping[str, Tensor]

    def record(self) -> dict[str, object]:
        """Its entry in result.json."""
        folder = str(self.folder) if self.folder else None
        about = {"name": self.name, "folder": folder, "parameters": self.parameters, "weights": self.weights}
        return {**about, **self.metrics}


def no_teacher(batch: object) -> None:
    """The answer of `teacher=none`."""
