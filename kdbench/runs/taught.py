"""Who teaches a training: a teacher that was obtained and measured, or the student's own past."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from kdbench.data.bundle import Bundle
from kdbench.engine.evaluate import Reference
from kdbench.errors import UserError, require
from kdbench.models.ensemble import mean_metrics, share_recovered
from kdbench.models.interface import plain
from kdbench.results.metrics import Task
from kdbench.results.result import NetworkResult
from kdbench.tables.store import Tables
from kdbench.types import Teacher


@dataclass(frozen=True)
class TaughtBy:
    """`teacher` answers batches; `reference` holds its logits [N, C] float32 on the validation and test sets.

    What stands after `teacher` is of a network that was trained before; a student's own past has none of it.
    """

    name: str
    teacher: Teacher
    network: nn.Module | None = None
    parameters: int = 0
    weights: str = ""  # sha256 of names, shapes and bytes
    folder: Path | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # "test/top1", "val/top1", ...
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    members: tuple[NetworkResult, ...] = ()  # of an ensemble: their own entries
    entry: str | None = None  # which weights of its file were taken ("state_dict_ema")
    tables: Tables | None = None  # where its logits are kept; None: they are not
    reads: Bundle | None = None  # the data as its own tokenizer reads them; None: as its students do
    key: str = ""  # of a teacher in the store: what its weights follow from, which stands for them

    @property
    def identity(self) -> str:
        """What tells it from other teachers."""
        return self.key or self.weights

    def trained(self) -> nn.Module:
        """Its network. Raises UserError if it is none that was trained before."""
        if self.network is None:
            raise UserError(f"teacher {self.name}: is no network that was trained before")
        allowed = "null here: what the teacher's network is used for reads as the student does"
        require(self.reads is None, "dataset.teacher_tokenizer", self.reads and self.reads.vocabulary, allowed)
        return self.network

    def reference_on(self, sets: Iterable[str]) -> dict[str, Reference]:
        """Its logits on each of the sets, or its network where they are too many to be kept; {} if it has neither."""
        known = {name: self.reference.get(name, self.network) for name in sets}
        return {name: value for name, value in known.items() if value is not None}

    def layers(self) -> nn.Module:
        """Its network, for whoever goes on with its weights. Raises UserError if it is adapted to other data."""
        network = self.trained()
        if plain(network) is not network:
            why = "its layers are taken over here, and it was trained with another normalisation or order of classes"
            raise UserError("teacher", self.name, "a network that was trained on data like the student's", hint=why)
        return network

    def record(self) -> NetworkResult:
        """Its entry in result.json. An ensemble's has its members', and their mean accuracy as `members/test/top1`."""
        folder, means = str(self.folder) if self.folder else None, self._means()
        metrics = {**self.metrics, **({f"members/{key}": means[key] for key in self.metrics} if means else {})}
        more = {"entry": self.entry} if self.entry else {}
        return NetworkResult(self.name, folder, self.parameters, self.weights, metrics, self.members, more)

    def recovered(self, student: Mapping[str, float], task: Task) -> dict[str, float | None]:
        """What share of an ensemble's gain over its members' mean a student has kept, by set; {} for other teachers."""
        means = self._means()
        known = [key for key in task.primaries(self.metrics) if key in means and key in student]
        sign = task.primary.better
        return {
            f"recovered/{key}": share_recovered(sign * student[key], sign * means[key], sign * self.metrics[key])
            for key in known
        }

    def _means(self) -> dict[str, float]:
        return mean_metrics([member.metrics for member in self.members]) if self.members else {}
