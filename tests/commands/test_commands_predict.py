"""`kdbench predict`: own pictures to a table."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from tests.support.shell import kdbench


def test_a_folder_becomes_a_table(photos, photo_run, capsys):
    assert kdbench("predict", str(photo_run), str(photos / "red")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[0].split()[:3] == ["input", "class", "%"]
    assert all(line.split()[1] == "red" for line in lines[1:])


def test_csv_has_every_class_and_names_what_is_broken(photos, photo_run, capsys):
    shutil.copytree(photos, "mine")
    Path("mine/blue/broken.png").write_text("no picture")
    assert kdbench("predict", str(photo_run), "mine", "--csv", "out/p.csv") == 1
    assert "mine/blue/broken.png" in capsys.readouterr().err
    with open("out/p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 41 and set(rows[0]) == {"input", "class", "probability", "p(blue)", "p(red)", "problem"}
    right = [row for row in rows if row["class"] and row["class"] in row["input"]]
    assert len(right) >= 38 and sum(not row["class"] for row in rows) == 1
    assert all(abs(float(row["p(blue)"]) + float(row["p(red)"]) - 1) < 1e-4 for row in right)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no such folder or file"),
        ([".", "--top", "0"], "--top = 0"),
        (["."], "no images in"),
        (["--text", "red"], "was trained on images"),
        (["mine.csv", "--csv", "./mine.csv"], "--csv = mine.csv: must be another file than the input"),
    ],
)
def test_what_cannot_be_is_refused(photo_run, words, said, capsys):
    Path("mine.csv").write_text("text\n")
    assert kdbench("predict", str(photo_run), *words) == 1
    assert said in capsys.readouterr().err
