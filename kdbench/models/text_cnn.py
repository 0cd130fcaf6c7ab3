"""Convolutions over tokens, and the largest answer over all places (Kim 2014)."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Dropout, Width, listed, within
from kdbench.types import Outputs

Windows = Annotated[list[Annotated[int, within(1, 64)]], listed(1, "a list of different lengths", different=True)]


@checked
class TextCNN(nn.Module):
    """Kim 2014 ("Convolutional neural networks for sentence classification"), the non-static variant from scratch.

    width: numbers a token; windows: lengths of the convolutions in tokens, each with `maps` channels; dropout: on the
    pooled features. Input ids int64 [B, L], 0 = padding, which no answer depends on: windows that begin behind the end
    of a text do not count, the others see zeros there. Features, 0 on padding: "embeddings" [B, width, 1, L], one map
    a window, "stage1".."stageN" [B, maps, 1, L], and "pooled" [B, N maps] after dropout.
    """

    any_length = True

    def __init__(
        self,
        width: Width = 128,
        windows: Windows = (3, 4, 5),  # type: ignore[assignment]
        maps: Width = 100,
        dropout: Dropout = 0.5,
        *,
        num_classes: int,
        vocab_size: int,
        length: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=0)
        self.sizes = list(windows)
        self.windows = nn.ModuleList(nn.Conv1d(width, maps, window) for window in windows)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.fc = nn.Linear(maps * len(windows), num_classes)

    def forward(self, inputs: Tensor) -> Outputs:
        here = (inputs != 0)[:, None]  # [B, 1, L]
        x = self.embedding(inputs).transpose(1, 2) * here
        features = {"embeddings": x[:, :, None]}
        tops = []
        for number, (size, window) in enumerate(zip(self.sizes, self.windows), start=1):
            # Each window begins at its place and sees zeros behind the text: a text may be shorter than a window.
            found = F.relu(window(F.pad(x, (0, size - 1)))) * here
            features[f"stage{number}"] = found[:, :, None]
            tops.append(found.amax(2))  # of numbers from 0 on
        features["pooled"] = pooled = self.dropout(torch.cat(tops, 1))
        return Outputs(self.fc(pooled), features)
