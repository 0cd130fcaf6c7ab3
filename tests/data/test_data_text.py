"""Texts of one's own: files of rows, folders, GLUE's files by name, and what is said of those that cannot be."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import pytest

from kdbench.data.readers.text import lines_in, text, texts_in
from kdbench.data.tokenise import SEPARATOR
from kdbench.errors import UserError
from kdbench.types import TokenInfo
from tests.data.test_data_configs import node
from tests.support.procedures import result, train

QUOTED = 'bad, "so"'
ROWS = [(f"text {'good' if n % 3 else QUOTED} number {n}", "yes" if n % 3 else "no") for n in range(30)]


def written(source) -> list[str]:
    """The training texts of a source of bytes."""
    return [bytes((row[row > 0] - 2).tolist()).decode() for row in source.inputs]


def csv_file(path: str, header: str = "label,text", rows=ROWS) -> str:
    lines = [f'{label},"{words.replace(chr(34), chr(34) * 2)}"' for words, label in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join([header, *lines] if header else lines) + "\n", encoding="utf-8-sig")
    return path


def json_file(path: str, rows=ROWS) -> str:
    Path(path).write_text("".join(json.dumps({"text": words, "label": label}) + "\n" for words, label in rows))
    return path


def test_a_csv_file_is_read_by_the_usual_names_and_a_test_set_is_set_aside():
    source = text(csv_file("own.csv"), "cache")
    assert source.classes == ("no", "yes") and len(source.labels) == 24 and len(source.test_labels) == 6
    assert source.test_labels.sum() == 4 and source.tokeniser.name == "bytes", "stratified"
    assert set(written(source)) < {words for words, _ in ROWS}
    again = text("own.csv", "cache", val=5)
    assert (again.test_inputs == source.test_inputs).all() and again.val is not None and len(again.val[1]) == 5


def test_all_kinds_of_files_hold_the_same_texts():
    expected = text(csv_file("a.csv"), "cache")
    tabs = Path("a.tsv")
    tabs.write_text("label\ttext\n" + "".join(f"{label}\t{words}\n" for words, label in ROWS))
    made = [str(tabs), json_file("a.jsonl"), csv_file("b.csv", "CLASS,Sentence")]
    if pa := pytest.importorskip("pyarrow"):
        import pyarrow.parquet as pq

        words, labels = zip(*ROWS, strict=True)
        pq.write_table(pa.table({"text": words, "label": labels}), "a.parquet")
        made.append("a.parquet")
    for path in made:
        source = text(path, "cache")
        assert (source.inputs == expected.inputs).all() and (source.labels == expected.labels).all(), path
    plain = text(csv_file("c.csv", ""), "cache", text="1", label="0")
    assert (plain.inputs == expected.inputs).all(), "without a header columns have numbers"


def test_a_folder_of_files_has_its_parts_by_name_and_pieces_are_joined():
    Path("set/data").mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", ROWS[:9]), ("train-00001-of-00002", ROWS[9:]), ("dev", ROWS[:6])):
        json_file(f"set/data/{name}.jsonl", rows)
    source = text("set", "cache")
    assert len(source.labels) == 30 and source.val is None and len(source.test_labels) == 6
    json_file("set/data/test.jsonl", ROWS[:4])
    source = text("set", "cache")
    assert len(source.test_labels) == 4 and source.val is not None and len(source.val[1]) == 6


def test_a_folder_of_class_folders():
    for part in ("train", "test"):
        for number, (words, label) in enumerate(ROWS if part == "train" else ROWS[:5]):
            Path(f"set/{part}/{label}").mkdir(parents=True, exist_ok=True)
            Path(f"set/{part}/{label}/{number}.txt").write_text(words)
    source = text("set", "cache")
    assert source.classes == ("no", "yes") and len(source.labels) == 30 and len(source.test_labels) == 5
    assert len(text("set/train", "cache").labels) == 24, "without parts"


GLUE = {
    "cola": {"train.tsv": "gj04\t1\t\tFine so\ngj04\t0\t*\tBad so\n", "dev.tsv": "gj04\t1\t\tFine\n",
             "test.tsv": "index\tsentence\n0\tWhat\n"},
    "sst2": {"train.tsv": 'sentence\tlabel\nfine "so\t1\nbad\t0\n', "dev.tsv": "sentence\tlabel\nfine\t1\n"},
    "rte": {"train.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tc\tnot_entailment\n",
            "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
            "test.tsv": "index\tsentence1\tsentence2\n0\ta\tb\n"},
    "mrpc": {"msr_paraphrase_train.txt": "\ufeffQuality\t#1 ID\t#1 String\t#2 String\n1\t1\ta\tb\n0\t1\ta\tc\n",
             "msr_paraphrase_test.txt": "Quality\t#1 ID\t#1 String\t#2 String\n1\t1\ta\tb\n"},
    "mnli": {"train.tsv": "sentence1\tsentence2\tlabel1\tgold_label\na\tb\tx\tneutral\na\tc\tx\tentailment\n",
             "dev_matched.tsv": "sentence1\tsentence2\tgold_label\na\tb\tneutral\n",
             "dev_mismatched.tsv": "sentence1\tsentence2\tgold_label\na\tb\tneutral\n",
             "test_matched.tsv": "sentence1\tsentence2\na\tb\n", "test_mismatched.tsv": "sentence1\tsentence2\na\tb\n"},
    "boolq": {"train.jsonl": '{"question": "a", "passage": "b", "label": true}\n'
                             '{"question": "a", "passage": "c", "label": false}\n',
              "val.jsonl": '{"question": "a", "passage": "b", "label": true}\n',
              "test.jsonl": '{"question": "a", "passage": "b"}\n'},
    "ag_news": {"train.csv": '"3","title","words"\n"1","title","more"\n', "test.csv": '"3","title","words"\n'},
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_benchmarks_are_read_as_they_are_published(name, caplog):
    for file, content in GLUE[name].items():
        Path(file).write_text(content, encoding="utf-8")
    keys = node(f"+dataset={name}", "dataset.root=.")
    own = {key: keys[key] for key in ("text", "label", "files", "test", "val")}
    with caplog.at_level(logging.WARNING, logger="kdbench"):
        source = text(".", "cache", **own)
    assert len(source.labels) == 2 and len(source.test_labels) == 1 and source.val is None
    assert ("is the test set" in caplog.text) == (name not in ("mrpc", "ag_news"))
    pair = {"rte": "a␟b", "mnli": "a␟b", "boolq": "a␟b", "mrpc": "a␟b", "cola": "Fine so", "sst2": 'fine "so'}
    assert SEPARATOR == "␟" and written(source)[0] == pair.get(name, "words")


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("label,text\nyes,a\nno,b,c\n", {}, "own.csv: line 3 has 3 columns, the first one 2"),
        ("label,text\n", {}, "own.csv: it holds no rows"),
        ("", {}, "own.csv: it holds no rows"),
        ("label,words,more\nyes,a,b\n", {}, r"dataset.text = .*: must be a column of own.csv: label, words, more"),
        ("label,text\nyes,a\nno,b\n", {"text": "txt"}, "dataset.text = txt: must be a column of own.csv: label, text"),
        ("label,text\nyes,a\nno,b\n", {"label": "klass"}, "dataset.label = klass: must be a column of own.csv"),
        ("label,text\nyes,a\nyes,b\nyes,c\n", {"test": 2}, "dataset.label = yes: must be two classes or more"),
        (
            "label,text\nyes,a\nno,b\nno,b\nyes,b\n,c\n",
            {"test": 2},
            "dataset.label = nothing in 1 rows: must be one class",
        ),
        ("label,text\nyes,a\nno,b\n", {}, r"dataset.test = 0.2: must be"),
        ("label,text\nyes,a\nno,b\n", {"text": ["text", "text", "label"]}, "dataset.text = .*: must be a column, or"),
        ("text,text\nyes,a\nno,b\n", {}, "own.csv: two of its columns are called 'text'"),
        (
            'text,label\nfine,a\n"odd,a\nlost,b\n"odd" too,b\nfine,b\n',
            {},
            "own.csv: lines 3 to 5 would be one row, since quotation marks in them do not pair",
        ),
        ("wort,art\na,b\n", {}, r"own.csv: 0, 1 by number, since its first line names none .*\(wort, art\)"),
        ("text,label\na,yes\nb,no\n", {"text": "0", "label": "1"}, r"dataset.text = 0: must be the name of a column"),
        (
            "text,label\n" + "".join(f"a{i},{i}.5\n" for i in range(20)),
            {},
            r"dataset.label = 20 values in 20 rows: must be classes, of which each has several",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(content, keys, message):
    Path("own.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        text("own.csv", "cache", **keys)


def test_the_first_line_of_a_file_without_a_header_is_said(caplog):
    Path("own.csv").write_text("wort,art\n" + "a,yes\nb,no\n" * 9)
    with caplog.at_level(logging.INFO, logger="kdbench"):
        source = text("own.csv", "cache", text="0", label="1")
    assert ": its first line is a row like the others, and columns have numbers: 0 'wort', 1 'art'" in caplog.text
    assert source.classes == ("art", "no", "yes")


def test_a_table_to_predict_is_not_read_with_its_header_as_a_row():
    Path("own.csv").write_text("text\na fine film\n")
    with pytest.raises(UserError, match=r"the first line of own.csv has them"):
        texts_in(Path("own.csv"), "0")
    assert texts_in(Path("own.csv"), "text") == ["a fine film"]


def test_texts_of_several_lines_are_one_row_each():
    Path("own.csv").write_text('text,label\n"a\n""b"", c\n",x\n"d" e,y\n"f\r\ng",x\n', newline="")
    assert texts_in(Path("own.csv"), "text") == ['a\n"b", c\n', "d e", "f\r\ng"]


def test_only_an_end_of_line_ends_a_text():
    assert lines_in("a\u2028b\x0cc\r\n\nd\x85e\n") == ["a\u2028b\x0cc", "d\x85e"]


def test_the_folder_above_a_folder_of_texts_names_it():
    Path("GLUE/SST-2").mkdir(parents=True)
    Path("GLUE/SST-2/train.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(UserError, match=r"dataset.root = GLUE: must be .*GLUE/SST-2 has a train file"):
        text("GLUE", "cache")


def test_files_that_are_none_are_refused_by_name():
    for content, message in ((b"\xff\xfe\x00", "own.jsonl: cannot be read"), (b"[1]\n", "line 1 is no object"),
                             (b"{}{\n", "line 1 is no JSON")):  # fmt: skip
        Path("own.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            text("own.jsonl", "cache")
    for root, message in (("nowhere.csv", "dataset.root = nowhere.csv: must be a file"), ("", "dataset.root = "),
                          (None, "dataset.root = null"), (".", "dataset.root = .*a folder with a train file"),
                          ("hf://datasets/only", "dataset.root = hf://datasets/only: must be")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            text(root, "cache")
    Path("set").mkdir()
    for name in ("train_a", "train_b"):
        csv_file(f"set/{name}.csv")
    with pytest.raises(UserError, match="train_a and train_b in set would both be the train set"):
        text("set", "cache")
    assert len(text("set", "cache", files={"train": "*_a*"}).labels) == 24


def test_a_dataset_of_the_hub_is_fetched_once_and_named_where_it_cannot_be_had(monkeypatch):
    asked = {}

    def snapshot_download(name, **given):
        asked.update(given, name=name)
        if name != "owner/name":
            raise ConnectionError("no network")
        csv_file("snapshot/part/train.csv")
        return "snapshot"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert len(text("hf://datasets/owner/name/part", "cache", download=False).labels) == 24
    assert asked["local_files_only"] and "part/*.parquet" in asked["allow_patterns"]
    with pytest.raises(UserError, match=r"dataset.root = hf://datasets/owner/other: must be .* no network"):
        text("hf://datasets/owner/other", "cache")


def test_own_texts_train_from_the_command_line():
    csv_file("own.csv", rows=ROWS * 4)
    words = ["dataset=text", "dataset.root=own.csv", "dataset.tokenizer=words", "dataset.length=6", "teacher=none",
             "student=bilstm_small", "loss=ce", "optimizer=adamw", "optimizer.lr=0.01", "schedule.epochs=8",
             "schedule.batch_size=16", "trainer.device=cpu", "trainer.progress=none"]  # fmt: skip
    found = result(train(*words, plain=True))
    assert found["last"]["test/top1"] == 1.0
    assert json.loads(Path("run/network.json").read_text())["info"] == TokenInfo(2, 39, 6)._asdict()


def test_a_column_is_not_text_and_label_at_once_nor_text_twice():
    csv_file("t.csv")
    for column in ("label", ["text", "text"]):
        with pytest.raises(UserError, match=r"dataset.text = .*: must be columns that differ, and none"):
            text("t.csv", "cache", text=column)


@pytest.mark.parametrize(("encoding", "said"), [("utf-16", "UTF-16"), ("cp1252", r"Windows-1252 \(Latin-1\)")])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_file_in_another_encoding_is_refused_with_what_makes_it_utf8(encoding, said, name):
    line = '{"text": "caf\u00e9", "label": 1}\n' if name.endswith("l") else "text,label\ncaf\u00e9,1\n"
    Path(name).write_bytes((line * 9).encode(encoding))
    remedy = rf"it looks like {said}. iconv -f .* {name} > t.utf8"
    with pytest.raises(UserError, match=rf"{name}: cannot be read as UTF-8 text: {remedy}"):
        text(name, "cache")
