"""Language models: sizes, that nothing is seen before its time, and that words are read by their letters."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from kdbench.arguments import accepted
from kdbench.errors import UserError
from kdbench.models.base import count_parameters, first_layer_name, flops, last_layer
from kdbench.models.lstm_lm import CharCNNLM, spelled
from kdbench.models.weights import weight_hash
from kdbench.types import CorpusInfo
from tests.support.models import LANGUAGE, build_for, header

WORDS = tuple(f"w{number}" for number in range(30))
INFO = CorpusInfo(30, 3, 5, WORDS)
SMALL = {"lstm_lm_1500": {"width": 12}, "lstm_lm": {"width": 12},
         "char_cnn_lm": {"width": 12, "maps": [4] * 7}}  # fmt: skip


def test_the_first_line_tells_the_true_size():
    words = tuple(f"{'abcdefghijklmnopqrstuvwxyz0123456789.-&$<>#/N_eos'[i % 48]}{i}" for i in range(10_000))
    for name, words_known in (("lstm_lm_1500", words), ("char_cnn_lm", words)):
        with torch.device("meta"):
            made = build_for(name, CorpusInfo(10_000, 35, 35, words_known))
        stated = re.search(r"([\d.,]+) (million )?parameters", header(name))
        assert stated is not None
        if stated[2]:
            assert count_parameters(made) / 1e6 == pytest.approx(float(stated[1]), abs=0.05)
        else:
            assert count_parameters(made) == int(stated[1].replace(",", ""))
    assert "273,738 parameters with 74 characters" in header("lstm_lm")
    assert count_parameters(build_for("lstm_lm", CorpusInfo(74, 64, 64))) == 273_738


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_network_trains_and_sees_no_token_before_it_is_predicted(name):
    torch.manual_seed(0)
    network, ids = build_for(name, INFO, **SMALL[name]).eval(), INFO.example(4)
    out = network(ids)
    assert out.logits.shape == (20, 30) and {"stage1", "stage2", "pooled"} == out.features.keys()
    assert all(feature.shape == (20, 12) for feature in out.features.values())
    torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
    other = ids.clone()
    other[:, 5] = ids[:, 5] % 29 + 1  # read for the third prediction and those after it
    changed = (network(other).logits != out.logits).any(1).view(4, 5)
    assert changed[:, 2:].all() and not changed[:, :2].any()
    before = (network(ids[:, 1:]).logits != out.logits).any(1)
    assert before.any()  # the context counts
    out.logits.square().mean().backward()
    assert not [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert torch.equal(copy.deepcopy(network)(ids).logits, out.logits) and first_layer_name(network) != "fc"
    assert flops(network, INFO) > 0 and weight_hash(network.state_dict()) == weight_hash(
        copy.deepcopy(network).state_dict()
    )


def test_tied_weights_are_one_and_stay_so():
    network = build_for("lstm_lm", INFO, width=8)
    assert network.fc.weight is network.embedding.weight
    twin = copy.deepcopy(network)
    assert twin.fc.weight is twin.embedding.weight
    loose = build_for("lstm_lm", INFO, width=8, tied=False)
    assert count_parameters(loose) == count_parameters(network) + 30 * 8


def test_words_are_read_by_their_letters():
    rows = spelled(["ab", "", "abcdef"], ["a", "b", "c", "d", "e", "f"], 5)
    assert rows.tolist() == [[1, 3, 4, 2, 0], [1, 2, 0, 0, 0], [1, 3, 4, 5, 2]]
    network = CharCNNLM(8, 1, 0.0, 4, [1, 2], [3, 3], 1, 12, num_classes=4, context=1, predicted=2,
                        words=("ab", "ba", "ab", "c")).eval()  # fmt: skip
    assert network.spelling.shape == (4, 4)
    few, many = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2], [3, 3, 3]])
    assert torch.equal(network._embedded(few)[0, 0], network._embedded(few)[0, 2])
    torch.testing.assert_close(network._embedded(many)[:1], network._embedded(few))
    with pytest.raises(UserError, match=r"maps = \[3\]: must be as many numbers as windows has: 2"):
        CharCNNLM(8, 1, 0.0, 4, [1, 2], [3], num_classes=4, context=1, predicted=2)


def test_what_is_not_asked_for_is_not_given():
    assert "words" not in accepted(type(build_for("lstm_lm", INFO, width=8)), INFO._asdict())
