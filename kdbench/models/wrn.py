"""Wide ResNets (Zagoruyko and Komodakis 2016): pre-activation blocks, with the field's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Depth, Dropout, Scale
from kdbench.models.base import Staged, Step, initialise, pool
from kdbench.models.resnet import blocks_per_stage, scaled_widths


class WideBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution; a changed shape takes its shortcut after the first of them."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()  # Dropout(0) would still draw a mask
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.convShortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x [B, inputs, H, W], or x with what the first batch norm makes of it, where that is a feature, too."""
        if isinstance(x, tuple):
            x, normed = x
            active = F.relu(normed)
        else:
            active = F.relu(self.bn1(x), inplace=True)
        y = F.relu(self.bn2(self.conv1(active)), inplace=True)
        y = self.conv2(self.dropout(y))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


@checked
class WideResNet(Staged):
    """WRN-depth-width: a 3x3 stem and three stages of widened pre-activation blocks.

    depth: 6n + 4. width: the widening factor k of the three stages (the stem keeps its channels). dropout: between
    the two convolutions of a block (Zagoruyko and Komodakis: 0.3 on CIFAR; RepDistiller: 0). widths: channels of
    stem and stages before widening. Input [B, in_channels, S, S]; features "stem", "stage1".."stage3" (raw sums,
    before the next batch norm and ReLU), "stage1.pre".. (after that batch norm), "map" (after the last ReLU) and its
    mean "pooled". Raises UserError for a depth, width or dropout that do not exist.
    """

    joints = ("stage1", "stage2", "stage3.pre")
    rectified = False

    def __init__(
        self,
        depth: Depth,
        width: Scale,
        dropout: Dropout = 0.0,
        widths: list[int] | None = None,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        widths = [16, 16, 32, 64] if widths is None else widths
        blocks = blocks_per_stage(depth, 4)
        stem, *stages = scaled_widths(widths, width)
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.block1 = _stage(blocks, stem, stages[0], 1, dropout)
        self.block2 = _stage(blocks, stages[0], stages[1], 2, dropout)
        self.block3 = _stage(blocks, stages[1], stages[2], 2, dropout)
        self.bn1 = nn.BatchNorm2d(stages[2])
        self.fc = nn.Linear(stages[2], num_classes)
        initialise(self, linear="zero_bias")

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self.conv1, "input"),
            "stage1": (self.block1, "stem"),
            "stage1.pre": (_first_norm(self.block2), "stage1"),
            "stage2": (partial(_both, self.block2), "stage1", "stage1.pre"),
            "stage2.pre": (_first_norm(self.block3), "stage2"),
            "stage3": (partial(_both, self.block3), "stage2", "stage2.pre"),
            "stage3.pre": (self.bn1, "stage3"),
            "map": (F.relu, "stage3.pre"),
            "pooled": (pool, "map"),
            "logits": (self.fc, "pooled"),
        }

    def norms_before_relu(self) -> dict[str, nn.Module]:
        """The batch norm that makes each map before a ReLU."""
        return {"stage1.pre": _first_norm(self.block2), "stage2.pre": _first_norm(self.block3), "stage3.pre": self.bn1}


def _both(block: nn.Module, x: Tensor, normed: Tensor) -> Tensor:
    return block((x, normed))


def _first_norm(stage: nn.Sequential) -> nn.Module:
    return stage.get_submodule("layer.0.bn1")


def _stage(blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> nn.Sequential:
    later = [WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
    # One more level only for the published names: block1.layer.0.conv1
    return nn.Sequential(OrderedDict(layer=nn.Sequential(WideBlock(inputs, outputs, stride, dropout), *later)))
