"""`kdbench reproduce` and `kdbench claims`: the papers' sets of runs, from wherever kdbench is installed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.shell import kdbench


def test_every_paper_is_listed(repository, capsys):
    assert kdbench("reproduce") == 0
    out = capsys.readouterr().out
    for script in (repository / "scripts").glob("reproduce_*.sh"):
        assert f"{script.stem.removeprefix('reproduce_')} " in out


@pytest.fixture
def shown(monkeypatch):
    """In place of the kdbench that scripts call: what shows how it was called."""
    stub = Path("bin/kdbench")
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "ran: $*"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(Path("bin/python").absolute()))
    monkeypatch.setenv("PATH", os.environ["PATH"])


def test_a_papers_script_gets_the_words(shown, capfd):
    assert kdbench("reproduce", "ren2022", "small", "seed=7") == 0
    out = capfd.readouterr().out
    assert "ran: train -m experiment=ren2022" in out and out.count("seed=7") >= 1


def lines_of(paper: str, *words: str, capfd) -> list[str]:
    assert kdbench("reproduce", paper, *words) == 0
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith("ran: train")]


def test_runs_of_a_few_steps_get_small_numbers_and_a_folder_of_their_own(shown, capfd):
    lines = lines_of("kim2021", "debug=smoke", capfd=capfd)
    assert any("teacher.stop_epoch=1,2 " in line for line in lines)
    assert all(line.endswith("debug=smoke") and "/kim2021-small-debug" in line for line in lines)
    lines = lines_of("kim2021", "seed=0", capfd=capfd)
    assert any("teacher.stop_epoch=9,60 " in line for line in lines) and "debug" not in " ".join(lines)


def test_what_is_of_texts_and_of_certain_networks_keeps_them(shown, capfd):
    lines = lines_of("kim2016", "debug=smoke", "seed=0", capfd=capfd)
    assert lines and all("debug=short seed=0" in line for line in lines)
    found = {"hidden=" in line: line.split()[-1] for line in lines_of("hinton2015", "debug=smoke", capfd=capfd)}
    assert found == {True: "debug=short", False: "debug=smoke"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kim202"], "Did you mean kim2021"),
        (["kim2021", "tiny"], "size = tiny"),
        (["kim2021", "small", "x"], "x: not of"),
    ],
)
def test_what_there_is_not_is_refused(words, said, capsys):
    assert kdbench("reproduce", *words) == 1
    assert said in capsys.readouterr().err


def test_claims_says_what_was_not_run(capsys):
    assert kdbench("claims", "nowhere") == 1
    captured = capsys.readouterr()
    assert "kim2021: not run" in captured.err and captured.err.endswith("no claim has its runs below nowhere\n")
    assert captured.out == ""  # no table of no rows
