"""`kdbench evaluate` on a real run: the figures of result.json, read back from the run folder alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdbench import cli


def kdbench(*words: str) -> int:
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        return cli.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    smoke = ["debug=smoke", "trainer.progress=none", "teacher=none", "loss=ce", f"hydra.run.dir={folder}"]
    assert kdbench("train", *smoke) == 0
    return folder


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_figures_are_the_runs_own(run, split, capsys):
    assert kdbench("evaluate", str(run), "--split", split, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    last = json.loads((run / "result.json").read_text())["last"]
    for name in ("top1", "top5", "nll", "ece"):
        assert figures[name] == pytest.approx(last[f"{split}/{name}"], abs=1e-6)


def test_for_people_shares_are_in_percent(run, capsys):
    assert kdbench("evaluate", str(run / "student.safetensors")) == 0
    out = capsys.readouterr().out
    top1 = json.loads((run / "result.json").read_text())["last"]["test/top1"]
    assert out.splitlines()[0] == f"{run} on test"
    assert f"{100 * top1:.2f} %" in next(line for line in out.splitlines() if line.split()[0] == "top1")


def test_on_changed_data(run, capsys):
    assert kdbench("evaluate", str(run), "dataset.n_test=20", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "digit"], "dataset=digit"),
        (["--dataset", "digits"], "dataset = "),  # 8x8 gray images do not fit
        (["dataset.nn=3"], "dataset.nn"),
        (["loss.tau=3"], "only changes to the dataset"),
    ],
)
def test_mistakes_are_messages(run, words, message, capsys):
    assert kdbench("evaluate", str(run), *words) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_a_folder_of_runs_is_not_a_run(run, capsys):
    assert kdbench("evaluate", str(run.parent)) == 1
    assert f"Runs in it: {run}" in capsys.readouterr().err


def test_against_another_run_and_against_itself(run, capsys):
    assert kdbench("evaluate", str(run), "--against", str(run), "--split", "train", "--json") == 0
    same = json.loads(capsys.readouterr().out)
    assert same["agreement"] == 1 and same["logit_distance"] == 0 == same["logit_shift"]
    assert same["tld"] == same["teacher_tld"] and same["feature_norm"] == same["teacher_feature_norm"] > 0


def test_against_a_teacher_that_is_not_there(run, capsys):
    assert kdbench("evaluate", str(run), "--against", "teacher") == 1
    assert "no teacher taught it" in capsys.readouterr().err
