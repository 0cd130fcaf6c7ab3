"""Networks of transformers: exact answers, features, what is refused, and when the library is imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch

import kdbench
from kdbench.arguments import accepted
from kdbench.engine.distiller import trimmed
from kdbench.errors import UserError
from kdbench.models.base import flops, last_layer, taken_kinds
from kdbench.models.transformers import ANY_LENGTH, transformers_lm, transformers_model
from kdbench.types import CorpusInfo, TokenInfo
from tests.models.test_models_tokens import ids
from tests.support.procedures import result, train

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = {"bert": SMALL, "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}, "roberta": SMALL,
         "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2}}  # fmt: skip
INFO = TokenInfo(3, 40, 12)


LEAN = {**SMALL, "embedding_size": 16}


def build(kind: str = "bert", info: TokenInfo = INFO, **keys):
    keys = {"options": KINDS.get(kind, {}), **keys}
    return transformers_model(kind, **keys, **info._asdict())


def texts(n: int = 32) -> torch.Tensor:
    return ids(n).clamp(max=38)


def test_nothing_imports_what_only_an_extra_brings():
    """Importing any module of kdbench imports neither of these: they are asked for inside of functions."""
    extras, found = {"transformers", "tokenizers", "huggingface_hub", "pyarrow"}, []
    for path in Path(kdbench.__file__).parent.rglob("*.py"):
        for statement in _at_import(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) and not statement.level else []
            found += [(path.name, name) for name in names if name.partition(".")[0] in extras]
    assert not found
    assert taken_kinds(transformers_model) == [TokenInfo]


def _at_import(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _at_import(node)


@pytest.fixture(autouse=True)
def _library(request):
    if "nothing_imports" not in request.node.name:
        pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_a_kind_answers_exactly_whatever_stands_beside_a_text(kind):
    network, batch = build(kind).eval(), texts()
    with torch.no_grad():
        out = network(batch)
        order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(network(batch[order]).logits, out.logits[order])
        whole = batch.clone()
        whole[1:] = INFO.example(31)  # beside texts without padding
        assert torch.equal(network(whole).logits[0], out.logits[0])
        torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
        alone = network(batch[4:5, : int((batch[4] != 0).sum())]).logits
    torch.testing.assert_close(alone, out.logits[4:5], rtol=1e-4, atol=1e-5)
    shapes = {key: list(feature.shape) for key, feature in out.features.items()}
    assert shapes == {**{key: [32, 16, 1, 12] for key in ("embeddings", "stage1", "stage2")}, "pooled": [32, 16]}
    padding = (batch == 0)[:, None, None]
    assert not any((out.features[key] * padding).any() for key in ("embeddings", "stage1", "stage2"))
    assert flops(network, INFO) > 0


def test_attentions_are_features_where_they_are_asked_for():
    out = build(attentions=True).eval()(texts())
    assert out.features["attention2"].shape == (32, 2, 12, 12)
    held = out.features["attention1"].sum(3)
    torch.testing.assert_close(held, (texts() != 0)[:, None].expand_as(held).float())


def test_published_weights_are_read_with_their_own_ids_and_padding(tmp_path):
    for kind, padding in (("bert", 0), ("gpt2", None)):
        first = build(kind).eval()
        expected = first(texts()).logits
        first.net.config.pad_token_id = padding
        first.net.save_pretrained(tmp_path / kind)
        shifted = INFO._replace(vocab_size=41 if padding is None else 40)
        again = build(str(tmp_path / kind), shifted, pretrained=True, options={}).eval()
        given = texts() + (texts() != 0) * (padding is None)
        torch.testing.assert_close(again(given).logits, expected)
        fresh = build(str(tmp_path / kind), shifted._replace(num_classes=5), pretrained=True, new_head=True, options={})
        assert fresh(given).logits.shape == (32, 5)
        with pytest.raises(UserError, match=r"new_head = false: must be true: the classifier of .* has 3 classes"):
            build(str(tmp_path / kind), shifted._replace(num_classes=5), pretrained=True, options={})
        with pytest.raises(UserError, match=r"name = .*: must be a network that knows 99 token ids: it knows 40"):
            build(str(tmp_path / kind), INFO._replace(vocab_size=99), pretrained=True, options={})
        with pytest.raises(UserError, match=r"name = .*: must be a network for 9999 tokens"):
            build(str(tmp_path / kind), shifted._replace(length=9999), pretrained=True, options={})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "birt"}, "name = birt: must be a kind of network .*bert"),
        ({"options": {"hiden_size": 8}}, r"options.hiden_size: this kind of network has no such option. .*hidden_size"),
        ({"options": {"hidden_size": 15, "num_attention_heads": 2}}, "options: they do not fit bert: ValueError"),
        ({"pretrained": True}, "pretrained = true: must be false: bert is a kind of network, without weights"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(keys, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        build(**keys)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"name = bert: must be a network of kdbench's own: .*kdbench\[text\]"):
        build()


def test_transformers_train_from_the_command_line_and_share_a_table():
    sizes = [f"{who}.options.{key}={value}" for who in ("+student", "+teacher") for key, value in SMALL.items()]
    words = ["dataset=udhr", "dataset.words=6", "dataset.subset=128", "student=transformers", "teacher=transformers",
             *sizes, "optimizer=adamw", "optimizer.lr=0.002", "schedule.epochs=1", "teacher.schedule.epochs=1",
             "teacher.allow_chance=true", "dataset.length=16",
             "trainer.device=cpu", "trainer.progress=none"]  # fmt: skip
    live = result(train(*words, "teacher.table=off", plain=True, out="live"))
    assert result(train(*words, "teacher.table=on", plain=True, out="table"))["student"] == live["student"]


TEXT = CorpusInfo(40, 3, 5)


def build_lm(kind: str = "gpt2", info: CorpusInfo = TEXT, **keys):
    return transformers_lm(kind, **{"options": KINDS["gpt2"], **keys}, **accepted(transformers_lm, info._asdict()))


def test_a_causal_network_answers_for_the_last_tokens_alone():
    pytest.importorskip("transformers")
    assert taken_kinds(transformers_lm) == [CorpusInfo]
    info = CorpusInfo(40, 3, 5)
    network, blocks = build_lm().eval(), info.example(4)
    blocks[0, :4] = 0  # the beginning of a text
    with torch.no_grad():
        out = network(blocks)
        whole = network.net(input_ids=blocks).logits[:, -5:].flatten(0, 1)
        assert torch.equal(out.logits, whole) and torch.isfinite(out.logits).all() and out.logits.shape == (20, 40)
        torch.testing.assert_close(last_layer(network)(out.features["pooled"]), out.logits)
        other = blocks.clone()
        other[:, 6] = blocks[:, 6] % 39 + 1
        changed = (network(other).logits != out.logits).any(1).view(4, 5)
    assert changed[:, 3:].all() and not changed[:, :3].any()
    assert {"embeddings", "stage1", "stage2", "pooled"} == out.features.keys() and flops(network, info) > 0
    with pytest.raises(UserError, match="no such option"):
        build_lm(options={"n_layers": 2})


def test_a_published_causal_network_has_no_logit_for_padding_of_its_own(tmp_path):
    pytest.importorskip("transformers")
    made = build_lm(info=CorpusInfo(39, 3, 5))
    made.net.config.pad_token_id = None  # as GPT-2's
    made.net.save_pretrained(tmp_path)
    network = build_lm(str(tmp_path), options={}, pretrained=True, info=CorpusInfo(40, 3, 5)).eval()
    blocks = CorpusInfo(40, 3, 5).example(2)
    with torch.no_grad():
        logits, own = network(blocks).logits, network.net(input_ids=blocks - 1).logits[:, -5:].flatten(0, 1)
    assert torch.equal(logits[:, 1:], own) and (logits[:, 0] == -100).all()
    with pytest.raises(UserError, match="a network of 49 tokens: it has 39"):
        build_lm(str(tmp_path), options={}, pretrained=True, info=CorpusInfo(50, 3, 5))


@pytest.mark.parametrize("kind", ANY_LENGTH)
def test_kinds_that_are_asked_without_padding_answer_and_learn_the_same(kind):
    torch.manual_seed(0)
    options = KINDS.get(kind) or (LEAN if kind in ("albert", "electra") else SMALL)
    network = build(kind, INFO._replace(length=32), options=options).eval()  # no dropout
    short = torch.zeros(8, 32, dtype=torch.int64)
    short[:, :12] = texts(8)
    found = []
    for given in (short, trimmed(short)):
        network.zero_grad()
        logits = network(given).logits
        logits.square().sum().backward()
        found.append([logits, *(one.grad.clone() for one in network.parameters() if one.grad is not None)])
    assert network.any_length and trimmed(short).shape == (8, 16)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_other_kinds_read_the_whole_width():
    assert not build("convbert", options={**SMALL, "embedding_size": 16}).any_length


def test_a_kind_with_a_slip_is_looked_for_on_no_network(monkeypatch):
    library = pytest.importorskip("transformers")
    monkeypatch.setattr(library.AutoConfig, "from_pretrained", None)
    with pytest.raises(UserError, match=r"name = distilbrt: must be a kind of network .* Did you mean distilbert\?"):
        transformers_model("distilbrt", num_classes=2, vocab_size=50, length=8)
