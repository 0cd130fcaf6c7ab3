"""A teacher that is ready to teach: what it is, where it came from, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdbench.models.ensemble import mean_metrics, share_recovered
from kdbench.tables.store import Tables
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
    members: tuple[Mapping[str, Any], ...] = ()  # of an ensemble: their own entries
    tables: Tables | None = None  # where its logits are kept; None: they are not

    def record(self) -> dict[str, object]:
        """Its entry in result.json. An ensemble's has its members', and their mean accuracy as `members/test/top1`."""
        folder = str(self.folder) if self.folder else None
        about = {"name": self.name, "folder": folder, "parameters": self.parameters, "weights": self.weights}
        found: dict[str, object] = {**about, **self.metrics}
        if self.members:
            means = mean_metrics(self.members)
            found |= {f"members/{key}": means[key] for key in self.metrics} | {"members": list(self.members)}
        return found

    def recovered(self, student: Mapping[str, float]) -> dict[str, float | None]:
        """What share of an ensemble's gain over its members' mean a student has kept, by set; {} for other teachers."""
        means = mean_metrics(self.members) if self.members else {}
        tops = [key for key in self.metrics if key.endswith("/top1") and key in means and key in student]
        return {f"recovered/{key}": share_recovered(student[key], means[key], self.metrics[key]) for key in tops}


def no_teacher(batch: object) -> None:
    """The answer of `teacher=none`."""
