"""Generation: a language model continues texts, greedily or by beam search."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0


@torch.no_grad()
def generate(
    network: nn.Module, prompts: Tensor, count: int, beam: int = 1, end: int | None = None, most: int | None = None
) -> Tensor:
    """The `count` most probable next tokens of each prompt by beam search: int64 [B, count]; PADDING behind `end`.

    prompts int64 [B, P]; network: ids [B, L] -> logits of the last places, as language models return them. The whole
    text is read anew for every token, which any network can do; `beam` texts are kept for each prompt, and the one
    with the largest probability is returned. PADDING is never said. most: tokens that the network reads, the last ones
    of a text that is longer.
    """
    size, width = prompts.shape
    texts = prompts.repeat_interleave(beam, 0)
    scores = torch.full((size, beam), -torch.inf, device=prompts.device)
    scores[:, 0] = 0  # all beams are alike at first
    done = torch.zeros(size * beam, dtype=torch.bool, device=prompts.device)
    for _ in range(count):
        logp = _next(network, texts if most is None else texts[:, -most:])
        logp[:, PADDING] = -torch.inf
        logp[done] = -torch.inf  # a text that has ended goes on in one way only, at no cost
        logp[done, PADDING] = 0.0
        every = scores[:, :, None] + logp.view(size, beam, -1)
        scores, place = every.flatten(1).topk(beam, 1)
        token = place % logp.shape[1]
        parent = place // logp.shape[1] + beam * torch.arange(size, device=prompts.device)[:, None]
        texts = torch.cat([texts[parent.flatten()], token.view(-1, 1)], 1)
        done = done[parent.flatten()]
        if end is not None:
            done = done | (token.flatten() == end)
    return texts.view(size, beam, -1)[:, 0, width:]


def _next(network: nn.Module, texts: Tensor) -> Tensor:
    """Log-probabilities [B, C] of the token after each text [B, L]."""
    logits = network(texts).logits
    return F.log_softmax(logits.view(len(texts), -1, logits.shape[-1])[:, -1].float(), 1)
