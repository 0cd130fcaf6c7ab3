"""Texts as token ids: tokenisers, the embedded declaration of human rights, and what is refused of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.data.augment.tokens import TokenDropout
from kdbench.data.augment.views import CropFlip, SideBySide
from kdbench.data.batches import TrainingBatches
from kdbench.data.load import load_bundle
from kdbench.data.readers.udhr import TEST_ARTICLES, languages, udhr
from kdbench.data.texts import Texts, Tokens, source_of
from kdbench.data.tokenise import SEPARATOR, UNKNOWN, Bytes, Words, encode, make_tokeniser
from kdbench.errors import UserError, under
from kdbench.types import TokenInfo
from tests.support.procedures import result, train
from tests.support.shell import kdbench

HOSTILE = ["", " ", "a", "Ab c", "ß\u0301", "\x00", "\ud800", "日本語 text", "x" * 99, "\n"]


def load(**keys):
    with under("dataset"):
        return load_bundle(name="udhr", reader="kdbench.data.readers.udhr.udhr", root=None, cache="c", words=40, **keys)


@pytest.mark.parametrize("kind", ["bytes", "words", "bpe"])
def test_ids_are_of_the_vocabulary_and_padding_stands_behind(kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokeniser = make_tokeniser(kind, lambda: ["the cat", "the dog, the end"], 300, "dataset.tokenizer")
    ids, cut = encode(tokeniser, HOSTILE, 16)
    assert ids.dtype == torch.int64 and ids.shape == (len(HOSTILE), 16 if kind != "words" else ids.shape[1])
    assert ids.min() >= 0 and ids.max() < tokeniser.vocab_size and cut == (kind != "words")
    assert (ids[:, 0] != 0).all(), "every row has something to read"
    assert ((ids[:, 1:] == 0) | (ids[:, :-1] != 0)).all(), "nothing follows padding"
    alone = encode(tokeniser, ["Ab c"], 16).ids[0]
    assert torch.equal(alone, ids[3, : len(alone)]) and not ids[3, len(alone) :].any()
    again = make_tokeniser(kind, lambda: ["the cat", "the dog, the end"], 300, "dataset.tokenizer")
    assert (again.name, again.vocab_size) == (tokeniser.name, tokeniser.vocab_size)
    assert torch.equal(encode(again, HOSTILE, 16).ids, ids)


def test_bytes_are_the_texts_own():
    assert (Bytes().ids("æ") - 2).astype(np.uint8).tobytes().decode() == "æ"


def test_words_are_the_most_frequent_and_the_others_unknown():
    words = Words.trained(["b a a", "c b a!"], 4)
    assert words.vocab_size == 4 and words.ids("A b c ?").tolist() == [2, 3, UNKNOWN, UNKNOWN]
    assert words.name != Words.trained(["b b a a"], 3).name


def test_a_tokenizer_of_a_file_reads_pairs_and_keeps_its_own_padding(tmp_path):
    library = pytest.importorskip("tokenizers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    for pad, shift in (("[PAD]", 0), ("zzz", 1)):
        numbers = {pad: 0, "[UNK]": 1, "[SEP]": 2, "yes": 3, "no": 4}
        made = library.Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
        made.pre_tokenizer = Whitespace()
        made.post_processor = TemplateProcessing("$A [SEP]", "$A [SEP] $B [SEP]", [("[SEP]", 2)])
        made.enable_padding()
        made.save(str(tmp_path / "tokenizer.json"))
        tokeniser = make_tokeniser(str(tmp_path), list, 9, "dataset.tokenizer")
        ids, cut = encode(tokeniser, ["yes no no", f"yes{SEPARATOR}no", "what"], 3)
        assert cut == 2 and tokeniser.vocab_size == 5 + shift
        ends = [[3, 4, 2], [3, 2, 4], [1, 2, -shift]]  # a cut text ends with what marks its end, a cut pair does not
        assert ids.tolist()[::2] == [[number + shift for number in row] for row in ends[::2]]


def test_a_kind_with_a_slip_is_looked_for_on_no_network(monkeypatch):
    library = pytest.importorskip("tokenizers")
    monkeypatch.setattr(library.Tokenizer, "from_pretrained", None)
    with pytest.raises(UserError, match=r"dataset.tokenizer = wordz: must be bytes, .* Did you mean words\?"):
        make_tokeniser("wordz", list, 100, "dataset.tokenizer")


@pytest.mark.parametrize("kind", ["nowhere.json", "./nowhere", "damaged.json"])
def test_a_tokenizer_that_is_not_there_is_refused_by_name(kind):
    pytest.importorskip("tokenizers")
    Path("damaged.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset.tokenizer = .*: must be bytes, .* bpe, a tokenizer.json"):
        make_tokeniser(kind, list, 9, "dataset.tokenizer")


def test_udhr_is_split_by_article_and_no_test_text_trains():
    source, known = udhr(), languages()
    assert len(source.classes) == len(set(source.classes)) == 32 == len(known)
    assert all(len(language.articles) == 31 for language in known) and source.val is not None
    counts = (len(source.labels), len(source.val[1]), len(source.test_labels))
    assert counts == (8823, 1992, 5503)
    assert all(len(torch.unique(labels)) == 32 for labels in (source.labels, source.val[1], source.test_labels))
    parts = [(source.inputs, source.labels), source.val, (source.test_inputs, source.test_labels)]
    texts = [{tuple(row[row > 0].tolist()) for row in inputs} for inputs, _ in parts]
    assert not texts[0] & texts[1] and not texts[2] & (texts[0] | texts[1]), "word for word"
    languages_of: dict[tuple[int, ...], set[int]] = {}
    for inputs, labels in parts:
        for row, label in zip(inputs, labels.tolist(), strict=True):
            languages_of.setdefault(tuple(row[row > 0].tolist()), set()).add(label)
    assert max(map(len, languages_of.values())) == 1
    tested = {
        piece for one in known for article in TEST_ARTICLES for text in one.articles[article] for piece in text.split()
    }
    ids, _ = encode(Bytes(), [" ".join(sorted(tested))], 10**6)
    assert set(ids.flatten().tolist()) >= set(source.test_inputs.flatten().tolist()) - {0}


def test_data_of_texts_know_their_vocabulary_and_say_what_they_cut(caplog):
    with caplog.at_level(logging.WARNING, logger="kdbench"):
        data = load(length=20)
    assert data.info == TokenInfo(32, 258, 20) and data.vocabulary == "bytes"
    assert "texts of more than 20 tokens are cut there" in caplog.text and "dataset.length" in caplog.text
    labels = torch.tensor([0, 1])
    parts = {"train": Texts(["a", "b"], labels), "test": Texts(["much longer", "c"], labels)}
    source = source_of("own", ("x", "y"), parts, Tokens())
    assert source.inputs.shape == (2, 11) == source.test_inputs.shape


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"augment": CropFlip(1)}, r"dataset.augment = CropFlip.*: must be null, or an augmentation for data of shape"),
        ({"augment": SideBySide([CropFlip(1)] * 4)}, "dataset.augment = SideBySide: must be null, or an augmentation"),
        ({"mix": {"kind": "mixup"}}, "dataset.mix.kind = mixup: must be none for token ids"),
        ({"mix": {"kind": "cutmix"}}, "dataset.mix.kind = cutmix: must be none for token ids"),
        ({"channels": 3}, "dataset.channels = 3: must be null for data that is not images"),
        ({"mean": 0.5}, "dataset.mean = 0.5: must be null for token ids"),
        ({"std": 0.5}, "dataset.std = 0.5: must be null for token ids"),
        ({"transfer": {"crops": 5}}, "dataset.transfer.crops = 5: must be 0 for data without images"),
        ({"transfer": {"extra": "x"}}, "dataset.transfer.extra = x: must be null for data without images"),
        ({"transfer": {"noise_images": 5}}, "dataset.transfer.noise_images = 5: must be 0 for data without images"),
        ({"length": 0}, "dataset.length = 0: must be"),
    ],
)
def test_what_is_for_images_alone_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load(**keys)


WORDS = [
    "dataset=udhr", "dataset.words=6", "dataset.subset=960", "dataset.length=80", "teacher=text_cnn_small",
    "student=text_cnn_small",
    "student.maps=8", "optimizer=adamw", "optimizer.lr=0.02", "schedule.epochs=2", "schedule.batch_size=32",
    "teacher.schedule.epochs=5", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def test_solo_table_and_cohort_give_the_same_student():
    live = result(train(*WORDS, "teacher.table=off", plain=True, out="live"))
    assert live["teacher"]["test/top1"] > 0.06
    table = result(train(*WORDS, "teacher.table=on", plain=True, out="table"))
    assert table["student"] == live["student"] and table["teacher"]["weights"] == live["teacher"]["weights"]
    folder = "hydra.sweep.dir=sweep"
    assert kdbench("train", "-m", "hydra/launcher=cohort", folder, *WORDS, "loss=kl,ptloss", "teacher.table=on") == 0
    found = [json.loads(path.read_text()) for path in Path("sweep").rglob("result.json")]
    assert [run["student"] for run in found if run["choices"]["loss"] == "kl"] == [live["student"]] and len(found) == 2


def test_a_run_that_was_stopped_goes_on_to_the_same_student(monkeypatch):
    words = [*WORDS, "schedule.epochs=3"]
    whole = result(train(*words, plain=True, out="whole"))
    epoch = TrainingBatches.epoch

    def broken(self, number, epochs):
        if number == 2:
            raise OSError("the power is gone")
        return epoch(self, number, epochs)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="power"):
        patched.setattr(TrainingBatches, "epoch", broken)
        train(*words, plain=True, out="cut")
    assert not Path("cut/result.json").exists()
    assert result(train(*words, plain=True, out="cut"))["student"] == whole["student"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("student=resnet8", "student = resnet8: must be a network for token data (vocab_size, length), which dataset"),
        ("teacher=mlp", "teacher = mlp: must be a network for token data (vocab_size, length), which dataset=udhr"),
        ("dataset=fake", "student = text_cnn_small: must be a network for image data (in_channels, image_size), which"),
        ("dataset/augment=crop_flip", "dataset.augment = CropFlip"),
        ("trainer.channels_last=true", "trainer.channels_last = true: must be auto or false for data that are not"),
    ],
)
def test_wrong_pairs_are_refused_by_name_before_any_work(word, said):
    typed = [*(w for w in WORDS if w.split("=")[0] != word.split("=")[0] and not w.startswith("dataset.")), word]
    with pytest.raises(UserError) as caught:
        train(*(w for w in typed if word != "student=resnet8" or w != "student.maps=8"), plain=True)
    assert str(caught.value).startswith(said) and not Path("outputs/teachers").exists()


def test_a_teacher_that_reads_other_tokens_is_refused():
    train(*WORDS, "teacher=none", "loss=ce", "schedule.epochs=1", plain=True, out="teacher")
    run = [w for w in WORDS if not w.startswith("teacher")]
    other = ["dataset.tokenizer=words", "dataset.vocab_size=258", "teacher=text_cnn_small", "teacher.run=teacher"]
    with pytest.raises(
        UserError, match=r"teacher.run = teacher: must be a network that reads the token ids of dataset"
    ):
        train(*run, *other, plain=True, out="student")


def test_a_teacher_with_a_tokenizer_of_its_own_reads_the_same_rows():
    other = ["dataset.teacher_tokenizer=words", "dataset.vocab_size=900"]
    live = result(train(*WORDS, *other, "teacher.table=off", plain=True, out="live"))
    assert live["teacher"]["test/top1"] > 0.06
    table = result(train(*WORDS, *other, "teacher.table=on", plain=True, out="table"))
    assert table["student"] == live["student"] and table["teacher"]["weights"] == live["teacher"]["weights"]
    kept = json.loads((Path(live["teacher"]["folder"]) / "network.json").read_text())
    assert kept["vocabulary"].startswith("words ") and kept["info"]["vocab_size"] == 900
    assert json.loads(Path("live/network.json").read_text())["vocabulary"] == "bytes"
    # Its own figures are those that the run of another student finds, which reads as it does.
    words = ["dataset.tokenizer=words", "dataset.vocab_size=900", f"teacher.run={live['teacher']['folder']}"]
    same = result(train(*WORDS, *words, plain=True, out="same"))
    assert same["teacher"]["test/nll"] == live["teacher"]["test/nll"]


def test_each_row_is_read_twice_and_both_say_the_same():
    data = load(teacher_tokenizer="words", subset=0.5, split_seed=3, validation=0.1)
    read, alone = data.read_by_teacher(), load(tokenizer="words", subset=0.5, split_seed=3, validation=0.1)
    for part in ("train", "transfer", "val", "test"):
        assert torch.equal(getattr(read, part).inputs, getattr(alone, part).inputs)
        assert torch.equal(getattr(read, part).rows, getattr(data, part).rows)
    assert read.info == alone.info != data.info and read.fingerprint == alone.fingerprint != data.fingerprint
    assert load(teacher_tokenizer="bytes").reading is None
    with pytest.raises(UserError, match=r"dataset.augment = .*: must be none with dataset.teacher_tokenizer"):
        load(teacher_tokenizer="words", augment=TokenDropout())


def test_dropped_tokens_are_listed_views_and_padding_stays():
    augment, ids = TokenDropout(0.5, 8), encode(Bytes(), ["a" * 40, "b" * 20, "c"], 50).ids
    assert augment.views == 8 and augment.no_op == 0 and augment.draw(9, torch.Generator()).max() < 8
    whole = augment(ids, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(whole, ids)
    seen = {tuple(augment(ids, torch.full((3,), view)).flatten().tolist()) for view in range(8)}
    assert len(seen) == 8
    dropped = augment(ids, torch.tensor([1, 2, 3]))
    assert torch.equal(dropped == 0, ids == 0) and ((dropped == ids) | (dropped == UNKNOWN)).all()
    assert 0.3 < (dropped[0, :40] == UNKNOWN).float().mean() < 0.7
    assert torch.equal(augment(ids.flip(0), torch.tensor([3, 2, 1])).flip(0), dropped), (
        "a row's own, wherever it stands"
    )
    many = augment(torch.full((4000, 9), 5).add(torch.arange(4000)[:, None]), torch.ones(4000, dtype=torch.int64))
    assert (many == UNKNOWN).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_dropped_tokens_have_tables_and_are_refused_for_images():
    words = [*WORDS, "dataset/augment=token_dropout", "dataset.augment.views=2", "schedule.epochs=1"]
    live = result(train(*words, "teacher.table=off", plain=True, out="live"))
    table = result(train(*words, "teacher.table=on", plain=True, out="table"))
    assert table["student"] == live["student"]
    with pytest.raises(
        UserError, match=r"dataset.augment = TokenDropout.*: must be null, or an augmentation for data of"
    ):
        train("dataset/augment=token_dropout", "student=mlp", "teacher=mlp", without=("dataset/augment",))
