"""MobileNetV2 (Sandler et al. 2018) for 32-pixel images, with the field's parameter names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Annotated

from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Scale, within
from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, initialise, pool

# Expansion (None: the network's), channels, repeats, stride of the seven groups of blocks.
GROUPS = (
    (1, 16, 1, 1),
    (None, 24, 2, 1),
    (None, 32, 3, 2),
    (None, 64, 4, 2),
    (None, 96, 3, 1),
    (None, 160, 3, 2),
    (None, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depth-wise and linear 1x1 convolution; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


@checked
class MobileNetV2(Staged):
    """MobileNetV2 as RepDistiller and mdistiller run it on CIFAR: ReLU, not ReLU6, no dropout, a stem of stride 2.

    width: multiplies all channels but the last 1280 (mobilenetv2_half is 0.5). expansion: of the inverted
    residuals. Unlike the paper, the first group (expansion 1) keeps its 1x1 convolution, and group 2 has stride 1
    (32-pixel images). Input [B, in_channels, S, S], S >= 8; features "stem", "stage1".."stage4" (groups 2, 3, 5 and
    7, linear outputs), "map" (the last convolution's) and its mean "pooled" [B, 1280]. Raises UserError for a width or
    expansion that leave no channel.
    """

    joints = ("stage1", "stage2", "stage3", "map")
    rectified = False  # but for the last

    def __init__(
        self,
        width: Scale,
        expansion: Annotated[int, within(1, 64)] = 6,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if int(16 * width) < 1:
            raise UserError("width", width, "at least 1/16, or layers are left without channels")
        self.image_size = image_size
        channels = int(32 * width)
        last = max(1280, int(1280 * width))
        self.conv1 = _conv_bn_relu(nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False))
        self.blocks = nn.ModuleList()
        for factor, base, repeats, stride in GROUPS:
            outputs = int(base * width)
            self.blocks.append(_group(channels, outputs, repeats, stride, factor or expansion))
            channels = outputs
        self.conv2 = _conv_bn_relu(nn.Conv2d(channels, last, 1, bias=False))
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        initialise(self, linear="small")

    def steps(self) -> dict[str, Step]:
        return {
            "stem": (self.conv1, "input"),
            "stage1": (partial(_through, self.blocks[:2]), "stem"),
            "stage2": (self.blocks[2], "stage1"),
            "stage3": (partial(_through, self.blocks[3:5]), "stage2"),
            "stage4": (partial(_through, self.blocks[5:]), "stage3"),
            "map": (self.conv2, "stage4"),
            "pooled": (pool, "map"),
            "logits": (self.classifier, "pooled"),
        }

    def norms_before_relu(self) -> dict[str, nn.Module]:
        """The batch norm that makes each stage, which has no ReLU, up to the shortcut that is added to it."""
        groups = {"stage1": 1, "stage2": 2, "stage3": 4, "stage4": 6}
        return {name: self.blocks[group][-1].conv[-1] for name, group in groups.items()}  # type: ignore[index, union-attr]


def _through(groups: Iterable[nn.Module], x: Tensor) -> Tensor:
    for group in groups:
        x = group(x)
    return x


def _conv_bn_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))


def _group(inputs: int, outputs: int, repeats: int, stride: int, expansion: int) -> nn.Sequential:
    later = [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(repeats - 1)]
    return nn.Sequential(InvertedResidual(inputs, outputs, stride, expansion), *later)
