"""FCFD: the student's maps must do in the teacher what the teacher's own do, and the teacher's in the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdbench.arguments.ranges import Count, Share
from kdbench.errors import UserError, require
from kdbench.losses.adapters import BatchNorm, known_networks
from kdbench.losses.base import Moderate, Smoothing, Steps, Weights, detached, number
from kdbench.losses.features import FeatureLoss, Layers, Pair
from kdbench.losses.fitnet import resizing
from kdbench.losses.functional import real, tempered_kl_rows
from kdbench.types import LossTerms, Outputs, Parts, Target


def bridge(source: Tensor, wanted: Tensor, rectified: bool) -> nn.Sequential:
    """A convolution from one network's map [B, D, H, W] to the shape of the other's, with batch norm, and a leaky ReLU
    of slope 0.1 if the other's went through a ReLU."""
    same = source.shape[2:] == wanted.shape[2:]
    inputs, outputs = source.shape[1], wanted.shape[1]
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) if same else resizing(source, wanted)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(convolution, BatchNorm(outputs), *([nn.LeakyReLU(0.1)] if rectified else []))


def continued(network: nn.Module, joint: str, map: Tensor, learns: bool) -> Outputs:
    """What a network makes of a map in the place of its own at `joint`. Its statistics do not move; its weights get a
    gradient if it `learns`, and the map does in any case."""
    state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    weights = dict(network.named_parameters())
    state |= {} if learns else {name: weight.detach() for name, weight in weights.items()}
    kind = next(iter(weights.values())).dtype
    return functional_call(network, state, (map.to(kind),), {"enter": joint})


def distance(map: Tensor, wanted: Tensor, last: bool) -> Tensor:
    """mean (f - t)^2, and for the last map that of the means over places after a ReLU, too: 0-dim."""
    found = F.mse_loss(map, wanted)
    return found + F.mse_loss(map.relu().mean((2, 3)), wanted.relu().mean((2, 3))) if last else found


class FCFD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill tau^2 KL(t/tau || s/tau) + weights.features w sum_k (d(b_k(f_s,k), f_t,k)
    + h sum_j<k d(T_jk(b_j(f_s,j)), f_t,k)) + weights.paths h sum_m tau^2 KL(t/tau || m/tau) (Liu et al. 2023, FCFD).

    b_k: learned bridges from the student's maps to the teacher's; T_jk: the teacher from its map j to its map k; d the
    mean squared distance, for the last map that of its means over places, too. m: logits of all ways that begin in one
    network and go on in the other after one of its maps but the last, through a bridge: in the teacher, whose weights
    do not learn, and in the student, whose weights do. w rises from 1/20 to 1 over the share `warmup`. The maps are
    those that networks name as their joints (the last one before the pooling), before or after the ReLU as the authors'
    networks have them (but for MobileNetV2's last one).

    The authors draw `paths` of the ways for each batch; here all are gone, each with the weight h = `paths` / their
    number: the mean of what theirs draws, without chance, for twice as many ways. Their teacher normalises by the
    batch's statistics, ours by its own, as everywhere.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill", "features", "paths")
    paper: ClassVar[str] = "Liu et al. 2023 (FCFD)"

    def __init__(
        self,
        weights: Weights,
        layers: Layers = "all",
        tau: Moderate = 4.0,
        paths: Count = 2,
        warmup: Share = 20 / 240,
        steps: Steps = "epoch",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        require(layers != "last", "layers", layers, "all, or two maps or more")
        super().__init__(weights, layers, label_smoothing)
        self.tau, self.paths, self.warmup, self.steps = tau, paths, warmup, steps
        self._networks: tuple[nn.Module, ...] = ()
        self.to_teacher, self.to_student = nn.ModuleList(), nn.ModuleList()

    @property
    def formula(self) -> str:
        text = self.written(
            task=self.task_text,
            distill="KL(t/tau || s/tau) tau^2",
            features="w sum_k (d(b_k(f_s,k), f_t,k) + h sum_j<k d(T_jk(b_j(f_s,j)), f_t,k))",
            paths="h sum_m KL(t/tau || m/tau) tau^2",
        )
        ways = f"h = {self.paths} / the number of ways m through both networks, b learned"
        return f"{text}, {ways}, tau = {number(self.tau)}, w rises over {number(self.warmup)} of the training, " + (
            f"f = {self.layers_text}"
        )

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        self._networks = known_networks("fcfd", student, teacher)

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        """Raises UserError where the joints of the networks cannot be told or are not as many."""
        if not self._networks:
            raise UserError("loss", "fcfd", "another with this procedure, in which the networks are not known")
        joints = [tuple(network.joints) for network in self._networks]  # type: ignore[arg-type]
        pair = self.pair or Pair(*joints)
        for who, names, known in zip(("student", "teacher"), pair, joints, strict=True):
            unknown = next((name for name in names if name not in known), None)
            require(unknown is None, f"layers.{who}", unknown, f"of those after which it may be entered: {known}")
        found = {"student": list(pair.student), "teacher": list(pair.teacher)}
        alike = len(pair.student) == len(pair.teacher) >= 2
        require(alike, "layers", found, "two maps or more, as many of each network: {student: [...], teacher: [...]}")
        return pair

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.maps(student, teacher)
        rectified = [bool(network.rectified) for network in self._networks]
        there = [bridge(own, other, rectified[1]) for own, other in zip(s, t, strict=True)]
        back = [bridge(other, own, rectified[0]) for own, other in zip(s[:-1], t[:-1], strict=True)]
        self.to_teacher = nn.ModuleList(there).to(student.logits.device)
        self.to_student = nn.ModuleList(back).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        logits = detached(teacher, "fcfd")
        s, t = self.maps(student, teacher)
        there = [bridge(own) for bridge, own in zip(self.to_teacher, s, strict=True)]
        share = min(1.0, self.paths / (2 * len(s) - 2))
        near = self._distances(there, t)
        mixed = []
        for place, map in enumerate(there[:-1]):
            out = continued(self._networks[1], self.pair.teacher[place], map, learns=False)  # type: ignore[union-attr]
            passed = [real(out.features[name]) for name in self.pair.teacher[place + 1 :]]  # type: ignore[union-attr]
            near = near + share * self._distances(passed, t[place + 1 :])
            mixed.append(out.logits)
        for name, back, map in zip(self.pair.student, self.to_student, t):  # type: ignore[union-attr]
            mixed.append(continued(self._networks[0], name, back(map), learns=True).logits)
        paths = [tempered_kl_rows(one, logits, self.tau).mean() for one in mixed]
        return self.combine(
            task=self.task(student.logits, target.label),
            distill=tempered_kl_rows(student.logits, logits, self.tau).mean(),
            features=self.risen(target.progress, self.warmup) * near,
            paths=share * torch.stack(paths).sum(),
        )

    def _distances(self, maps: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Sum of those of maps that end with the last one: 0-dim."""
        last, pairs = len(maps) - 1, zip(maps, wanted, strict=True)
        return torch.stack([distance(a, b, place == last) for place, (a, b) in enumerate(pairs)]).sum()
