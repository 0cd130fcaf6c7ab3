"""Deep mutual learning: several students teach each other as they train (Zhang et al. 2018)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Text, listed, within
from kdbench.errors import require
from kdbench.losses.base import DistillationLoss
from kdbench.models.extended import from_json
from kdbench.procedures.born_again import ensemble_figures
from kdbench.results.result import RunResult
from kdbench.runs.folder import network_of_run
from kdbench.runs.recipe import LossSpec, NetworkSpec, Recipe
from kdbench.runs.series import opened, specs_named
from kdbench.types import LossTerms, Outputs, Target


def mutual(
    recipe: Recipe, out: Path, peers: Annotated[int, within(2, 100)] = 2,
    students: Annotated[list[Text], listed(2)] | None = None,
) -> RunResult:  # fmt: skip
    """Train `peers` students of `student=`, or those named in `students`, each under the recipe's loss with every other
    as its teacher, averaged over the others; there is no `teacher=`.

    One training (stage 1) moves all of them: each step every peer's term is computed from the same forward pass, where
    the paper updates one peer after the other. Afterwards each peer is a run folder of its own (stages 2, ...), and the
    result is the first peer's. The paper's loss is loss=kl, loss.tau=1, loss.weights={task: 1, distill: 1}.
    """
    recipe.need_no_teacher("the students teach each other")
    specs = [recipe.student] * peers if students is None else specs_named(recipe, students, "procedure.students")
    recipe.need_taught_loss("a loss that learns from a teacher, e.g. kl")
    loss = recipe.loss.make()
    plain = not (loss.extends or loss.first_training or loss.surveyed)
    require(plain, "loss", recipe.loss.name, "a loss that needs nothing of a trained teacher before the training")
    with opened(recipe, out) as series:
        own = replace(series.recipe, student=_joint(specs), loss=_mutual(recipe.loss, len(specs)))
        stage = series.stage("together", recipe=own)
        series.run(stage, None)
        together = network_of_run(stage.folder, recipe.catalogue)[1]
        assert isinstance(together, Peers)
        folders = [
            series.publish(f"peer-{spec.name}", spec, peer, stage.folder)
            for spec, peer in zip(specs, together.peers, strict=True)
        ]
        apart = [series.finished(folder) for folder in folders]
        figures: dict[str, float | None] = {}
        for number, peer in enumerate(apart, start=1):
            figures |= series.data.task.primaries(peer.metrics, f"peer{number}")
        figures |= ensemble_figures(apart, series.data, "ensemble")
        return series.conclude(folders[0], figures)


class PeerOutputs(NamedTuple):
    """What several networks return of one batch: as a whole what the first one does, and each one's own."""

    logits: Tensor  # [B, C]
    features: dict[str, Tensor]
    peers: tuple[Outputs, ...]


class Peers(nn.Module):
    """Several networks that see the same images; evaluated, they answer as the first one."""

    def __init__(self, peers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, input: Tensor) -> PeerOutputs:
        answers = tuple(peer(input) for peer in self.peers)
        return PeerOutputs(answers[0].logits, answers[0].features, answers)


def peers_from(networks: list[str], **info: Any) -> Peers:
    """Peers from their configurations as JSON, for their weights to be read: what a joint run's network.json holds.

    info: what networks must know of the data. Raises UserError for a network that there is not.
    """
    return Peers([from_json(text, f"student.networks[{number}]", **info) for number, text in enumerate(networks)])


class Mutual(DistillationLoss):
    """The sum over peers of each one's mean loss with every other peer, detached, as its teacher.

    `losses`: one for each ordered pair, in the order of `itertools.permutations`; a loss with adapters has its own for
    each pair. With KL at tau = 1 and both weights 1 this is the loss of Zhang et al. 2018 for K networks.
    """

    def __init__(self, losses: Sequence[DistillationLoss], peers: int) -> None:
        super().__init__({})
        self.losses, self.peers = nn.ModuleList(losses), peers

    @property
    def formula(self) -> str:
        first = self.losses[0]
        assert isinstance(first, DistillationLoss)
        return f"sum over {self.peers} peers s of the mean over the others t of: {first.formula}"

    def setup(self, student: Outputs | PeerOutputs, teacher: Outputs | None) -> None:
        for loss, one, other in self._lessons(student):
            loss.train_rows, loss.epochs, loss.batch_size = self.train_rows, self.epochs, self.batch_size
            loss.setup(one, other)

    def forward(self, student: Outputs | PeerOutputs, teacher: Outputs | None, target: Target) -> LossTerms:
        found = [loss(one, _detached(other), target) for loss, one, other in self._lessons(student)]
        mean = {name: torch.stack([terms.parts[name] for terms in found]).mean() for name in found[0].parts}
        return LossTerms(torch.stack([terms.total for terms in found]).sum() / (self.peers - 1), mean)

    def _lessons(self, student: Outputs | PeerOutputs) -> Iterator[tuple[DistillationLoss, Outputs, Outputs]]:
        """Each loss with the outputs of the peer that learns and of the one that teaches."""
        assert isinstance(student, PeerOutputs)
        for loss, (one, other) in zip(self.losses, itertools.permutations(student.peers, 2), strict=True):
            yield loss, one, other  # type: ignore[misc]


def _detached(outputs: Outputs) -> Outputs:
    return Outputs(outputs.logits.detach(), {key: value.detach() for key, value in outputs.features.items()})


def _joint(specs: Sequence[NetworkSpec]) -> NetworkSpec:
    target = f"{__name__}.{peers_from.__name__}"
    config = {"_target_": target, "networks": [json.dumps(dict(spec.config)) for spec in specs]}
    return NetworkSpec(f"{len(specs)} peers", config, lambda info: Peers([spec.make(info) for spec in specs]), False)


def _mutual(base: LossSpec, peers: int) -> LossSpec:
    pairs = peers * (peers - 1)
    return LossSpec(base.name, base.config, lambda: Mutual([base.make() for _ in range(pairs)], peers))
