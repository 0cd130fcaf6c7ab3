"""ViTKD: the first blocks of a vision transformer are mimicked, the last one's tokens generated from a part of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Inside
from kdbench.errors import UserError
from kdbench.losses.base import Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, Names, OneLayer, Pair, one
from kdbench.types import LossTerms, Outputs, Target


def left_out(samples: int, places: int, ratio: float, device: torch.device) -> Tensor:
    """Random places without int(places (1 - ratio)) of them, which are kept: [samples, places] bool."""
    order = torch.rand((samples, places), device=device).argsort(1).argsort(1)
    return order >= int(places * (1 - ratio))


class ViTKD(FeatureLoss):
    """weights.task CE(y, s) + weights.mimic sum_l |a_l(f_s,l) - f_t,l|^2 / B + weights.generate |m (g(n) - f_t)|^2 /
    (ratio B), n = (1 - m) a(f_s) + m e: the student's last tokens, of which the share `ratio` is replaced by one
    learned token e, m 1 at these; sums over tokens and channels, class tokens left out (Yang et al. 2024, ViTKD).

    `low`: the layers l that are mimicked, the first two blocks; `layer`: the last one, "tokens", after the final norm.
    a: linear layers, where the networks differ in width; g: two 3x3 convolutions with a ReLU between them; all train
    with the student. As published 3e-5 and 3e-6; an NKD beside it (parts of loss=sum) is the paper's best. Both
    networks need as many tokens.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "mimic", "generate")
    paper: ClassVar[str] = "Yang et al. 2024 (ViTKD)"

    def __init__(
        self,
        weights: Weights,
        low: Names,
        layer: OneLayer = "tokens",
        ratio: Inside = 0.5,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.low, self.ratio = tuple(low), ratio
        if self.pair is not None:
            self.pair = Pair((*self.low, *self.pair.student), (*self.low, *self.pair.teacher))
            self.needs = self.pair.teacher
        self.align = nn.ModuleList()
        self.token: Tensor = nn.Parameter(torch.empty(0))
        self.generation: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        mimic, generate = "sum_l |a_l(f_s,l) - f_t,l|^2 / B", f"|m (g(n) - f_t)|^2 / ({number(self.ratio)} B)"
        text = self.written(task=self.task_text, mimic=mimic, generate=generate)
        kind = f"n = f_s without {number(self.ratio)} of the tokens, a and g learned"
        return f"{text}, {kind}, the last one generated and the others mimicked of {self.layers_text}"

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        own, other = super().chosen(student, teacher)
        return Pair(own, other) if self.pair else Pair((*self.low, *own), (*self.low, *other))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for networks with unlike numbers of tokens."""
        super().setup(student, teacher)
        device, both = student.logits.device, list(zip(*self.maps(student, teacher)))
        if any(s.shape[2:] != t.shape[2:] for s, t in both):
            sizes = ", ".join(f"{list(s.shape[2:])} and {list(t.shape[2:])}" for s, t in both)
            raise UserError("loss", "vitkd", f"another here: student and teacher have unlike tokens ({sizes})")
        made = [nn.Identity() if s.shape[1] == t.shape[1] else nn.Conv2d(s.shape[1], t.shape[1], 1) for s, t in both]
        self.align = nn.ModuleList(made).to(device)
        width = both[-1][1].shape[1]
        self.token = nn.Parameter(torch.zeros(1, width, 1, 1, device=device))
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        ).to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.maps(student, teacher)
        (*low, own), (*wanted, other) = [align(x) for align, x in zip(self.align, s)], t
        missing = left_out(len(own), own[0, 0].numel(), self.ratio, own.device).view(len(own), 1, *own.shape[2:])
        built = self.generation(torch.where(missing, self.token.to(own.dtype), own))
        mimic = torch.stack([(a - b).square().sum() for a, b in zip(low, wanted)]).sum()
        generate = ((built - other) * missing).square().sum() / self.ratio
        return self.combine(
            task=self.task(student.logits, target.label), mimic=mimic / len(own), generate=generate / len(own)
        )
