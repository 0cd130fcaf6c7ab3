"""Class attention transfer: where a network sees each class."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count
from kdbench.losses.adapters import classifier_of, known_classifiers, pooled_map
from kdbench.losses.base import Smoothing, Weights
from kdbench.losses.features import FeatureLoss, Pair
from kdbench.types import LossTerms, Outputs, Parts, Target


def class_maps(feature: Tensor, classifier: nn.Linear, size: int, normalize: bool) -> Tensor:
    """W f at every place of a map [B, D, H, W], averaged to size x size places: [B, C, size, size]; each map at length
    1 if `normalize`. The classifier's bias, which is the same everywhere, is left out, as in the authors' networks."""
    maps = F.adaptive_avg_pool2d(feature, size)  # linear: before the classes, which are more than the places
    maps = F.conv2d(maps, classifier.weight.to(feature)[:, :, None, None])
    return F.normalize(maps, dim=(2, 3)) if normalize else maps  # type: ignore[arg-type]


class CATKD(FeatureLoss):
    """weights.task CE(y, s) + weights.distill mean (A_s - A_t)^2, A = W f averaged to `size` x `size` places, f the map
    whose mean a network's classifier W reads (Guo et al. 2023, class attention maps). W_s gets a gradient, too.

    Mean over batch, classes and places. As published the weight is tuned for each pair of networks: 15 for resnet32x4
    -> resnet8x4, 0.7 for resnet56 -> resnet20, and 4.5 to 600; for pairs of unlike families with `normalize`.
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Guo et al. 2023 (CAT-KD), class attention maps"

    def __init__(
        self, weights: Weights, size: Count = 2, normalize: bool = False, label_smoothing: Smoothing = 0.0
    ) -> None:
        super().__init__(weights, "last", label_smoothing)
        self.size, self.normalize = size, normalize
        self._classifiers: tuple[nn.Linear, ...] = ()

    @property
    def formula(self) -> str:
        text = self.written(task=self.task_text, distill="mean (A_s - A_t)^2")
        length = " at length 1" if self.normalize else ""
        return f"{text}, A = W f averaged to {self.size} x {self.size} places{length}, f = {self.layers_text}"

    def attach(self, student: Parts, teacher: Parts | None) -> None:
        self._classifiers = (classifier_of(student, "cat_kd", "student"), classifier_of(teacher, "cat_kd"))

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        known_classifiers(self._classifiers, "cat_kd")
        super().setup(student, teacher)

    def chosen(self, student: Outputs, teacher: Outputs) -> Pair:
        if self.settled and self.pair:
            return self.pair
        return Pair((pooled_map(student, "cat_kd", "student"),), (pooled_map(teacher, "cat_kd"),))

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        pairs = zip(self.map(student, teacher), self._classifiers, strict=True)
        s, t = (class_maps(feature, classifier, self.size, self.normalize) for feature, classifier in pairs)
        distill = (s - t.detach()).square().mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distill)
