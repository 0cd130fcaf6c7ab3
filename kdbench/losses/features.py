"""Features that two networks are compared by: which ones, read and aligned; the base class of such losses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Range, listed
from kdbench.errors import UserError, nearest, require
from kdbench.losses.base import DistillationLoss, Weights
from kdbench.losses.functional import real
from kdbench.types import MEMBERS, Outputs

# A feature that networks give, and several of them.
Layer = Annotated[str, Range("a feature's name such as stage1", lambda name: bool(name) and not name.isdigit())]
Names = Annotated[list[Layer], listed(1, "a list of different feature names such as [stage1,stage2]", different=True)]
# The same ones of both networks, or {student: ..., teacher: ...}.
Layers = Literal["all", "last"] | Names | Mapping[str, Names]
OneLayer = Layer | Mapping[str, Layer]


class Pair(NamedTuple):
    """Which features of the student are compared with which of the teacher, in turn."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]

    def __str__(self) -> str:
        both = ", ".join(self.student)
        return both if self.student == self.teacher else f"{both} (teacher: {', '.join(self.teacher)})"


class FeatureLoss(DistillationLoss):
    """A loss that compares features of the two networks at `layers`, which no table of logits can serve.

    `layers`: all, every stage that both networks have, whatever their number; last, the last stage of each, be it the
    third or the fourth; a list of names; or {student: names, teacher: names}, as many of each. Which ones they are is
    known from `setup` on. `self.maps` gives them in a forward pass.
    """

    every: ClassVar[str] = r"stage\d+"  # which features "all" and "last" mean
    from_the_end: ClassVar[bool] = False  # "all" are those of the network with fewer, the last with the last
    maps_only: ClassVar[bool] = False  # vectors [B, D] are refused
    least_layers: ClassVar[int] = 1  # 2: what it compares lies between one layer and the next
    pair: Pair | None = None  # as far as it is known
    settled: bool = False  # by `setup`

    def __init__(self, weights: Weights, layers: Layers, label_smoothing: float, key: str = "layers") -> None:
        super().__init__(weights, label_smoothing)
        self.layers = layers
        if isinstance(layers, Mapping):
            alike = layers.keys() == {"student", "teacher"} and len({len(names) for names in layers.values()}) == 1
            require(alike, key, layers, "with the keys student and teacher, and as many features for each")
            self.pair = Pair(tuple(layers["student"]), tuple(layers["teacher"]))
        elif not isinstance(layers, str):
            self.pair = Pair(tuple(layers), tuple(layers))
        few = layers == "last" or (self.pair is not None and len(self.pair.student) < self.least_layers)
        require(not few or self.least_layers == 1, key, layers, "all, or a list of two layers or more")
        self.needs = self.pair.teacher if self.pair else (f"{layers} stages" if layers == "all" else "last stage",)

    @property
    def student_needs(self) -> tuple[str, ...]:
        return self.pair.student if self.pair else self.needs

    @property
    def layers_text(self) -> str:
        """The layers as `formula` names them; by their names as soon as the networks are known."""
        return str(self.pair or self.needs[0])

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Settle which features are read. Raises UserError for those that a network lacks or that are no maps, and for
        too few."""
        if teacher is not None:
            self.pair, self.settled = self.chosen(student, teacher), True
            self.needs = self.pair.teacher
            enough = len(self.needs) >= self.least_layers
            allowed = f"two layers or more, and both networks have {self.layers_text} alone"
            require(enough, "layers", self.layers, allowed)
        s, t = self.maps(student, teacher)
        if self.maps_only and self.pair:
            needs_maps(self.pair.student, s, self._name)
            needs_maps(self.pair.teacher, t, self._name)

    def maps(self, student: Outputs, teacher: Outputs | None) -> tuple[list[Tensor], list[Tensor]]:
        """(the student's features, the teacher's without gradient), both in float32 (float64 stays)."""
        pair = self.pair if self.settled else None
        pair = pair or (self.chosen(student, teacher) if teacher else Pair((), ()))
        return student_maps(student, pair.student), teacher_maps(teacher, pair.teacher, self._name)

    def map(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """The same for a loss with one layer."""
        (s,), (t,) = self.maps(student, teacher)
        return s, t

    @property
    def _name(self) -> str:
        return type(self).__module__.rpartition(".")[2]  # that of its file

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        """What `layers` means for these two networks."""
        if self.pair:
            return self.pair
        own, other = (self._stages(outputs) for outputs in (student, teacher))
        both = tuple(name for name in own if name in other)
        if not both:
            has = f"the student has only {', '.join(student.features)}; the teacher {', '.join(teacher.features)}"
            raise UserError("layers", self.layers, "names of features: no stage is in both networks", hint=has)
        if self.layers == "all" and not self.from_the_end:
            return Pair(both, both)
        count = 1 if self.layers == "last" else min(len(own), len(other))
        return Pair(tuple(own[-count:]), tuple(other[-count:]))

    def _stages(self, outputs: Outputs) -> list[str]:
        """From shallow to deep."""
        names = [name for name in outputs.features if re.fullmatch(self.every, name)]
        return sorted(names, key=lambda name: ({"stem": 0, "pooled": 2}.get(name, 1), len(name), name))


def one(layer: OneLayer) -> Layers:
    """The layers of a loss that has one; "last" is the last stage of each network."""
    if layer == "last":
        return "last"
    return {who: [name] for who, name in layer.items()} if isinstance(layer, Mapping) else [layer]


def student_maps(student: Outputs, layers: Sequence[str]) -> list[Tensor]:
    """The student's features in float32 (float64 stays). Raises UserError for a feature that it does not have."""
    return [real(_feature(student, layer, "student")) for layer in layers]


def teacher_maps(teacher: Outputs | None, layers: Sequence[str], loss: str) -> list[Tensor]:
    """The teacher's features likewise, without gradient. Raises UserError if there is no teacher."""
    if teacher is None:
        raise UserError(f"loss={loss} needs a teacher: choose one with teacher=<network>")
    return [real(_feature(teacher, layer, "teacher").detach()) for layer in layers]


def _feature(outputs: Outputs, layer: str, who: str) -> Tensor:
    if layer == MEMBERS and layer not in outputs.features:
        raise UserError("the loss weighs the answers of several teachers, and there is one: choose teacher=ensemble")
    if layer not in outputs.features:
        hint = nearest(layer, outputs.features)
        has = ", ".join(outputs.features)
        raise UserError(f"the loss reads the feature {layer}, but the {who} has only {has}. {hint}".rstrip())
    return outputs.features[layer]


def before_relu(layers: Sequence[str], outputs: Outputs) -> tuple[str, ...]:
    """The maps before the ReLUs of these stages; a stage without a ReLU, or of a network that gives none, itself."""
    return tuple(f"{name}.pre" if f"{name}.pre" in outputs.features else name for name in layers)


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, D, H, W] averaged down to the smaller height and width of the two; D may differ."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def _pooled(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)


def needs_maps(layers: Sequence[str], features: Sequence[Tensor], loss: str) -> None:
    """Raises UserError unless all are maps [B, D, H, W]."""
    for layer, feature in zip(cycle(layers), features):
        if feature.dim() != 4:
            raise UserError(f"loss={loss} compares maps [B, D, H, W]; {layer} has the shape {list(feature.shape)}")
