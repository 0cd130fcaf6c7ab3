"""`kdbench bench` as it is typed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from kdbench import cli

TINY = ["dataset=fake", "dataset.n=64", "dataset.size=8", "teacher=resnet8", "student=resnet8",
        "schedule.batch_size=32", "trainer.device=cpu"]  # fmt: skip

PEER = f"""{sys.executable} -c "print('ready', flush=True); [print(int(n) / 8, flush=True) for n in open(0)]" """


@pytest.fixture
def kdbench(monkeypatch, capsys, repository):
    path = os.pathsep.join([str(repository), str(repository / "kdbench/_hydra")])
    monkeypatch.setenv("PYTHONPATH", path)  # for the plain loop's own process

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", *words])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_plain_loop_takes_turns_with_the_training(kdbench):
    code, out, _ = kdbench(
        "bench", "--baseline", "--seconds=0.5", "--workers=0", f"--against=peer={PEER}", "--json=figures.json", *TINY
    )
    assert code == 0
    assert "plain loop / teacher's logits from a table" in out and "plain loop / teacher asked for every batch" in out
    figures = json.loads(Path("figures.json").read_text())
    assert figures["configuration"]["student"] == "resnet8" and figures["machine"]["device"] == "cpu"
    assert figures["steps"]["peer"]["median"] == 0.125
    assert all(step["median"] > 0 and step["n"] == 3 for step in figures["steps"].values())
    assert not Path("outputs/runs").exists() and not Path("outputs/teachers").exists()  # nothing was trained


def test_mistakes_are_messages(kdbench):
    code, _, err = kdbench("bench", "--members=0")
    assert code == 1 and "--members = 0: must be in [1, 1000]" in err
    code, _, err = kdbench("bench", "--against=nothing")
    assert code == 1 and "--against = nothing: must be NAME=COMMAND" in err
    code, _, err = kdbench("bench", "--against=mine=python 'mine.py")
    assert code == 1 and "--against = python 'mine.py: must be words as a shell parts them: no closing quotation" in err
    code, _, err = kdbench("bench", "studnet=resnet8")
    assert code == 1 and "studnet" in err
    code, out, _ = kdbench("bench", "--help")
    assert code == 0 and "--baseline" in out
