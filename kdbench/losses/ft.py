"""Factor transfer: the teacher's map paraphrased by an autoencoder, and the student's translated into it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, Positive, above_to
from kdbench.losses.adapters import BatchNorm
from kdbench.losses.base import First, Smoothing, Weights, number
from kdbench.losses.features import FeatureLoss, OneLayer, one, same_size
from kdbench.types import LossTerms, Outputs, Target

Rate = Annotated[float, above_to(0, 16)]


def encoder(inputs: int, middle: int, outputs: int, norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions, each with batch norm if `norm`, and a leaky ReLU of slope 0.1."""
    layers: list[nn.Module] = []
    for before, after in ((inputs, middle), (middle, outputs), (outputs, outputs)):
        layers += [nn.Conv2d(before, after, 3, 1, 1), *([BatchNorm(after)] if norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def decoder(inputs: int, outputs: int) -> nn.Sequential:
    """Three transposed 3x3 convolutions, each with a leaky ReLU of slope 0.1."""
    layers: list[nn.Module] = []
    for before, after in ((inputs, inputs), (inputs, outputs), (outputs, outputs)):
        layers += [nn.ConvTranspose2d(before, after, 3, 1, 1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def factor(feature: Tensor, power: float) -> Tensor:
    """mean_d |f_d|^power of a map [B, D, H, W], as a vector of length 1: [B, H W]; a map of zeros stays zero."""
    energy = feature.square() if power == 2 else feature.abs().clamp_min(1e-12) ** power
    return F.normalize(energy.mean(1).flatten(1))


class Paraphrase(FeatureLoss):
    """mean (d(e(f_t)) - f_t)^2: an autoencoder of the teacher's map; the student learns nothing (Kim et al. 2018,
    factor transfer)."""

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("rebuild",)
    paper: ClassVar[str] = "Kim et al. 2018 (FT), factor transfer"

    def __init__(self, layer: OneLayer, rate: float) -> None:
        super().__init__({"rebuild": 1.0}, one(layer), 0.0, "layer")
        self.rate = rate
        self.paraphraser: nn.Module = nn.Identity()
        self.decoder: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        return f"mean (d(e(f_t)) - f_t)^2, f = {self.layers_text}, e and d learned, e {number(self.rate)} times as wide"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        device, width = student.logits.device, self.map(student, teacher)[1].shape[1]
        narrow = max(1, int(width * self.rate))
        self.paraphraser = encoder(width, width, narrow, norm=False).to(device)
        self.decoder = decoder(narrow, width).to(device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        t = self.map(student, teacher)[1]
        return self.combine(rebuild=(self.decoder(self.paraphraser(t)) - t).square().mean())


class FT(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean |F(l(f_s)) - F(e(f_t))|, F(g) = mean_d |g_d|^power at every place,
    brought to length 1, e the teacher's paraphraser, l the student's translator, three convolutions each (Kim et al.
    2018, factor transfer; this F is that of the field's comparisons, with weight 200: the paper brings g itself to
    length 1).

    e is trained first, as the first half of an autoencoder of f_t, for `epochs` at the constant rate `lr` (Paraphrase),
    and does not change after that; l trains with the student. `rate`: channels of both, as a share of the teacher's.
    The larger map is averaged down.
    """

    maps_only: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Kim et al. 2018 (FT), factor transfer"

    def __init__(
        self,
        weights: Weights,
        layer: OneLayer = "last",
        rate: Rate = 0.5,
        power: Positive = 2.0,
        epochs: Count = 30,
        lr: NotNegative | None = 0.01,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, one(layer), label_smoothing, "layer")
        self.layer, self.rate, self.power = layer, rate, power
        self.first_epochs, self.first_lr = epochs, lr
        self.paraphraser: nn.Module = nn.Identity()
        self.translator: nn.Module = nn.Identity()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean |F(l(f_s)) - F(e(f_t))|")
        kind = f"F = mean_d |g_d|^{number(self.power)} at length 1, e trained before, l learned"
        return f"{text}, {kind}, {number(self.rate)} times as wide as f_t, f = {self.layers_text}"

    @property
    def first_training(self) -> First:
        return First(Paraphrase(self.layer, self.rate), self.first_epochs, self.first_lr, student=False)

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        super().setup(student, teacher)
        s, t = self.map(student, teacher)
        narrow = max(1, int(t.shape[1] * self.rate))
        paraphraser = encoder(t.shape[1], t.shape[1], narrow, norm=False)
        self.paraphraser = paraphraser.to(student.logits.device).requires_grad_(False)
        self.translator = encoder(s.shape[1], s.shape[1], narrow, norm=True).to(student.logits.device)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        s, t = self.map(student, teacher)
        s, t = same_size(self.translator(s), self.paraphraser(t))
        distill = (factor(s, self.power) - factor(t, self.power)).abs().mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
