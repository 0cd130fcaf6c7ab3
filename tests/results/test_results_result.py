"""RunResult: what is written is read again; old, newer, damaged and foreign files."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdbench.errors import UserError
from kdbench.results.read import Run
from kdbench.results.result import FILE_FORMAT, RESULT, NetworkResult, RunResult, StageResult, read_result

MEMBER = NetworkResult("mlp", "teachers/a", 10, "ab", {"test/top1": 0.5})
WHOLE = RunResult(
    choices={"loss": "kl"}, config={"loss.tau": 4.0, "student.hidden": [6, 6]},
    student=NetworkResult("mlp", None, 12, "cd"), last={"epoch": 3.0, "test/top1": 0.5}, best={"val/top1": 0.25},
    teacher=NetworkResult("ensemble", None, 20, "ef", {"test/top1": 0.5, "members/test/top1": 0.25}, (MEMBER, MEMBER)),
    name="run", kdbench="0.2", finished="2026-01-01T00:00:00Z", hash="12", overrides=["loss=kl"], tags=["a"],
    formula="KL", seed=3, figures={"gain/test/top1": None, "offset": 2.5}, images={"test": 360}, device="cpu",
    precision="fp32", versions={"torch": "2.9"}, seconds=1.5, images_per_second=10.0,
    stages=(StageResult("1-a", "stages/1-a", None, "mlp", "CE", 3, 0.5, {"test/top1": 0.25}),),
    tables={"covering": [{"classes": ["a"]}]},
)  # fmt: skip
FIRST_EDITION: dict[str, Any] = {
    "kdbench": "0.1.0", "name": "a", "finished": "2026-01-01T00:00:00Z", "hash": "ab", "choices": {"loss": "kl"},
    "config": {"loss.tau": 4.0}, "overrides": [], "tags": [], "formula": "KL", "seed": 0,
    "teacher": {"name": "resnet20", "folder": None, "parameters": 9, "weights": "aa", "val/top1": 0.9},
    "student": {"name": "resnet8", "parameters": 5, "weights": "bb"}, "last": {"epoch": 30.0, "test/top1": 0.875},
    "best": None, "figures": {}, "images": {"train": 100, "val": 0, "test": 360}, "device": "cpu",
    "precision": "fp32", "versions": {"kdbench": "0.1.0"}, "seconds": 12.0, "images_per_second": 99.0,
}  # fmt: skip


def put(folder: Path, content: Any) -> Path:
    (folder / RESULT).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def test_what_is_written_is_read_again(tmp_path):
    WHOLE.write(tmp_path)
    assert json.loads((tmp_path / RESULT).read_text())["format"] == FILE_FORMAT
    assert read_result(tmp_path) == WHOLE


def test_the_first_editions_files_are_still_read(tmp_path):
    found = read_result(put(tmp_path, FIRST_EDITION))
    assert found.teacher == NetworkResult("resnet20", None, 9, "aa", {"val/top1": 0.9})
    assert (found.student.weights, found.last["test/top1"], found.images["test"]) == ("bb", 0.875, 360)
    assert found.stages == () and found.best is None
    minimal = {key: FIRST_EDITION[key] for key in ("choices", "config", "student", "last")}
    assert read_result(put(tmp_path, minimal)).teacher is None


def test_what_is_not_known_is_kept(tmp_path):
    added = {**FIRST_EDITION, "energy": {"joules": 5}}
    added["teacher"] = {**FIRST_EDITION["teacher"], "epochs": [1, 2]}
    found = read_result(put(tmp_path, added))
    replace(found, seed=1).write(tmp_path)
    again = json.loads((tmp_path / RESULT).read_text())
    assert again["energy"] == {"joules": 5} and again["teacher"]["epochs"] == [1, 2]


@pytest.mark.parametrize("version", [FILE_FORMAT + 1, "three"])
def test_a_newer_format_is_refused_by_one_sentence(tmp_path, version):
    with pytest.raises(UserError, match=f"{RESULT}: format {version}, written by a newer kdbench"):
        read_result(put(tmp_path, {**FIRST_EDITION, "format": version}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not a readable JSON file"),
        ('{"choices": {', "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ("\x00\x01", "not a readable JSON file"),
        ("null", "it lacks choices, config, student, last"),
        ("[1]", "it lacks choices"),
        ("3", "it lacks choices"),
        ({**FIRST_EDITION, "last": None}, "it lacks last"),
        ({**FIRST_EDITION, "last": {"test/top1": "high"}}, "test/top1 is str"),
        ({**FIRST_EDITION, "last": {"test/top1": 9.99}}, "test/top1 is 9.99, no share"),
        ({**FIRST_EDITION, "last": {"test/top1": float("nan")}}, "test/top1 is nan, no share"),
        ({**FIRST_EDITION, "last": {"test/top1": True}}, "test/top1 is bool"),
        ({**FIRST_EDITION, "last": {"test/nll": 10**400}}, "test/nll is a number of 401 digits"),
        ({**FIRST_EDITION, "best": [1]}, "best is list"),
        ({**FIRST_EDITION, "seconds": "long"}, "seconds is str"),
        ({**FIRST_EDITION, "teacher": "resnet20"}, "teacher is str"),
        ({**FIRST_EDITION, "teacher": {"name": 3}}, "name is int"),
        ({**FIRST_EDITION, "stages": [3]}, "StageResult is int"),
        ({**FIRST_EDITION, "figures": None}, "figures is NoneType"),
    ],
)
def test_damaged_and_foreign_files_are_one_sentence_that_names_them(tmp_path, content, words):
    with pytest.raises(UserError) as raised:
        read_result(put(tmp_path, content))
    assert str(raised.value).startswith(str(tmp_path / RESULT)) and words in str(raised.value)


def test_no_file_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_result(tmp_path)
    (tmp_path / RESULT).write_bytes(b'{"choices": "\xff\xfe"}')
    with pytest.raises(UserError, match="not a readable JSON file"):
        read_result(tmp_path)


def test_an_attribute_that_there_is_not_is_told_with_what_there_is():
    made = RunResult(choices={}, config={}, student=NetworkResult(), last={"test/top1": 0.9})
    with pytest.raises(AttributeError, match=r"has no attribute 'formulas'\. Did you mean \.formula\?"):
        _ = made.formulas
    with pytest.raises(AttributeError, match=r"'test_top1'\. Figures are had by name: \.figure\('last'\)"):
        _ = made.test_top1
    with pytest.raises(AttributeError, match=r"Run has no attribute 'student'\. What a run found is in \.result\."):
        _ = Run(Path(), made).student
    for one in (made, Run(Path(), made)):
        assert pickle.loads(pickle.dumps(one)) == one and copy.deepcopy(one) == one and not hasattr(one, "_x")


def test_figures_by_name():
    assert WHOLE.figure("last") == WHOLE.figure("test/top1") == 0.5
    assert WHOLE.figure("best") is None and WHOLE.figure("best/val/top1") == 0.25
    assert WHOLE.figure("offset") == 2.5 and WHOLE.figure("gain/test/top1") is None and WHOLE.figure("none") is None
    assert all(name == "gain/test/top1" or WHOLE.figure(name) is not None for name in WHOLE.figure_names())
