"""Runs on texts: the folder alone is enough to read, predict, continue and export; older ones without a tokenizer."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdbench.data.readers.udhr import udhr
from kdbench.data.tokenise import SEPARATOR, Bytes, kept_tokeniser, make_tokeniser
from kdbench.deploy.student import load
from kdbench.deploy.texts import continued, perplexity
from kdbench.errors import UserError
from kdbench.results.predictions import read_predictions
from kdbench.results.result import read_result
from tests.support.shell import kdbench

TEXTS = ["Ab c", "the dog, the end", "ß\u0301 cat", "a\nb  <unk> zebra\n", ""]
QUICK = ["teacher=none", "loss=ce", "trainer.progress=none", "trainer.device=cpu"]

# What somebody writes who has only the file, numpy and onnxruntime.
STRANGER = """
import json, re, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
tokens, length = json.loads(about["tokenizer.json"]), json.loads(about["info"])["length"]
number = {word: place for place, word in enumerate(tokens["vocabulary"], start=2)}
words = re.findall(tokens["rule"].split("what matches ")[1].split("; ")[0], sys.argv[2].lower())
ids = [number.get(word, tokens["unknown"]) for word in words][:length]
logits = session.run(None, {"input": np.array([ids + [0] * (length - len(ids))])})[0]
print(json.loads(about["classes"])[int(logits.argmax())])
assert "kdbench" not in sys.modules and "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Reviews with labels, in a column that has another name than the usual ones."""
    path = tmp_path_factory.mktemp("rows") / "train.csv"
    lines = [f"{'good' if i % 2 else 'bad'} film {i},{'yes' if i % 2 else 'no'}" for i in range(60)]
    path.write_text("\n".join(["said,liked", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def words_run(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["dataset=text", f"dataset.root={rows}", "dataset.text=said", "dataset.label=liked",
             "student=text_cnn_small", "dataset.tokenizer=words", "schedule.epochs=6", "schedule.batch_size=8",
             *QUICK]  # fmt: skip
    assert kdbench("train", *words, f"hydra.run.dir={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    (folder / "train.txt").write_text("the cat sat on the mat .\nthe dog ran to the cat .\n" * 40)
    words = ["dataset=corpus", f"dataset.root={folder}", "dataset.context=3", "dataset.predicted=5", "student=lstm_lm",
             "dataset.val=0.2", "dataset.test=0.2", "student.width=16", "student.dropout=0", "optimizer=adamw",
             "optimizer.lr=0.02", "schedule.epochs=8", "schedule.batch_size=8", *QUICK]  # fmt: skip
    assert kdbench("train", *words, f"hydra.run.dir={folder}/run") == 0
    return folder / "run"


def table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"))))


def test_a_pair_is_the_same_pair_wherever_it_stands(tmp_path, capsys):
    lines = [f"{'good' if i % 3 else 'bad'} film\tseen {i}\t{'yes' if i % 3 else 'no'}" for i in range(20)]
    Path("pairs.tsv").write_text("\n".join(["first\tsecond\tlabel", *lines]) + "\n")
    words = ["dataset=text", "dataset.root=pairs.tsv", "dataset.text=[first,second]", "dataset.tokenizer=words"]
    words += ["student=text_cnn_small", "schedule.epochs=1", "schedule.batch_size=8", *QUICK, "hydra.run.dir=pairs"]
    assert kdbench("train", *words) == 0
    assert kdbench("predict", "pairs", "pairs.tsv", "--csv", "rows.csv") == 0
    assert kdbench("predict", "pairs", "--text", "good film\tseen 1", "--csv", "typed.csv") == 0
    assert table("typed.csv")[0] == table("rows.csv")[1]
    share = float(table("typed.csv")[0]["p(yes)"])
    assert load("pairs").predict(["good film\tseen 1"])[0, 1].item() == pytest.approx(share, abs=1e-5)
    capsys.readouterr()
    assert kdbench("predict", "pairs", "--text", "good film") == 1
    assert "text = good film: must be two texts with a tab between them" in capsys.readouterr().err


def test_other_texts_are_evaluated_with_the_runs_own_tokens(words_run, capsys):
    Path("new").mkdir()
    Path("new/train.csv").write_text("said,liked\nw,yes\nv,no\n")
    Path("new/test.csv").write_text("said,liked\nso bad,no\na good film of some more words,yes\nfilm,yes\n")
    assert kdbench("evaluate", str(words_run), "dataset.root=new", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kdbench("predict", str(words_run), "new/test.csv", "--csv", "p.csv") == 0
    shares = [float(row[f"p({name})"]) for row, name in zip(table("p.csv"), ("no", "yes", "yes"))]
    assert found["texts"] == 3 and found["nll"] == pytest.approx(-np.log(shares).mean(), rel=1e-4)
    capsys.readouterr()
    assert kdbench("evaluate", str(words_run), "dataset.root=new", "dataset.tokenizer=bytes") == 1
    assert "dataset.tokenizer = bytes: must be" in capsys.readouterr().err


def test_another_running_text_is_evaluated_with_the_runs_own_tokens(speaker, capsys):
    text = "the zebra sat on the dog .\n" * 7
    Path("new").mkdir()
    Path("new/train.txt").write_text("other words\n" * 20)
    Path("new/test.txt").write_text(text)
    assert kdbench("evaluate", str(speaker), "dataset.root=new", "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["nll"] == pytest.approx(perplexity(load(speaker), "", text).nll, rel=1e-4)


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "spaces", "bpe"])
def test_a_kept_tokeniser_is_the_same(kind, tmp_path):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    made = make_tokeniser(kind, lambda: TEXTS, 290, "dataset.tokenizer")
    again = kept_tokeniser(json.loads(json.dumps(made.kept())), "kept")
    assert (again.name, again.vocab_size, again.pieces) == (made.name, made.vocab_size, made.pieces)
    for text in TEXTS:
        assert np.array_equal(again.ids(text), made.ids(text))
        if kind in ("bytes", "characters", "bpe"):
            assert again.text(made.ids(text).tolist()) == text
    assert again.rows(["a cat", f"a{SEPARATOR}b"], 3)[0].tolist() == made.rows(["a cat"], 3)[0].tolist()
    (tmp_path / "tokenizer.json").write_text(json.dumps(made.kept()))
    assert make_tokeniser(str(tmp_path), list, 9, "dataset.tokenizer").name == made.name, "another run's folder is one"


@pytest.mark.parametrize(
    "wrong", [{"kind": "words"}, {"kind": "characters", "vocabulary": ["ab"]}, {"kind": "words", "vocabulary": [1]}, {}]
)
def test_a_damaged_tokeniser_is_refused(wrong):
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"kept: (damaged|no tokenizer)"):
        kept_tokeniser(wrong, "kept")


def test_words_that_are_spelled_as_they_stood():
    made = make_tokeniser("spaces", lambda: ["a b\nc\n"], 9, "dataset.tokenizer")
    assert made.text(made.ids("a b\nc x\n").tolist()) == "a b\nc <unk>\n"
    assert Bytes().text([0, 99, 1, 100]) == "ab"


def test_a_moved_folder_answers_as_the_run_did_without_its_data(words_run, rows, tmp_path):
    shutil.copytree(words_run, tmp_path / "moved")
    hidden = rows.with_suffix(".away")
    rows.rename(hidden)
    try:
        student = load(tmp_path / "moved")
        assert student.predict(["a good film", "BAD film 99!"]).argmax(1).tolist() == [1, 0]
    finally:
        hidden.rename(rows)
    assert student.classes == ("no", "yes") and torch.equal(student.raw("bad film"), load(words_run).raw("bad film"))


def test_answers_on_the_runs_own_texts_are_those_that_it_kept(tmp_path):
    words = ["dataset=udhr", "dataset.words=40", "dataset.subset=200", "student=text_cnn_small", "schedule.epochs=1"]
    assert kdbench("train", *words, *QUICK, f"hydra.run.dir={tmp_path}") == 0
    kept, source = read_predictions(tmp_path), udhr(words=40)
    texts = [Bytes().text(ids.tolist()) for ids in source.test_inputs[:50]]
    (tmp_path / "mine.txt").write_text("\n".join(texts), encoding="utf-8")
    assert kdbench("predict", str(tmp_path), str(tmp_path / "mine.txt"), "--csv", "p.csv") == 0
    found = table("p.csv")
    assert [row["input"] for row in found] == texts
    assert kept is not None and [source.classes[place] for place in kept.answer[:50]] == [row["class"] for row in found]


def test_texts_come_from_rows_lines_files_the_shell_and_the_line(words_run, capsys, monkeypatch):
    Path("new.csv").write_text("id,said\n1,good film\n2,bad film\n")
    Path("new.jsonl").write_text('{"said": "good film"}\n{"said": "bad film"}\n')
    Path("new.txt").write_text("good film\n\nbad film\n")
    Path("folder").mkdir()
    Path("folder/a.txt").write_text("good\nfilm")
    Path("folder/b.txt").write_text("bad film " * 99)
    for given in (["new.csv"], ["new.jsonl"], ["new.txt"], ["folder"], ["--text", "good film", "--text", "bad film"]):
        assert kdbench("predict", str(words_run), *given, "--jsonl", "p.jsonl") == 0
        lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
        assert [line["class"] for line in lines] == ["yes", "no"] and abs(
            lines[0]["p(yes)"] + lines[0]["p(no)"] - 1
        ) < 1e-4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("good film ä\n".encode())))
    capsys.readouterr()
    assert kdbench("predict", str(words_run), "-", "--top", "1") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["good", "film", "ä", "yes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photo.png"], "a file of texts (.csv"),
        ([], "one file or folder"),
        (["a.txt", "--text", "b"], "one file or folder"),
        (["--text", "a", "--generate", "5"], "is no language model"),
        (["other.csv"], "dataset.text = said: must be a column"),
    ],
)
def test_what_cannot_be_is_refused(words_run, words, said, capsys):
    Path("other.csv").write_text("a,b\n1,2\n")
    assert kdbench("predict", str(words_run), *words) == 1
    assert said in capsys.readouterr().err


