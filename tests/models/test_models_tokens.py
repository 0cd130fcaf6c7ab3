"""Networks for token ids: what the contract says, sizes, and that no answer depends on padding or place."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from kdbench.models.base import count_parameters, first_layer_name, flops, last_layer
from kdbench.models.fold import align_rows
from kdbench.types import TokenInfo
from tests.support.models import TOKENS, build_for, header

INFO = TokenInfo(32, 258, 44)


def ids(n: int = 6, length: int = 12) -> torch.Tensor:
    """Texts of several lengths, one of them a single token."""
    made = TokenInfo(32, 258, length).example(n)
    ends = torch.arange(n) * 3 % length + 1
    return made.masked_fill(torch.arange(length) >= ends[:, None], 0)


@pytest.mark.parametrize("name", TOKENS)
def test_the_first_line_tells_the_network_and_its_true_size(name):
    stated = re.search(r"([\d,]+) parameters with bytes, 32 classes", header(name))
    assert stated and header(name).startswith("# ") and len(header(name)) <= 120
    assert count_parameters(build_for(name, INFO)) == int(stated[1].replace(",", ""))


@pytest.mark.parametrize("name", TOKENS)
def test_a_network_trains_and_gives_its_features(name):
    network, texts = build_for(name, INFO), ids()
    out = network(texts)
    assert out.logits.shape == (6, 32) and {"embeddings", "stage1", "pooled"} <= out.features.keys()
    padding = (texts == 0)[:, None, None]
    for key, feature in out.features.items():
        assert feature.shape[0] == 6 and feature.dim() == (2 if key == "pooled" else 4)
        assert key == "pooled" or (feature.shape[2:] == (1, 12) and not (feature * padding).any())
    out.logits.square().mean().backward()
    assert not [key for key, parameter in network.named_parameters() if parameter.grad is None]
    network.eval()
    out, again = network(texts), copy.deepcopy(network)(texts)
    torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
    assert torch.equal(again.logits, out.logits)
    assert flops(network, INFO) > 0 and "mbedding" in first_layer_name(network)


@pytest.mark.parametrize("name", TOKENS)
def test_no_answer_depends_on_padding(name):
    network, texts = build_for(name, INFO).eval(), ids()
    wide = torch.nn.functional.pad(texts, (0, 9))
    torch.testing.assert_close(network(wide).logits, network(texts).logits, rtol=1e-4, atol=1e-5)
    alone = texts[4:5, : int((texts[4] != 0).sum())]
    torch.testing.assert_close(network(alone).logits, network(texts).logits[4:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("width", [30, 64])
def test_the_last_bit_of_an_answer_does_not_depend_on_its_place_in_the_chunk(name, width):
    """What makes a table exact: the same row in another place among others, in a chunk of one size."""
    texts, generator = ids(32, 20), torch.Generator().manual_seed(0)
    network = align_rows(build_for(name, TokenInfo(32, 258, 20), width=width).eval())
    with torch.no_grad():
        first = network(texts).logits
        for _ in range(4):
            order = torch.randperm(32, generator=generator)
            assert torch.equal(network(texts[order]).logits, first[order])
