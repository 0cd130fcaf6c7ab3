"""A teacher that is ready to teach: what it is, where it came from, how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kdbench.models.ensemble import mean_metrics, share_recovered
from kdbench.results.result import NetworkResult
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
    members: tuple[NetworkResult, ...] = ()  # of an ensemble: their own entries
    tables: Tables | None = None  # where its logits are kept; None: they are not

    def record(self) -> NetworkResult:
        """Its entry in result.json. An ensemble's has its members', and their mean accuracy as `members/test/top1`."""
        folder, means = str(self.folder) if self.folder else None, self._means()
        metrics = {**self.metrics, **({f"members/{key}": means[key] for key in self.metrics} if means else {})}
        return NetworkResult(self.name, folder, self.parameters, self.weights, metrics, self.members)

    def recovered(self, student: Mapping[str, float]) -> dict[str, float | None]:
        """What share of an ensemble's gain over its members' mean a student has kept, by set; {} for other teachers."""
        means = self._means()
        tops = [key for key in self.metrics if key.endswith("/top1") and key in means and key in student]
        return {f"recovered/{key}": share_recovered(student[key], means[key], self.metrics[key]) for key in tops}

    def _means(self) -> dict[str, float]:
        return mean_metrics([member.metrics for member in self.members]) if self.members else {}


def no_teacher(batch: object) -> None:
    """The answer of `teacher=none`."""
