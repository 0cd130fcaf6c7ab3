"""Ensemble: several networks, each obtained as any teacher is, that teach as one (`teacher=ensemble`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from torch import nn

from kdbench.arguments import call, checked
from kdbench.arguments.ranges import Seed, Text, listed
from kdbench.data.bundle import Bundle
from kdbench.engine.device import place
from kdbench.errors import UserError
from kdbench.models import ensemble as networks
from kdbench.models.ensemble import Mean, Tau, Weights, at_temperature_1, normalised_weights
from kdbench.runs.folder import NETWORK
from kdbench.runs.obtain import measure, measured, obtain
from kdbench.runs.origin import origin_of
from kdbench.runs.recipe import Catalogue, NetworkSpec, Origin, Recipe, TeacherSpec
from kdbench.runs.taught import TaughtBy
from kdbench.types import MEMBERS, Info


@checked
@dataclass(frozen=True)
class Member:
    """What is said of one member; the network is the ensemble's where none is named."""

    network: Text | None = None
    seed: Seed | None = None
    run: Text | None = None
    checkpoint: Text | None = None
    checkpoint_key: Text | None = None


@checked
@dataclass(frozen=True)
class Ensemble:
    """The origin that configs/teacher/ensemble.yaml describes; schedule, optimizer, ... of a member are the teacher's.

    members: a number is a seed of `network`; a text a network's name, a run folder, or a weights file of `network`; a
    mapping any of network, seed, run, checkpoint and checkpoint_key. A network that is named twice gets another seed
    the second time.
    """

    members: Annotated[list[Seed | Text | dict[str, object]], listed(2, "at least two; for one use teacher=<network>")]
    network: Text
    mean: Mean = "arithmetic"
    tau: Tau = 1.0
    weights: Weights | None = None

    def __post_init__(self) -> None:
        normalised_weights(self.weights, len(self.members))
        for number in range(len(self.members)):
            self._member(number)

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        parts = [origin.describe(catalogue) for origin, _ in self._members(catalogue, 0)]

        def make(info: Info) -> nn.Module:
            return self._join([part.make(info) for part in parts])

        return NetworkSpec("ensemble", {}, make, single=False)

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """Raises UserError for a member that cannot be had, and for two with the same weights."""
        recipe.refuse_features("an ensemble of teachers", (MEMBERS,))
        specs = [replace(spec, origin=one, seed=seed) for one, seed in self._members(recipe.catalogue, spec.seed)]
        return ensemble_of([obtain(one, recipe, data) for one in specs], self._join, recipe, data)

    def _members(self, catalogue: Catalogue, first_seed: int) -> list[tuple[Origin, int]]:
        """Each member's origin and seed; of a network that is named again without one, the next from `first_seed`."""
        used: dict[str, int] = {}
        found = []
        for number in range(len(self.members)):
            member, key = self._member(number), f"teacher.members[{number}]"
            network, seed = catalogue.network(member.network or self.network, key=key), member.seed
            if seed is None:
                seed = first_seed + used.get(network.name, 0)
                used[network.name] = used.get(network.name, 0) + 1
            origin = origin_of(network, member.checkpoint, member.run, member.checkpoint_key, key=key)
            found.append((origin, seed))
        return found

    def _member(self, number: int) -> Member:
        """What is said of a member. Raises UserError for a key that none has."""
        said = self.members[number]
        if isinstance(said, int):
            return Member(seed=said)
        if isinstance(said, Mapping):
            return call(Member, said, f"members[{number}]")
        if (Path(said) / NETWORK).exists():
            return Member(run=said)
        return Member(checkpoint=said) if Path(said).is_file() else Member(network=said)

    def _join(self, members: Sequence[nn.Module]) -> networks.Ensemble:
        return networks.Ensemble(members, self.weights, self.mean, self.tau)


def ensemble_of(
    members: Sequence[TaughtBy], join: Callable[[Sequence[nn.Module]], networks.Ensemble], recipe: Recipe, data: Bundle
) -> TaughtBy:
    """Teachers as one, measured; it remembers its members, for their mean and the share of the gain a student keeps."""
    weights = [member.weights for member in members]
    twice = next((m.name for i, m in enumerate(members) if m.weights in weights[:i]), None)
    if twice is not None:
        raise UserError("teacher.members", said=f"two of them are the same network {twice} with the same weights")
    network = join([member.trained() for member in members])
    together = measured("ensemble", network, None, recipe, data)
    if network.tau != 1 and network.mean == "arithmetic":
        # How good it is does not depend on the temperature of the loss: the mean of the members' predictions.
        metrics = measure(at_temperature_1(network), recipe, data, place(recipe.trainer))[1]
        together = replace(together, metrics=metrics)
    return replace(together, members=tuple(member.record() for member in members))
