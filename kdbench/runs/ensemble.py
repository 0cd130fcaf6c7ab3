"""`teacher=ensemble`: several networks, each obtained as any teacher is, that teach as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdbench.data.bundle import Bundle
from kdbench.engine.device import place
from kdbench.errors import UserError
from kdbench.models.ensemble import Ensemble, at_temperature_1, check_mean, normalised_weights
from kdbench.runs.folder import NETWORK
from kdbench.runs.given import GivenTeacher
from kdbench.runs.obtain import introduced, make_given, measure, obtain_teacher
from kdbench.runs.recipe import Recipe, TeacherSpec

log = logging.getLogger(__name__)

_KEYS = ("network", "seed", "run", "checkpoint")


@dataclass(frozen=True)
class EnsembleOptions:
    """What configs/teacher/ensemble.yaml sets beside what every teacher has.

    members: a number is a seed of `network`; a text a network's name, a run folder, or a weights file of `network`; a
    mapping any of network, seed, run and checkpoint. A network that is named twice gets another seed the second time.
    """

    members: list[int | str | dict[str, Any]]
    network: str
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    tau: float = 1.0
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        check_mean(self.mean, self.tau)
        if self.members:
            normalised_weights(self.weights, len(self.members))


def ensemble_teacher(spec: TeacherSpec, recipe: Recipe, data: Bundle) -> GivenTeacher:
    """The source of `teacher=ensemble`: obtain every member, then measure and return their ensemble.

    Raises UserError for fewer than two members, for a member that cannot be had, and for two with the same weights.
    """
    options = EnsembleOptions(**{key: value for key, value in spec.network.config.items() if key != "_target_"})
    if len(options.members) < 2:
        raise UserError(f"teacher.members = {options.members}: must be at least two; for one use teacher=<network>")
    members = [obtain_teacher(replace(recipe, teacher=one), data) for one in member_specs(spec, options, recipe)]
    return ensemble_of([m for m in members if m is not None], recipe, data, options, spec.allow_chance)


def ensemble_of(
    members: Sequence[GivenTeacher], recipe: Recipe, data: Bundle, options: EnsembleOptions | None = None,
    allow_chance: bool = False, name: str = "ensemble",
) -> GivenTeacher:  # fmt: skip
    """Teachers as one, measured; it remembers its members, for their mean and the share of the gain a student keeps."""
    weights = [member.weights for member in members]
    twice = next((m.name for i, m in enumerate(members) if m.weights in weights[:i]), None)
    if twice is not None:
        raise UserError(f"teacher.members: two of them are the same network {twice} with the same weights")
    networks = [_network(member) for member in members]
    needed = recipe.loss.make().needs
    if needed:
        raise UserError(
            f"loss={recipe.loss.name} reads features ({', '.join(needed)}); an ensemble of teachers has only logits"
        )
    chosen = options or EnsembleOptions([], "")
    network = Ensemble(networks, chosen.weights, chosen.mean, chosen.tau)
    given = replace(make_given(name, network, None, recipe, data), members=tuple(m.record() for m in members))
    if network.tau != 1 and chosen.mean == "arithmetic":
        # How good it is does not depend on the temperature of the loss: the mean of the members' predictions.
        given = replace(given, metrics=measure(at_temperature_1(network), recipe, data, place(recipe.trainer))[1])
    return introduced(given, data, allow_chance)


def member_specs(spec: TeacherSpec, options: EnsembleOptions, recipe: Recipe) -> list[TeacherSpec]:
    """Each member as a teacher of its own: its network and seed, all else (schedule, optimizer, ...) the ensemble's."""
    used: dict[str, int] = {}
    specs = []
    for member in options.members:
        about = _about(member, options.network)
        network = recipe.catalogue.network(about["network"])
        seed = about.get("seed")
        if seed is None:
            seed = spec.seed + used.get(network.name, 0)
            used[network.name] = used.get(network.name, 0) + 1
        run, checkpoint = about.get("run"), about.get("checkpoint")
        specs.append(replace(spec, network=network, source=None, seed=int(seed), run=run, checkpoint=checkpoint))
    return specs


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


def _network(member: GivenTeacher) -> nn.Module:
    if member.network is None:
        raise UserError(f"teacher.members: {member.name} is no network")
    return member.network
