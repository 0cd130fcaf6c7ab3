"""ShuffleNet (Zhang et al. 2018) for 32-pixel images, with the field's parameter names."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Depth, Width, listed, within
from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, pool, rectified_stages

STEM = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depth-wise 3x3, grouped 1x1; stride 2 appends the average-pooled input as channels.

    The last unit of a stage leaves its ReLU to the network.
    """

    last = False

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        hidden = added // 4
        first = 1 if inputs == STEM else groups  # the stem is too narrow to group (section 3.2)
        self.groups = first
        self.conv1 = nn.Conv2d(inputs, hidden, 1, groups=first, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, added, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(added)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y = y + x if self.pool is None else torch.cat([y, self.pool(x)], 1)
        return y if self.last else F.relu(y, inplace=True)


@checked
class ShuffleNetV1(Staged):
    """ShuffleNet with a 1x1 stem of 24 channels and three stages, as RepDistiller and mdistiller run it on CIFAR.

    widths: output channels of the stages; units: how many each has; groups: of the 1x1 convolutions.
    Input [B, in_channels, S, S], S >= 8; features "stem", "stage1".."stage3", each also before its last ReLU
    ("stage1.pre"), "pooled" [B, widths[2]].
    Raises UserError if the widths cannot be split into quarters and groups.
    """

    joints = ("stage1.pre", "stage2.pre", "stage3.pre")
    rectified = False

    def __init__(
        self,
        widths: Annotated[list[Width], listed(3, "three widths", most=3)],
        units: Annotated[list[Depth], listed(3, "three numbers of units", most=3)],
        groups: Annotated[int, within(1, 64)],
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        _check(widths, groups)
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, widths[0], units[0], groups)
        self.layer2 = _stage(widths[0], widths[1], units[1], groups)
        self.layer3 = _stage(widths[1], widths[2], units[2], groups)
        self.linear = nn.Linear(widths[2], num_classes)

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self._stem, "input"),
            **rectified_stages((self.layer1, self.layer2, self.layer3)),
            "pooled": (pool, "stage3"),
            "logits": (self.linear, "pooled"),
        }

    def _stem(self, image: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(image)), inplace=True)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of x [B, D, H, W] out over the groups, so that the next grouped convolution mixes them."""
    if groups == 1:
        return x
    return F.channel_shuffle(x, groups)  # one kernel, and it keeps channels_last


def _stage(inputs: int, outputs: int, units: int, groups: int) -> nn.Sequential:
    later = [ShuffleUnit(outputs, outputs, 1, groups) for _ in range(units - 1)]
    made = [ShuffleUnit(inputs, outputs, 2, groups), *later]
    made[-1].last = True
    return nn.Sequential(*made)


def _check(widths: list[int], groups: int) -> None:
    inputs = STEM
    for outputs in widths:
        added = outputs - inputs
        if added < 4 * groups or any(count // 4 % groups or count % groups for count in (added, outputs)):
            raise UserError("widths", list(widths), f"numbers that grow by quarters that divide into groups = {groups}")
        inputs = outputs
