"""Continuing texts: greedy is the best next token, a beam finds what greed misses, and nothing follows an end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdbench.models.generate import generate
from kdbench.types import Outputs


class Chain(nn.Module):
    """The next token depends on the last one: log-probabilities [C, C]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, inputs: Tensor) -> Outputs:
        return Outputs(self.table[inputs[:, -2:]].flatten(0, 1), {})


def chain(*rows: tuple[float, ...]) -> Chain:
    return Chain(torch.tensor(rows).clamp_min(1e-9).log())


# 1 goes on to 2 (0.6) or 3 (0.4); 2 to anything, 3 surely to 4.
GREEDY_FAILS = chain((0.2,) * 5, (0, 0, 0.6, 0.4, 0), (0, 0.3, 0.25, 0.25, 0.2), (0, 0, 0, 0, 1.0), (0, 0, 0, 0, 1.0))


def test_greedy_takes_the_best_next_token_and_a_beam_the_best_text():
    prompts = torch.tensor([[4, 1], [1, 3]])
    assert generate(GREEDY_FAILS, prompts, 2).tolist() == [[2, 1], [4, 4]]
    assert generate(GREEDY_FAILS, prompts, 2, beam=3).tolist() == [[3, 4], [4, 4]]


def test_behind_an_end_stands_padding_which_is_never_said():
    always = chain((0.2,) * 5, *[(0.9, 0, 0.06, 0.04, 0)] * 4)
    assert generate(always, torch.tensor([[1, 1]]), 3).tolist() == [[2, 2, 2]]
    assert generate(GREEDY_FAILS, torch.tensor([[1, 3]]), 3, beam=2, end=4).tolist() == [[4, 0, 0]]
    assert generate(GREEDY_FAILS, torch.tensor([[1, 1]]), 3, end=2).tolist() == [[2, 0, 0]]
