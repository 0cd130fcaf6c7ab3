"""Blocks of a running text, of which a language model predicts every next token.

A stateless language model reads `context` + `predicted` tokens and is asked for the next one after each of the last
`predicted`, so that every prediction sees at least `context` tokens (but for the beginning of a text, before which
padding stands). In training the blocks begin at another place in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data.tokenise import PADDING
from kdbench.errors import UserError


class Blocks(NamedTuple):
    """How a text is cut."""

    context: int  # tokens before the first one that is predicted from
    predicted: int  # predictions of a block

    @property
    def length(self) -> int:
        """Tokens of a block: what is read, and the last one's next."""
        return self.context + self.predicted + 1

    def of_training(self, tokens: Tensor) -> Tensor:
        """Windows [n, length + predicted - 1] of a text [N]: each holds a block at every offset below `predicted`.

        Window k at offset o predicts the tokens k predicted + o on. A view of the text: no memory. Raises UserError for
        a text that is too short for two of them.
        """
        if len(tokens) < 3 * self.predicted:
            allowed = f"at most a third of the training text, which has {len(tokens)} tokens"
            raise UserError("dataset.predicted", self.predicted, allowed)
        return F.pad(tokens, (self.context + 1, 0)).unfold(0, self.length + self.predicted - 1, self.predicted)

    def of_evaluation(self, tokens: Tensor) -> Tensor:
        """Blocks [n, length] that predict every token of a text [N] once; the last one ends in padding."""
        missing = -len(tokens) % self.predicted
        return F.pad(tokens, (self.context + 1, missing)).unfold(0, self.length, self.predicted)

    def labels(self, windows: Tensor) -> Tensor:
        """[n, predicted] what a window's block at offset 0 predicts; -1 where that is padding, which does not count."""
        label = windows[:, self.context + 1 : self.length]
        return label.masked_fill(label == PADDING, -1)


@dataclass(frozen=True)
class Offset:
    """Where in their windows an epoch's blocks begin: one place for all of them, in [0, predicted), drawn anew; or
    always at the first one, if `fixed`.

    So every token is predicted once an epoch, from another number of tokens before it each time. The view is the
    offset. Blocks and offsets could be listed, but a table of a teacher's logits would hold every token at each place
    in a block (tokens x predicted x vocabulary), of which an epoch reads 1 / predicted: it would pay only in a training
    that has more epochs than a block has predictions. So `views` is None, and the teacher is asked anew.
    """

    blocks: Blocks
    fixed: bool = False

    @property
    def views(self) -> None:
        return None

    @property
    def no_op(self) -> int:
        return 0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        places = 1 if self.fixed else self.blocks.predicted
        return torch.randint(places, (1,), generator=generator).expand(n)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Windows int64 [B, length + predicted - 1] -> blocks [B, length]."""
        place = torch.arange(self.blocks.length, device=images.device)
        return images.gather(1, view[:, None] + place)


def next_tokens(blocks: Tensor, predicted: int) -> tuple[Tensor, Tensor]:
    """What is read, int64 [B, length - 1], and the labels [B predicted], -1 for padding, of blocks [B, length]."""
    label = blocks[:, -predicted:].flatten()
    return blocks[:, :-1].contiguous(), label.masked_fill(label == PADDING, -1)