def test_an_older_run_learns_its_words_again_or_says_that_it_cannot(words_run, rows, tmp_path, caplog):
    old = tmp_path / "old"
    shutil.copytree(words_run, old)
    (old / "tokenizer.json").unlink()
    assert torch.equal(load(old).raw("a good film"), load(words_run).raw("a good film"))
    config = (old / "config.yaml").read_text()
    (old / "config.yaml").write_text(config.replace(str(rows), "gone.csv"))
    student = load(old)
    assert (
        "kept no tokenizer.json, and it cannot be learnt again: " in caplog.text and "gone.csv: must be" in caplog.text
    )
    with pytest.raises(UserError, match=r"its tokenizer\.json is not there, so that it reads no text"):
        student.predict(["a good film"])
    assert student.predict([torch.ones(student.info[-1], dtype=torch.int64)]).shape == (1, 2)


def test_another_tokeniser_beside_the_weights_is_refused(words_run, tmp_path):
    shutil.copytree(words_run, tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text(json.dumps(Bytes().kept()))
    with pytest.raises(UserError, match="not the tokens that the network was trained with"):
        load(tmp_path / "run")


def test_an_exported_file_carries_its_words_and_a_stranger_can_use_it(words_run, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    assert kdbench("export", str(words_run), "--onnx", "--out", str(tmp_path)) == 0
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == load(words_run).speaks().kept()
    assert "the ids of tokenizer.json" in json.loads((tmp_path / "export.json").read_text())["input"]
    command = [sys.executable, "-c", STRANGER, str(tmp_path / "text_cnn_small.onnx"), "A GOOD film!"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "yes\n", done.stderr


def test_a_language_model_measures_texts_and_continues_them(speaker, tmp_path, capsys):
    student, result = load(speaker), read_result(speaker)
    text = (speaker.parent / "train.txt").read_text()
    test = text[text.find("\n", int(len(text) * 0.8)) + 1 :]
    found = perplexity(student, "test", test)
    assert found.ppl == pytest.approx(result.figure("test/ppl"), rel=1e-5) and found.unknown == 0
    assert continued(student, "the dog ran", 5) == " to the cat .\n"
    assert kdbench("predict", str(speaker), "--text", "the dog", "--generate", "2") == 0
    assert capsys.readouterr().out.startswith("the dog ran to")
    (tmp_path / "a.txt").write_text(test)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert kdbench("predict", str(speaker), str(tmp_path), "--csv", "p.csv") == 1
    first, second = table("p.csv")
    assert float(first["ppl"]) == pytest.approx(found.ppl, rel=1e-5) and "UTF-16" in second["problem"]
    assert kdbench("predict", str(speaker), "--text", "zebra the cat") == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[3:5] == ["4", "1"]


def test_a_language_model_is_exported_with_blocks_of_its_own_text(speaker, tmp_path):
    assert kdbench("export", str(speaker), "--torchscript", "--safetensors", "--out", str(tmp_path)) == 0
    about = json.loads((tmp_path / "export.json").read_text())
    assert "test inputs" in about["checked on"] and about["files"][0]["difference"] == 0
