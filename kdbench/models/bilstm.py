"""Bidirectional LSTM over tokens, as Tang et al. (2019) distil BERT into."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Dropout, Width, within
from kdbench.types import Outputs


@checked
class BiLSTM(nn.Module):
    """Tang et al. 2019 ("Distilling task-specific knowledge from BERT into simple neural networks"), section 3.1: the
    last states of both directions, a layer with ReLU, and the classifier.

    width: numbers a token; hidden: of each direction; layers: one on the other; dense: width of the layer behind them;
    dropout: between layers and on the pooled features. Input ids int64 [B, L], 0 = padding, which no answer depends on:
    the backward direction begins at the end of each text. No lengths go to the host. Features, 0 on padding:
    "embeddings" [B, width, 1, L], "stage1".."stageN" [B, 2 hidden, 1, L], and "pooled" [B, dense].
    """

    any_length = True

    def __init__(
        self,
        width: Width = 128,
        hidden: Width = 128,
        layers: Annotated[int, within(1, 16)] = 1,
        dense: Width = 200,
        dropout: Dropout = 0.0,
        *,
        num_classes: int,
        vocab_size: int,
        length: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=0)
        sizes = [width] + [2 * hidden] * (layers - 1)
        self.forth = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.back = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.dense = nn.Linear(2 * hidden, dense)
        self.fc = nn.Linear(dense, num_classes)

    def forward(self, inputs: Tensor) -> Outputs:
        here = (inputs != 0)[:, :, None]  # [B, L, 1]
        size = here.sum(1)  # [B, 1]
        place = torch.arange(inputs.shape[1], device=inputs.device)
        turned = (size - 1 - place).clamp_min(0)[:, :, None]  # where each place of the text read backwards comes from
        last = (size - 1).clamp_min(0)[:, :, None]
        x = self.embedding(inputs) * here
        features = {"embeddings": _map(x)}
        ends = []
        for number, (forth, back) in enumerate(zip(self.forth, self.back), start=1):
            x = self.dropout(x) if number > 1 else x
            both = forth(x)[0], back(_at(x, turned))[0]
            ends = [_at(states, last)[:, 0] for states in both]
            x = torch.cat((both[0], _at(both[1], turned)), 2) * here
            features[f"stage{number}"] = _map(x)
        features["pooled"] = pooled = self.dropout(F.relu(self.dense(torch.cat(ends, 1))))
        return Outputs(self.fc(pooled), features)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """x [B, L, D] at places [B, n, 1] -> [B, n, D]."""
    return x.gather(1, place.expand(-1, -1, x.shape[2]))


def _map(x: Tensor) -> Tensor:
    """[B, L, D] as losses of features have it: [B, D, 1, L]."""
    return x.transpose(1, 2)[:, :, None]
