"""DenseNet-BC for 32-pixel images (Huang et al. 2017), with torchvision's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Depth, Dropout, Width, above_to
from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, initialise, pool


class DenseLayer(nn.Module):
    """1x1 convolution to four times the growth, 3x3 to the growth, both after batch norm and ReLU, appended."""

    def __init__(self, inputs: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()  # Dropout(0) would still draw a mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x), inplace=True))
        y = self.conv2(F.relu(self.norm2(y), inplace=True))
        return torch.cat([x, self.dropout(y)], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, 1x1 convolution to fewer channels, and 2x2 average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(F.relu(self.norm(x), inplace=True)))


@checked
class DenseNetBC(Staged):
    """DenseNet-BC-depth-growth: three dense blocks with bottlenecks and compressing transitions.

    depth: even, at least 10. Its (depth - 4) / 2 layers of two convolutions are shared out over the three blocks, the
    first blocks taking what is left over (90 is 15-14-14), so that the network has the depth it is named by; Born-Again
    Networks (Furlanello et al. 2018) use 90 and 80, which do not divide by three, without saying how. growth: channels
    that each layer adds. compression: part of the channels that a transition keeps. The stem has 2 * growth channels.
    Input [B, in_channels, S, S], S >= 8; features "stem", "stage1".."stage3" (dense blocks, before the next batch
    norm), "map" (after the last one) and its mean "pooled". Raises UserError for a depth, growth, compression or
    dropout that do not exist.
    """

    joints = ("stage1", "stage2", "map")
    rectified = False  # but for the last

    def __init__(
        self,
        depth: Depth,
        growth: Width,
        compression: Annotated[float, above_to(0, 1)] = 0.5,
        dropout: Dropout = 0.0,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        channels = 2 * growth
        parts: dict[str, nn.Module] = {"conv0": nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)}
        for number, layers in enumerate(layers_per_block(depth), start=1):
            if number > 1:
                kept = int(channels * compression)
                parts[f"transition{number - 1}"] = Transition(channels, kept)
                channels = kept
            parts[f"denseblock{number}"] = _block(layers, channels, growth, dropout)
            channels += layers * growth
        parts["norm_final"] = nn.BatchNorm2d(channels)
        self.features = nn.ModuleDict(parts)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self, linear="zero_bias")

    def steps(self) -> dict[str, Step]:
        part = self.features
        return {
            "stem": (part["conv0"], "input"),
            "stage1": (part["denseblock1"], "stem"),
            "stage2": (partial(_narrowed, part["transition1"], part["denseblock2"]), "stage1"),
            "stage3": (partial(_narrowed, part["transition2"], part["denseblock3"]), "stage2"),
            "map": (self._last, "stage3"),
            "pooled": (pool, "map"),
            "logits": (self.classifier, "pooled"),
        }

    def _last(self, x: Tensor) -> Tensor:
        return F.relu(self.features["norm_final"](x), inplace=True)


def _narrowed(transition: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    return block(transition(x))


def layers_per_block(depth: int) -> tuple[int, int, int]:
    """How many two-convolution layers each of the three blocks has. Raises UserError unless depth is even and >= 10."""
    if depth < 10 or depth % 2:
        raise UserError("depth", depth, "an even number >= 10 (6n + 4 for three equal blocks)")
    each, left = divmod((depth - 4) // 2, 3)
    return each + (left > 0), each + (left > 1), each


def _block(layers: int, inputs: int, growth: int, dropout: float) -> nn.Sequential:
    named = {f"denselayer{i + 1}": DenseLayer(inputs + i * growth, growth, dropout) for i in range(layers)}
    return nn.Sequential(OrderedDict(named))
