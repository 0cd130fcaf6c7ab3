"""kdbench status: a sweep seen from beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.engine.learner import Learner
from tests.support.shell import kdbench

POINTS = [
    "dataset=fake", "dataset.n=32", "dataset.size=8", "teacher=none", "loss=ce", "student=mlp", "schedule.epochs=2",
    "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


@pytest.mark.parametrize("launcher", ["basic", "cohort"])
def test_a_sweep_while_it_runs_and_after_it(launcher, monkeypatch, capsys):
    seen: list[dict] = []
    begin = Learner.begin_epoch

    def looked(self, epoch):
        begin(self, epoch)
        if epoch == 1:
            capsys.readouterr()
            assert kdbench("status", "--json") == 0
            seen.append(json.loads(capsys.readouterr().out))

    monkeypatch.setattr(Learner, "begin_epoch", looked)
    bad = "schedule.lr=0.1,1e15"
    assert kdbench("train", "-m", *POINTS, f"hydra/launcher={launcher}", bad, "seed=0") == 1
    assert seen[0]["sweeps"] == 1
    assert seen[0]["running"] == (1 if launcher == "basic" else 2) and seen[0]["done"] == 0
    assert seen[0]["running"] + seen[0]["waiting"] == 2
    running = [point for point in seen[0]["points"] if point["state"] == "running"]
    assert running[0]["epochs"] == 2 and running[0]["process"] and running[0]["host"]
    capsys.readouterr()
    assert kdbench("status") == 0
    said = capsys.readouterr().out
    assert said.startswith("2 runs: 1 done, 1 failed")
    assert "the loss is not a finite number" in said
    assert kdbench("status", "outputs", "--watch", "0.1") == 0  # nothing runs: it ends
    (failure,) = Path("outputs").rglob("failure.json")
    there = []
    monkeypatch.setattr(
        Learner, "begin_epoch", lambda self, epoch: begin(self, epoch) or there.append(failure.exists())
    )
    assert kdbench("train", "-m", *POINTS, bad, "seed=0") == 1
    assert there and not any(there) and failure.exists(), "begun again, it has not failed yet"


def test_what_cannot_be_asked(capsys):
    assert kdbench("status", "nowhere") == 1
    assert kdbench("status", ".", "--watch", "-3") == 1
    assert kdbench("status", ".", "--watch", "--json") == 1
    said = capsys.readouterr().err
    assert "nowhere: there is no such folder" in said and "--watch = -3.0" in said and "--json" in said
    assert kdbench("status", ".") == 0
    assert capsys.readouterr().out == "0 runs: none\n"
