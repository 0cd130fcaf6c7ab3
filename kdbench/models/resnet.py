"""ResNets of depth 6n + 2 for 32-pixel images (He et al. 2016, section 4.2), with the field's parameter names."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Depth, Scale
from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, initialise, pool, rectified_stages

Shortcut = Literal["A", "B"]


class PadShortcut(nn.Module):
    """Option A of He et al.: every other pixel, missing channels filled with zeros on both sides; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride = stride
        self.pad = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; [B, inputs, H, W] -> [B, outputs, H / stride, W / stride].

    The last one of a stage leaves its ReLU to the network, which gives the map before it, too.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.last = False
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)) + self.downsample(x)
        return y if self.last else F.relu(y, inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


@checked
class ResNet(Staged):
    """A ResNet of three stages; the maps halve at the start of stages 2 and 3.

    depth: 6n + 2. widths: channels of the stem and of the three stages; `width` multiplies those of the stages
    (resnet38x2 is width 2; resnet8x4 has a wider stem too: widths 32-64-128-256). shortcut: "B", a 1x1 convolution
    with batch norm wherever the shape changes (RepDistiller, mdistiller), or "A", zero padding without parameters
    (He et al. for CIFAR-10: 269,722 parameters for resnet20). Input [B, in_channels, S, S] of any size; features
    "stem", "stage1".."stage3", each also before its last ReLU ("stage1.pre"), "pooled". Raises UserError for a depth,
    widths or shortcut that do not exist.
    """

    joints = ("stage1", "stage2", "stage3")

    def __init__(
        self,
        depth: Depth,
        widths: list[int],
        shortcut: Shortcut = "B",
        width: Scale = 1,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        stem, *stages = scaled_widths(widths, width)
        blocks = blocks_per_stage(depth, 2)
        if shortcut not in ("A", "B"):
            raise UserError("shortcut", shortcut, "A or B")
        if shortcut == "A" and [stem, *stages] != sorted([stem, *stages]):
            raise UserError("widths", widths, "such that none falls with shortcut=A (zero padding only adds channels)")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(blocks, stem, stages[0], 1, shortcut)
        self.layer2 = _stage(blocks, stages[0], stages[1], 2, shortcut)
        self.layer3 = _stage(blocks, stages[1], stages[2], 2, shortcut)
        self.fc = nn.Linear(stages[2], num_classes)
        initialise(self, linear="default")

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self._stem, "input"),
            **rectified_stages((self.layer1, self.layer2, self.layer3)),
            "pooled": (pool, "stage3"),
            "logits": (self.fc, "pooled"),
        }

    def _stem(self, image: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(image)), inplace=True)

    def norms_before_relu(self) -> dict[str, nn.Module]:
        """The batch norm that makes each map before a ReLU, up to the shortcut that is added to it."""
        stages = (self.layer1, self.layer2, self.layer3)
        return {f"stage{number}.pre": stage[-1].bn2 for number, stage in enumerate(stages, start=1)}  # type: ignore[union-attr, misc]


def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    sizes = [(inputs, stride), *[(outputs, 1)] * (blocks - 1)]
    made = [BasicBlock(given, outputs, step, shortcut) for given, step in sizes]
    made[-1].last = True
    return nn.Sequential(*made)


def blocks_per_stage(depth: int, extra: int) -> int:
    """How many two-convolution blocks each of three stages has when depth = 6n + extra. Raises UserError otherwise."""
    blocks, rest = divmod(depth - extra, 6)
    if rest or blocks < 1:
        raise UserError("depth", depth, f"6n + {extra} with n >= 1 ({6 + extra}, {12 + extra}, ...)")
    return blocks


def scaled_widths(widths: list[int], width: float) -> list[int]:
    """Channels of stem and three stages, those of the stages times `width`. Raises UserError if one is below 1."""
    if len(widths) != 4 or any(w < 1 for w in widths):
        raise UserError("widths", list(widths), "four positive numbers (stem and three stages)")
    scaled = [widths[0], *(int(w * width) for w in widths[1:])]
    if min(scaled) < 1:
        raise UserError("width", width, "large enough to leave each layer a channel")
    return scaled
