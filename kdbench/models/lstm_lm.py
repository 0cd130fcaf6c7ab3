"""Language models of stacked LSTMs over words (Zaremba et al. 2014), and over their spelling (Kim et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments import checked
from kdbench.arguments.ranges import Dropout, Positive, Width, listed, within
from kdbench.errors import UserError
from kdbench.types import Outputs

Layers = Annotated[int, within(1, 64)]
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has the second alone


class Recurrent(nn.Module):
    """LSTM layers above each other with dropout below, between and above them, and one answer for each token at the
    end of a block."""

    def __init__(self, inputs: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        sizes = [inputs, *[width] * (layers - 1)]
        # Layers one by one, for their outputs are features.
        self.layers = nn.ModuleList(nn.LSTM(size, width, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, embedded: Tensor, predicted: int) -> dict[str, Tensor]:
        """embedded [B, L, E] -> the layers' outputs for the last `predicted` tokens, "stage1".."stageN" [B predicted,
        width], and "pooled", the last of them after dropout."""
        features: dict[str, Tensor] = {}
        x = self.dropout(embedded)
        for number, layer in enumerate(self.layers, start=1):
            output, _ = layer(x)
            features[f"stage{number}"] = output[:, -predicted:].flatten(0, 1)
            x = self.dropout(output)
        features["pooled"] = x[:, -predicted:].flatten(0, 1)
        return features


@checked
class LSTMLM(nn.Module):
    """Embedding, stacked LSTMs, softmax over the vocabulary: the language model of Zaremba et al. 2014, with the
    embedding as the last layer's weights if `tied` (Inan et al. 2016; Press and Wolf 2017).

    Tied with two layers of 1500, dropout 0.65 and 10,000 words it has 51,034,000 parameters: the LSTM of Born-Again
    Networks (Furlanello et al. 2018, table 6, "52M"). Nothing is carried from one block to the next. `init`: weights
    and biases begin in U(-init, init); null: as torch has them, embeddings from N(0, 1), since with the 0.05 of wide
    networks a narrow one stays at the tokens' frequencies for hundreds of steps.
    Input ids int64 [B, context + predicted]; logits [B predicted, num_classes], block after block; features
    "stage1".."stageN" and "pooled" [B predicted, width].
    """

    def __init__(
        self,
        width: Width = 650,
        layers: Layers = 2,
        dropout: Dropout = 0.5,
        tied: bool = True,
        init: Positive | None = None,
        *,
        num_classes: int,
        context: int,
        predicted: int,
    ) -> None:
        super().__init__()
        self.predicted = predicted
        self.embedding = nn.Embedding(num_classes, width)
        self.recurrent = Recurrent(width, width, layers, dropout)
        self.fc = nn.Linear(width, num_classes)
        if tied:
            self.fc.weight = self.embedding.weight
        if init is not None:
            begin(self, init)

    def forward(self, inputs: Tensor) -> Outputs:
        features = self.recurrent(self.embedding(inputs), self.predicted)
        return Outputs(self.fc(features["pooled"]), features)


@checked
class CharCNNLM(nn.Module):
    """Words read letter by letter: convolutions over their spelling, highway layers, stacked LSTMs, softmax over words
    (Kim et al. 2016, "Character-aware neural language models"; the large one, with 19.4 million parameters for Penn
    Treebank, is the CNN-LSTM of Born-Again Networks).

    letters: numbers a character; windows: lengths of the convolutions in characters, with as many `maps` each; highway:
    how many layers; longest: characters of a word that are read, its two ends included. Input, logits and features as
    LSTMLM's. `words`: how the vocabulary is written; kept with the weights, as the rows of a table.
    """

    spelling: Tensor  # [num_classes, longest] numbers of characters, 0 behind a word

    def __init__(
        self,
        width: Width = 650,
        layers: Layers = 2,
        dropout: Dropout = 0.5,
        letters: Width = 15,
        windows: Annotated[list[Annotated[int, within(1, 64)]], listed(1)] = (1, 2, 3, 4, 5, 6, 7),  # type: ignore[assignment]
        maps: Annotated[list[Width], listed(1)] = (50, 100, 150, 200, 200, 200, 200),  # type: ignore[assignment]
        highway: Annotated[int, within(0, 16)] = 2,
        longest: Annotated[int, within(3, 1024)] = 65,
        init: Positive = 0.05,
        *,
        num_classes: int,
        context: int,
        predicted: int,
        words: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if len(windows) != len(maps):
            raise UserError("maps", list(maps), f"as many numbers as windows has: {len(windows)}")
        longest = max(min(longest, 2 + max(map(len, words), default=0)), *windows)
        known = sorted({letter for word in words for letter in word})
        self.predicted = predicted
        self.register_buffer("spelling", spelled(words or [""] * num_classes, known, longest))
        self.letters = nn.Embedding(len(known) + 3, letters, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(letters, many, size) for size, many in zip(windows, maps))
        total = sum(maps)
        self.highways = nn.ModuleList(nn.Linear(total, 2 * total) for _ in range(highway))
        self.recurrent = Recurrent(total, width, layers, dropout)
        self.fc = nn.Linear(width, num_classes)
        begin(self, init)
        nn.init.zeros_(self.letters.weight[0])
        for layer in self.highways:  # carry first: the paper's bias of -2
            assert isinstance(layer, nn.Linear)
            nn.init.constant_(layer.bias[total:], -2.0)

    def forward(self, inputs: Tensor) -> Outputs:
        features = self.recurrent(self._embedded(inputs), self.predicted)
        return Outputs(self.fc(features["pooled"]), features)

    def _embedded(self, inputs: Tensor) -> Tensor:
        """[B, L, maps]: each word of the vocabulary once, if the batch has more tokens than that; always in an export,
        which is one program for batches of any size."""
        if is_exporting() or inputs.numel() > len(self.spelling):
            return F.embedding(inputs, self._read(self.spelling))
        return self._read(self.spelling[inputs.flatten()]).view(*inputs.shape, -1)

    def _read(self, spelling: Tensor) -> Tensor:
        x = self.letters(spelling).transpose(1, 2)
        x = torch.cat([torch.tanh(convolution(x).amax(2)) for convolution in self.convolutions], 1)
        for layer in self.highways:
            new, gate = layer(x).chunk(2, 1)
            share = torch.sigmoid(gate)
            x = share * F.relu(new) + (1 - share) * x
        return x


def spelled(words: Sequence[str], letters: Sequence[str], longest: int) -> Tensor:
    """[N, longest] the numbers of the words' characters between a begin (1) and an end (2), 0 behind them; of a longer
    word the beginning."""
    number = {letter: place for place, letter in enumerate(letters, start=3)}
    rows = [[1, *(number[letter] for letter in word[: longest - 2]), 2] for word in words]
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


@torch.no_grad()
def begin(network: nn.Module, init: float) -> None:
    """Weights and biases in U(-init, init)."""
    for parameter in network.parameters():
        parameter.uniform_(-init, init)
