"""ShuffleNetV2 (Ma et al. 2018) for 32-pixel images, with the field's parameter names."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Range, Width, listed, within
from kdbench.models.base import Staged, Step, pool, rectified_stages
from kdbench.models.shufflenetv1 import STEM, shuffle

EVEN = Range("even", lambda width: width % 2 == 0)


class SplitUnit(nn.Module):
    """Half of the channels pass untouched, half through 1x1, depth-wise 3x3 and 1x1; then both are shuffled.

    The last unit of a stage leaves its last ReLU and the shuffle to the network.
    """

    last = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.untouched = half
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x[:, self.untouched :])), inplace=True)
        y = self.bn2(self.conv2(y))
        y = self.bn3(self.conv3(y))
        if self.last:
            return torch.cat([x[:, : self.untouched], y], 1)
        return shuffle(torch.cat([x[:, : self.untouched], F.relu(y, inplace=True)], 1), 2)


class DownUnit(nn.Module):
    """Both branches see the whole input and halve the map; their concatenation has `outputs` channels."""

    last = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        both = torch.cat([left, self.bn5(self.conv5(self.bn4(self.conv4(right))))], 1)
        return both if self.last else shuffle(F.relu(both, inplace=True), 2)


@checked
class ShuffleNetV2(Staged):
    """ShuffleNetV2 with a 1x1 stem of 24 channels and three stages, as RepDistiller and mdistiller run it on CIFAR.

    widths: output channels of the three stages and of the last 1x1 convolution (116-232-464-1024 is the paper's 1x).
    units: how many units follow the down-sampling one of each stage. Input [B, in_channels, S, S], S >= 8; features
    "stem", "stage1".."stage3", each also before its last ReLU and the shuffle ("stage1.pre"), "map" (the last
    convolution's) and its mean "pooled" [B, widths[3]].
    Raises UserError for widths that cannot be halved.
    """

    joints = ("stage1", "stage2", "map")

    def __init__(
        self,
        widths: Annotated[list[Annotated[Width, EVEN]], listed(4, "four widths", most=4)],
        units: Annotated[list[Annotated[int, within(0, 1000)]], listed(3, "three numbers of units", most=3)],
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, widths[0], units[0])
        self.layer2 = _stage(widths[0], widths[1], units[1])
        self.layer3 = _stage(widths[1], widths[2], units[2])
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], num_classes)

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self._stem, "input"),
            **rectified_stages((self.layer1, self.layer2, self.layer3), _active),
            "map": (self._last, "stage3"),
            "pooled": (pool, "map"),
            "logits": (self.linear, "pooled"),
        }

    def _stem(self, image: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(image)), inplace=True)

    def _last(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


def _active(before: Tensor) -> Tensor:
    return shuffle(F.relu(before), 2)  # the untouched half is not below 0


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    made: list[DownUnit | SplitUnit] = [DownUnit(inputs, outputs), *(SplitUnit(outputs) for _ in range(units))]
    made[-1].last = True
    return nn.Sequential(*made)
