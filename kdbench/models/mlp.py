"""Fully connected networks for vectors and images, as in Hinton, Vinyals and Dean (2015), section 3 (MNIST)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Dropout, Width, listed
from kdbench.types import Outputs


@checked
class MLP(nn.Module):
    """Hidden ReLU layers over a vector or an image: 2 x 1200 (with dropout) was the teacher, 2 x 800 the student.

    hidden: width of each hidden layer. dropout: on the hidden units, input_dropout: on the inputs (Hinton et al.
    2012 use 0.5 and 0.2). Input [B, dimensions], or images [B, in_channels, image_size, image_size], one size only;
    features "stage1".."stageN" [B, D] and "pooled", the last of them after dropout. Raises UserError for empty or
    non-positive `hidden`, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        hidden: Annotated[list[Width], listed(1, "a list of one width or more")],
        dropout: Dropout = 0.0,
        input_dropout: Dropout = 0.0,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        dimensions: int | None = None,
    ) -> None:
        super().__init__()
        sizes = [dimensions or in_channels * image_size**2, *hidden]
        self.image_size = image_size
        self.input_dropout = _dropout(input_dropout)
        self.hidden = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in zip(sizes, hidden))
        self.dropout = _dropout(dropout)
        self.fc = nn.Linear(hidden[-1], num_classes)

    def forward(self, inputs: Tensor) -> Outputs:
        features: dict[str, Tensor] = {}
        x = self.input_dropout(inputs.flatten(1))
        for number, layer in enumerate(self.hidden, start=1):
            features[f"stage{number}"] = x = F.relu(layer(x))
            x = self.dropout(x)
        features["pooled"] = x
        return Outputs(self.fc(x), features)


def _dropout(probability: float) -> nn.Module:
    return nn.Dropout(probability) if probability else nn.Identity()  # Dropout(0) would still draw a mask
