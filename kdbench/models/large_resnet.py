"""ResNet-18, -34 and -50 (He et al. 2016, table 1) with a stem for 32-pixel images and the field's parameter names."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, initialise, pool, rectified_stages

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut. The last block of a stage leaves its ReLU to the network."""

    expansion = 1
    last = False

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return y if self.last else F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolution to four times the width, around a shortcut."""

    expansion = 4
    last = False

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y)) + self.shortcut(x)
        return y if self.last else F.relu(y, inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class LargeResNet(Staged):
    """A ResNet of four stages whose stem is one 3x3 convolution of stride 1, without max-pooling.

    blocks: how many each stage has (2-2-2-2 is ResNet-18, 3-4-6-3 ResNet-34 and -50); block: "basic" or "bottleneck".
    Input [B, in_channels, S, S], S >= 8; features "stem", "stage1".."stage4", each also before its last ReLU
    ("stage1.pre"), "pooled" [B, 512 or 2048].
    Raises UserError unless `blocks` are four positive numbers. For ImageNet use torchvision's or timm's.
    """

    joints = ("stage1", "stage2", "stage3", "stage4")

    def __init__(
        self,
        blocks: list[int],
        block: Literal["basic", "bottleneck"],
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if len(blocks) != len(WIDTHS) or any(count < 1 for count in blocks):
            raise UserError("blocks", list(blocks), "four positive numbers")
        if block not in ("basic", "bottleneck"):
            raise UserError("block", block, "basic or bottleneck")
        kind = BasicBlock if block == "basic" else Bottleneck
        outputs = [width * kind.expansion for width in WIDTHS]
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(kind, blocks[0], WIDTHS[0], WIDTHS[0], 1)
        self.layer2 = _stage(kind, blocks[1], outputs[0], WIDTHS[1], 2)
        self.layer3 = _stage(kind, blocks[2], outputs[1], WIDTHS[2], 2)
        self.layer4 = _stage(kind, blocks[3], outputs[2], WIDTHS[3], 2)
        self.linear = nn.Linear(outputs[3], num_classes)
        initialise(self, linear="default")

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self._stem, "input"),
            **rectified_stages((self.layer1, self.layer2, self.layer3, self.layer4)),
            "pooled": (pool, "stage4"),
            "logits": (self.linear, "pooled"),
        }

    def _stem(self, image: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(image)), inplace=True)

    def norms_before_relu(self) -> dict[str, nn.Module]:
        """The batch norm that makes each map before a ReLU, up to the shortcut that is added to it."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        last = "bn3" if isinstance(self.layer1[-1], Bottleneck) else "bn2"
        return {f"stage{number}.pre": stage[-1].get_submodule(last) for number, stage in enumerate(stages, start=1)}


def _stage(
    kind: type[BasicBlock] | type[Bottleneck], blocks: int, inputs: int, width: int, stride: int
) -> nn.Sequential:
    made = [kind(inputs, width, stride), *(kind(width * kind.expansion, width, 1) for _ in range(blocks - 1))]
    made[-1].last = True
    return nn.Sequential(*made)
