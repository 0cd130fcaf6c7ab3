"""`kdbench search-epsilon` for real, and the training that uses what it found."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex
import sys
from pathlib import Path

import pytest

from kdbench import cli
from kdbench.losses.ptloss import PTLoss

TINY = ["debug=smoke", "teacher=mlp", "student=mlp", "trainer.progress=none"]


@pytest.fixture
def kdbench(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", *words])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    handlers = logging.getLogger().handlers[:]
    yield run
    logging.getLogger().handlers[:] = handlers  # a run's handlers write to its folder and to the captured stdout


def test_it_writes_what_train_reads(kdbench, monkeypatch):
    asked = []
    calibrate = PTLoss.calibrate
    monkeypatch.setattr(PTLoss, "calibrate", lambda self, *given: asked.append(given) or calibrate(self, *given))
    code, out, err = kdbench("search-epsilon", *TINY, "loss.search.count=12", "loss.tau=2")
    assert code == 0, err
    ((logits, label),) = asked
    (folder,) = Path("outputs/epsilon/fake").iterdir()
    names = ["candidates.csv", "candidates.png", "curves.png", "epsilon.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / "epsilon.json").read_text())
    assert record["images"]["all"] == len(label) == len(logits) == 24  # the validation split, not the 48 test images
    assert record["count"] == 12 and record["tau"] == 2 and record["teacher"]["name"] == "mlp"
    assert not re.search(r"test", json.dumps(record))
    rows = list(csv.DictReader((folder / "candidates.csv").open()))
    assert len(rows) == 12 and rows[0]["origin"] == record["origin"]
    assert float(rows[0]["eps_1"]) == pytest.approx(record["epsilon"][0], abs=1e-6)
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names[1:3])
    assert f"where chosen (n={record['images']['choose']})" in out and "held out" in out

    again = kdbench("search-epsilon", *TINY, "loss.search.count=12", "loss.tau=2")[1]
    assert len(asked) == 1 and again[again.index("brier") :] == out[out.index("brier") :]  # shown, not searched again

    (line,) = [line for line in out.splitlines() if line.startswith("next ")]
    words = shlex.split(line.removeprefix("next"))
    assert words[:2] == ["kdbench", "train"] and "loss.tau=2" in words and not any("search" in word for word in words)
    code, out, err = kdbench(*words[1:])
    assert code == 0, err
    (result,) = Path("outputs/runs/fake").glob("*/result.json")
    shown = [format(value, ".6g") for value in record["epsilon"]]
    assert json.loads(result.read_text())["formula"].endswith(f"tau = 2, eps = [{', '.join(shown)}]")


def test_training_may_choose_for_itself(kdbench):
    code, _, err = kdbench("train", *TINY, "loss=ptloss", "loss.epsilon=gradient", "loss.search.per_class=true")
    assert code == 0, err
    (folder,) = Path("outputs/runs/fake").iterdir()
    found = json.loads((folder / "epsilon.json").read_text())
    assert len(found["epsilon"]) == 10 and len(found["candidates"]) == found["count"]
    formula = json.loads((folder / "result.json").read_text())["formula"]
    assert formula.endswith("(gradient)")
    (folder / "result.json").unlink()  # interrupted after the last epoch: the checkpoint carries the choice
    assert kdbench("train", *TINY, "loss=ptloss", "loss.epsilon=gradient", "loss.search.per_class=true")[0] == 0
    assert json.loads((folder / "result.json").read_text())["formula"] == formula


@pytest.mark.parametrize(
    "words, message",
    [
        (["loss=kl"], "loss.epsilon: there is no such key"),
        (["loss.epsilon=0.5/m"], "loss.epsilon = 0.5/m: must be search or gradient"),
        (["teacher=none"], "teacher = none: must be a network"),
        (["loss.search.counts=3"], "Did you mean loss.search.count?"),
        (["loss.search.count=1"], "loss.search.count"),
    ],
)
def test_what_it_refuses(kdbench, words, message):
    code, _, err = kdbench("search-epsilon", *words)
    assert code == 1 and message in err and err.startswith("kdbench: ")
    assert not list(Path().rglob("epsilon.json"))


def test_it_needs_a_validation_split(kdbench):
    code, _, err = kdbench("search-epsilon", *TINY, "dataset.validation=0")
    assert code == 1 and "dataset.validation = 0: must be above 0" in err


@pytest.mark.parametrize("command", ["search-epsilon", "train", "train -m hydra/launcher=cohort loss.tau=1,2"])
def test_too_few_validation_images_are_refused_before_a_teacher_is_trained(kdbench, command):
    code, out, err = kdbench(*command.split(), *TINY, "loss=ptloss", "loss.epsilon=search", "dataset.validation=10")
    assert code == 1 and "trained now" not in out + err and not Path("outputs/teachers").exists()
    assert "dataset.validation = 10: must be more: loss=ptloss is fitted on at least 20" in err
    assert "there are 10" in err and not list(Path().rglob("checkpoint.pt"))


def test_force_leaves_no_earlier_choice(kdbench):
    words = ["train", *TINY, "loss=ptloss", "loss.epsilon=search", "loss.search.count=3", "hydra.run.dir=run"]
    assert kdbench(*words)[0] == 0 and Path("run/epsilon.json").exists()
    assert kdbench("train", *TINY, "loss=kl", "hydra.run.dir=run", "force=true")[0] == 0
    assert not Path("run/epsilon.json").exists() and Path("run/result.json").exists()


def test_help(kdbench):
    code, out, _ = kdbench("search-epsilon", "--help")
    assert code == 0 and out.startswith("kdbench search-epsilon") and "loss.search.count=200" in out
