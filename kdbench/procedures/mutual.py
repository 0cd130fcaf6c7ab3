"""Deep mutual learning: several students teach each other as they train (Zhang et al. 2018)."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdbench.engine.options import require
from kdbench.losses.base import DistillationLoss
from kdbench.procedures.born_again import ensemble_figures
from kdbench.results.result import RunResult
from kdbench.runs.folder import network_of_run
from kdbench.runs.recipe import LossSpec, NetworkSpec, Recipe
from kdbench.runs.series import opened, spec_named, top1
from kdbench.types import LossTerms, Outputs, Target


def mutual(recipe: Recipe, out: Path, peers: int = 2, students: list[str] | None = None) -> RunResult:
    """Train `peers` students of `student=`, or those named in `students`, each under the recipe's loss with every other
    as its teacher, averaged over the others; there is no `teacher=`.

    One training (stage 1) moves all of them: each step every peer's term is computed from the same forward pass, where
    the paper updates one peer after the other. Afterwards each peer is a run folder of its own (stages 2, ...), and the
    result is the first peer's. The paper's loss is loss=kl, loss.tau=1, loss.weights={task: 1, distill: 1}.
    """
    require(
        recipe.teacher is None,
        "teacher",
        recipe.record.choices.get("teacher"),
        "none: the students teach each other",
    )
    specs = [recipe.student] * peers if students is None else [spec_named(recipe, name) for name in students]
    require(len(specs) >= 2, "procedure.peers", len(specs), "at least 2")
    require(
        recipe.loss.make().uses_teacher,
        "loss",
        recipe.loss.name,
        "a loss that learns from a teacher, e.g. kl",
    )
    with opened(recipe, out) as series:
        joint = NetworkSpec(f"{len(specs)} peers", _joint_config(specs), lambda info: Peers.of(specs, info))
        base = recipe.loss
        loss = LossSpec(base.name, base.config, lambda: Mutual([base.make() for _ in _pairs(len(specs))], len(specs)))
        stage = series.stage("together", student=joint, loss=loss)
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
            figures |= top1(peer.metrics, f"peer{number}")
        figures |= ensemble_figures(apart, series.data, "ensemble")
        return series.conclude(folders[0], figures)


class Peers(nn.Module):
    """Several networks as one: the logits are the first one's; features "0.logits", "0.pooled", "1.logits", ... are all
    of theirs."""

    def __init__(self, peers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    @classmethod
    def of(cls, specs: Sequence[NetworkSpec], info: Any) -> Peers:
        return cls([spec.make(info) for spec in specs])

    def forward(self, image: Tensor) -> Outputs:
        answers = [peer(image) for peer in self.peers]
        features = {f"{i}.{key}": value for i, answer in enumerate(answers) for key, value in answer.features.items()}
        features |= {f"{i}.logits": answer.logits for i, answer in enumerate(answers)}
        return Outputs(answers[0].logits, features)


def peers_from(networks: list[str], num_classes: int, in_channels: int, image_size: int) -> Peers:
    """Peers from their configurations as JSON: what a joint run's network.json holds."""
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    made = []
    for text in networks:
        config = json.loads(text)
        module, _, name = config.pop("_target_").rpartition(".")
        made.append(getattr(importlib.import_module(module), name)(**config, **given))
    return Peers(made)


class Mutual(DistillationLoss):
    """The sum over peers of each one's mean loss with every other peer, detached, as its teacher.

    `losses`: one for each ordered pair, in the order of `itertools.permutations`; a loss with adapters has its own for
    each pair. With KL at tau = 1 and both weights 1 this is Zhang et al. 2018, eq. 8 and 9.
    """

    uses_teacher = False

    def __init__(self, losses: Sequence[DistillationLoss], peers: int) -> None:
        super().__init__({})
        self.losses, self.peers = nn.ModuleList(losses), peers

    @property
    def formula(self) -> str:
        first = self.losses[0]
        assert isinstance(first, DistillationLoss)
        return f"sum over {self.peers} peers s of the mean over the others t of: {first.formula}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        for loss, (one, other) in self._pairs():
            loss.train_rows = self.train_rows
            loss.setup(peer(student, one), peer(student, other))

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        totals, parts = [], []
        for loss, (one, other) in self._pairs():
            taught = Outputs(*_detached(peer(student, other)))
            terms = loss(peer(student, one), taught, target)
            totals.append(terms.total)
            parts.append(terms.parts)
        mean = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return LossTerms(torch.stack(totals).sum() / (self.peers - 1), mean)

    def _pairs(self) -> list[tuple[DistillationLoss, tuple[int, int]]]:
        return list(zip(self.losses, _pairs(self.peers), strict=True))  # type: ignore[arg-type]


def peer(outputs: Outputs, number: int) -> Outputs:
    """One peer's own outputs."""
    own = {key.partition(".")[2]: value for key, value in outputs.features.items() if key.startswith(f"{number}.")}
    return Outputs(own.pop("logits"), own)


def _detached(outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    return outputs.logits.detach(), {key: value.detach() for key, value in outputs.features.items()}


def _pairs(peers: int) -> list[tuple[int, int]]:
    return list(itertools.permutations(range(peers), 2))


def _joint_config(specs: Sequence[NetworkSpec]) -> dict[str, Any]:
    return {
        "_target_": f"{__name__}.{peers_from.__name__}",
        "networks": [json.dumps(dict(spec.config)) for spec in specs],
    }
