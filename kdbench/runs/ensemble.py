"""Ensemble: several networks, each obtained as any teacher is, that teach as one (`teacher=ensemble`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kdbench.data.bundle import Bundle
from kdbench.engine.device import place
from kdbench.errors import UserError
from kdbench.models import ensemble as networks
from kdbench.models.ensemble import Mean, at_temperature_1, check_mean, normalised_weights
from kdbench.runs.folder import NETWORK
from kdbench.runs.obtain import measure, measured, obtain
from kdbench.runs.origin import origin_of
from kdbench.runs.recipe import Catalogue, NetworkSpec, Origin, Recipe, TeacherSpec
from kdbench.runs.taught import TaughtBy
from kdbench.types import Info

_KEYS = ("network", "seed", "run", "checkpoint", "checkpoint_key")


@dataclass(frozen=True)
class Ensemble:
    """The origin that configs/teacher/ensemble.yaml describes; schedule, optimizer, ... of a member are the teacher's.

    members: a number is a seed of `network`; a text a network's name, a run folder, or a weights file of `network`; a
    mapping any of network, seed, run, checkpoint and checkpoint_key. A network that is named twice gets another seed
    the second time.
    """

    members: list[int | str | dict[str, Any]]
    network: str
    mean: Mean = "arithmetic"
    tau: float = 1.0
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        check_mean(self.mean, self.tau)
        if len(self.members) < 2:
            raise UserError(f"teacher.members = {self.members}: must be at least two; for one use teacher=<network>")
        normalised_weights(self.weights, len(self.members))

    def describe(self, catalogue: Catalogue) -> NetworkSpec:
        parts = [origin.describe(catalogue) for origin, _ in self._members(catalogue, 0)]

        def make(info: Info) -> nn.Module:
            return self._join([part.make(info) for part in parts])

        return NetworkSpec("ensemble", {}, make, single=False)

    def obtain(self, spec: TeacherSpec, recipe: Recipe, data: Bundle) -> TaughtBy:
        """Raises UserError for a member that cannot be had, and for two with the same weights."""
        recipe.refuse_features("an ensemble of teachers")
        specs = [replace(spec, origin=one, seed=seed) for one, seed in self._members(recipe.catalogue, spec.seed)]
        return ensemble_of([obtain(one, recipe, data) for one in specs], self._join, recipe, data)

    def _members(self, catalogue: Catalogue, first_seed: int) -> list[tuple[Origin, int]]:
        """Each member's origin and seed; of a network that is named again without one, the next from `first_seed`."""
        used: dict[str, int] = {}
        found = []
        for member in self.members:
            about = _about(member, self.network)
            network, seed = catalogue.network(about["network"]), about.get("seed")
            if seed is None:
                seed = first_seed + used.get(network.name, 0)
                used[network.name] = used.get(network.name, 0) + 1
            origin = origin_of(network, about.get("checkpoint"), about.get("run"), about.get("checkpoint_key"))
            found.append((origin, int(seed)))
        return found

    def _join(self, members: Sequence[nn.Module]) -> networks.Ensemble:
        return networks.Ensemble(members, self.weights, self.mean, self.tau)


def ensemble_of(
    members: Sequence[TaughtBy], join: Callable[[Sequence[nn.Module]], networks.Ensemble], recipe: Recipe, data: Bundle
) -> TaughtBy:
    """Teachers as one, measured; it remembers its members, for their mean and the share of the gain a student keeps."""
    weights = [member.weights for member in members]
    twice = next((m.name for i, m in enumerate(members) if m.weights in weights[:i]), None)
    if twice is not None:
        raise UserError(f"teacher.members: two of them are the same network {twice} with the same weights")
    network = join([member.trained() for member in members])
    together = measured("ensemble", network, None, recipe, data)
    if network.tau != 1 and network.mean == "arithmetic":
        # How good it is does not depend on the temperature of the loss: the mean of the members' predictions.
        metrics = measure(at_temperature_1(network), recipe, data, place(recipe.trainer))[1]
        together = replace(together, metrics=metrics)
    return replace(together, members=tuple(member.record() for member in members))


def _about(member: int | str | Mapping[str, Any], network: str) -> dict[str, Any]:
    if isinstance(member, int):
        return {"network": network, "seed": member}
    if isinstance(member, Mapping):
        unknown = [str(key) for key in member if key not in _KEYS]
        if unknown:
            raise UserError(f"teacher.members: {unknown[0]} is no key of a member; its keys: {', '.join(_KEYS)}")
        return {"network": network, **member}
    if (Path(member) / NETWORK).exists():
        return {"network": network, "run": member}
    return {"network": network, "checkpoint": member} if Path(member).is_file() else {"network": member}
