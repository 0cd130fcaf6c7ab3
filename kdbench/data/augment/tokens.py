"""Augmentation of token ids: some of them masked, in a number of listed views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from kdbench.arguments import checked
from kdbench.arguments.ranges import from_to, within
from kdbench.data.sampling import mixed, uniforms

_PADDING, _UNKNOWN = 0, 1  # as in kdbench.data.tokenise


@checked
@dataclass(frozen=True)
class TokenDropout:
    """Each token is masked with probability `rate`: word dropout (Iyyer et al. 2015), and the masking of Tang et al.
    (2019, section 3.3, rate 0.1), whose other two changes, of words' classes and lengths, are not made here.

    A row has `views` variants, which depend on its content and the view's number alone; view 0 is the row as it is.
    `mask`: the id that stands for what is masked: 1 in kdbench's own vocabularies, [MASK] of a pretrained network's.
    """

    rate: Annotated[float, from_to(0, 1)] = 0.1
    views: Annotated[int, within(1, 2**20)] = 16
    mask: Annotated[int, within(1, 2**31)] = _UNKNOWN

    @property
    def no_op(self) -> int:
        return 0

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.views, (n,), generator=generator)

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """ids int64 [B, L], view int64 [B] -> int64 [B, L]. Raises TypeError for what are no token ids."""
        if images.dtype != torch.int64 or images.dim() != 2:
            raise TypeError("only token ids [B, L] have tokens to mask")
        place = torch.arange(images.shape[1], device=images.device)
        content = mixed(images, place).sum(1)
        chosen = uniforms(mixed(content, view), images.shape[1]) < self.rate
        return images.masked_fill(chosen & (images != _PADDING) & (view != 0)[:, None], self.mask)
