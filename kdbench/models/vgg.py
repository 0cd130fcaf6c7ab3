"""VGG networks with batch norm for 32-pixel images: five blocks, one linear layer, with the field's parameter names."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError
from kdbench.models.base import Staged, Step, initialise, pool, rectified_stages

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Staged):
    """Five blocks of 3x3 convolutions (with bias), each followed by batch norm and ReLU (Simonyan and Zisserman 2015).

    convolutions: how many each block has (1-1-1-1-1 is vgg8, 1-1-2-2-2 vgg11, 2-2-4-4-4 vgg19). Maps halve between
    blocks; before the last block only for images of 64 pixels and more, as in RepDistiller and mdistiller.
    Input [B, in_channels, S, S], S >= 8; features "stem" (first block), "stage1".."stage4", each also before its
    last ReLU ("stage1.pre"), "pooled" [B, 512].
    Raises UserError unless `convolutions` are five positive numbers.
    """

    joints = ("stage1.pre", "stage2.pre", "stage3.pre", "stage4.pre")
    rectified = False

    def __init__(
        self, convolutions: list[int], *, num_classes: int, in_channels: int = 3, image_size: int = 32
    ) -> None:
        super().__init__()
        if len(convolutions) != len(WIDTHS) or any(count < 1 for count in convolutions):
            raise UserError("convolutions", list(convolutions), "five positive numbers")
        self.image_size = image_size
        self.block0 = _block(convolutions[0], in_channels, WIDTHS[0])
        self.block1 = _block(convolutions[1], WIDTHS[0], WIDTHS[1])
        self.block2 = _block(convolutions[2], WIDTHS[1], WIDTHS[2])
        self.block3 = _block(convolutions[3], WIDTHS[2], WIDTHS[3])
        self.block4 = _block(convolutions[4], WIDTHS[3], WIDTHS[4])
        self.pool = nn.MaxPool2d(2)
        # Decided here, not in forward: no branch on a shape, and the same network for validation and training.
        self.last_pool = nn.MaxPool2d(2) if image_size >= 64 else nn.Identity()
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        initialise(self, linear="small")

    def steps(self) -> dict[str, Step]:
        blocks = [partial(_halved, self.pool, block) for block in (self.block1, self.block2, self.block3)]
        return {
            "stem": (self._stem, "input"),
            **rectified_stages([*blocks, partial(_halved, self.last_pool, self.block4)]),
            "pooled": (pool, "stage4"),
            "logits": (self.classifier, "pooled"),
        }

    def _stem(self, image: Tensor) -> Tensor:
        return F.relu(self.block0(image), inplace=True)

    def norms_before_relu(self) -> dict[str, nn.Module]:
        """The batch norm that makes each map before a ReLU."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return {f"stage{number}.pre": block[-1] for number, block in enumerate(blocks, start=1)}


def _halved(smaller: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    return block(smaller(x))


def _block(convolutions: int, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        inputs = outputs
    return nn.Sequential(*layers[:-1])  # the last ReLU is in VGG.forward: published names number the rest
