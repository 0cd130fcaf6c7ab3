"""Hidden states of the student against those of the teacher, token by token, as transformers are distilled."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdbench.errors import require
from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, Layers, same_size
from kdbench.types import LossTerms, Outputs, Target

EPSILON = 1e-7  # vectors shorter than this are no directions
_OF = {"mse": "|W h_s - h_t|^2 / D", "normalised": "|n(W h_s) - n(h_t)|^2", "cosine": "1 - cos(W h_s, h_t)"}


class Hidden(FeatureLoss):
    """weights.task CE(y, s) + weights.distill times the sum over `layers` of a mean distance over all places.

    `distance` mse: TinyBERT (Jiao et al. 2020; embeddings, hidden states, attentions); normalised:
    vectors of length one, PKD (Sun et al. 2019, patient term; mean over the states, not of the first token alone);
    cosine: 1 - cos, DistilBERT (Sanh et al. 2019). `adapter` linear: a learned matrix W from the student's channels to
    the teacher's; none: the states themselves, which must have as many. States are maps [B, D, H, W], of texts
    [B, D, 1, L], or vectors [B, D]; the larger of two maps is averaged down to the size of the smaller. Places where
    the teacher's state is 0 in all channels, as on padding, do not count.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Jiao et al. 2020 (TinyBERT); Sun et al. 2019 (PKD); Sanh et al. 2019 (DistilBERT)"

    def __init__(
        self,
        weights: Weights,
        layers: Layers = "last",
        distance: Literal["mse", "normalised", "cosine"] = "mse",
        adapter: Literal["linear", "none"] = "linear",
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, layers, label_smoothing)
        self.distance, self.adapter = distance, adapter
        self.adapters = nn.ModuleList()

    @property
    def formula(self) -> str:
        text = _OF[self.distance].replace("W ", "" if self.adapter == "none" else "W ")
        written = self.written(task=self.task_text, distill=f"sum_layers mean {text}")
        return f"{written}, h = {self.layers_text}"

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Raises UserError for a map beside a vector, and for other channels without an adapter."""
        super().setup(student, teacher)
        adapters = []
        for s, t in zip(*self.maps(student, teacher), strict=True):
            places = f"the student's state is {list(s.shape[1:])}, the teacher's {list(t.shape[1:])}"
            require(s.dim() == t.dim(), "layers", self.layers, f"maps of both networks or vectors of both: {places}")
            fits = self.adapter == "linear" or s.shape[1] == t.shape[1]
            require(fits, "adapter", self.adapter, f"linear where channels differ: {places}")
            adapters.append(_matrix(s, t) if self.adapter == "linear" else nn.Identity())
        self.adapters = nn.ModuleList(adapters)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        distances = []
        for adapter, s, t in zip(self.adapters, *self.maps(student, teacher), strict=True):
            s, t = same_size(s, t) if t.dim() == 4 else (s, t)
            distances.append(_mean(_distance(adapter(s), t, self.distance), t))
        return self.combine(task=self.task(student.logits, target.label), distill=torch.stack(distances).sum())


def _matrix(student: Tensor, teacher: Tensor) -> nn.Module:
    """Without a bias, so that padding stays 0."""
    inputs, outputs = student.shape[1], teacher.shape[1]
    made = nn.Linear(inputs, outputs, False) if student.dim() == 2 else nn.Conv2d(inputs, outputs, 1, bias=False)
    return made.to(student.device)


def _distance(s: Tensor, t: Tensor, kind: str) -> Tensor:
    """[B, D, ...] -> one number a place: [B, ...]."""
    if kind == "mse":
        return (s - t).square().mean(1)
    s, t = (x / x.norm(dim=1, keepdim=True).clamp_min(EPSILON) for x in (s, t))
    return (s - t).square().sum(1) if kind == "normalised" else 1 - (s * t).sum(1)


def _mean(distance: Tensor, teacher: Tensor) -> Tensor:
    """Over the places whose state is not 0 in all channels."""
    here = (teacher != 0).any(1)
    return (distance * here).sum() / here.sum().clamp_min(1)
